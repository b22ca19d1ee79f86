"""Which implementation the ops run: the kernels, or the plain-torch references."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from hrmcore import _C

DEVICES = ("cpu", "cuda")

_reference: ContextVar[bool] = ContextVar("hrmcore_reference_ops", default=False)


def reference_active() -> bool:
    """True inside `reference_ops()`."""
    return _reference.get()


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Run every op through its `X_ref` in this context: any dtype, twice differentiable, slow."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def stream_of(x: Tensor) -> int:
    """The CUDA stream, as a number, in whose order a kernel on `x` must run; 0 on the CPU.

    It belongs to the tensor's device, and so does the launch, whichever device the thread uses (csrc/core/device.h).
    """
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def runs_on_cuda(x: Tensor) -> bool:
    """Whether an op on `x` takes its CUDA kernel: there, or in the tests' emulator."""
    return x.is_cuda or _C.emulating_cuda()


def require_cuda() -> None:
    """Raise RuntimeError, saying what is missing, unless torch has a CUDA device and hrmcore its CUDA kernels."""
    if torch.version.cuda is None:
        raise RuntimeError(f"device 'cuda': torch {torch.__version__} is built without CUDA; use device 'cpu'")
    if not torch.cuda.is_available():
        raise RuntimeError("device 'cuda': torch finds no CUDA device on this machine; use device 'cpu'")
    if not Path(_C.__file__).with_name("_C_cuda.so").exists():
        raise RuntimeError(
            "device 'cuda': this hrmcore is built without CUDA kernels; install it again where nvcc is found, "
            "with --config-settings=cmake.define.HRMCORE_CUDA=ON"
        )
