"""SwiGLU, the gated product in the feed-forward layer. Kernels: csrc/ops/swiglu.{h,cpp,cu}.

Shapes: T tokens, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import DEVICES, reference_active, stream_of


def swiglu_ref(ab: Tensor) -> Tensor:
    """The specification: [a | b] = ab (T, 2F); returns silu(a) * b, (T, F).

    Source: arXiv 2002.05202.
    """
    a, b = ab.chunk(2, dim=-1)
    return F.silu(a) * b


def swiglu(ab: Tensor) -> Tensor:
    """silu(a) * b for ab = [a | b], (T, 2F) float32 or bfloat16; returns (T, F).

    Keeps only `ab` for the backward pass. Raises ValueError on a wrong dtype, shape, device or stride.
    """
    return swiglu_ref(ab) if reference_active() else _swiglu(ab)


@torch.library.custom_op("hrmcore::swiglu", mutates_args=(), device_types=DEVICES)
def _swiglu(ab: Tensor) -> Tensor:
    y = ab.new_empty((*ab.shape[:-1], ab.shape[-1] // 2))
    _C.swiglu_forward(to_dlpack(ab), to_dlpack(y), stream_of(ab))
    return y


@torch.library.custom_op("hrmcore::swiglu_backward", mutates_args=(), device_types=DEVICES)
def _swiglu_backward(ab: Tensor, grad_y: Tensor) -> Tensor:
    grad_ab = ab.new_empty(ab.shape)
    _C.swiglu_backward(*map(to_dlpack, (ab, grad_y.contiguous(), grad_ab)), None, stream_of(ab))
    return grad_ab


@_swiglu.register_fake
def _(ab: Tensor) -> Tensor:
    return ab.new_empty((*ab.shape[:-1], ab.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(ab: Tensor, grad_y: Tensor) -> Tensor:
    return ab.new_empty(ab.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return _swiglu_backward(*ctx.saved_tensors, grad_y)


_swiglu.register_autograd(_backward, setup_context=_save)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: one element, ragged sizes, real shapes."""
    generator = torch.Generator().manual_seed(0)
    for tokens, ffn in [(1, 1), (3, 7), (5, 33), (17, 100), (64, 512), (256, 4096)]:
        yield {"ab": 2 * torch.randn(tokens, 2 * ffn, generator=generator).to(dtype)}


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs that it must compute, an exponential or a division as one."""
    ab = case["ab"]
    if backward:
        return {"bytes": 5 * ab.nbytes // 2, "flops": 12 * ab.numel() // 2}
    return {"bytes": 3 * ab.nbytes // 2, "flops": 5 * ab.numel() // 2}
