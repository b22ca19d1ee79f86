"""Which implementation the ops run: the kernels, or the plain-torch references."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

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
    """The CUDA stream, as a number, in whose order a kernel on `x` must run; 0 on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
