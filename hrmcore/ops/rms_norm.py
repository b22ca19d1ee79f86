"""RMSNorm without gain, optionally after a residual add. Kernels: csrc/ops/rms_norm.{h,cpp,cu}.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import DEVICES, reference_active, stream_of


def rms_norm_ref(x: Tensor, residual: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The specification: u = x + residual, y = u / sqrt(mean(u²) + eps); returns (y, u), both (T, D).

    Source: arXiv 1910.07467, without gain.
    """
    u = x if residual is None else x + residual
    return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps), u


def rms_norm(x: Tensor, residual: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual; returns (normalised, sum), both (T, D), float32 or bfloat16.

    Without a residual the sum is `x` itself. Raises ValueError on a wrong dtype, shape, device, stride or eps.
    """
    if reference_active():
        return rms_norm_ref(x, residual, eps)
    if residual is None:
        return _rms_norm(x, eps), x
    return _add_rms_norm(x, residual, eps)


@torch.library.custom_op("hrmcore::rms_norm", mutates_args=(), device_types=DEVICES)
def _rms_norm(x: Tensor, eps: float) -> Tensor:
    y = x.new_empty(x.shape)
    _C.rms_norm_forward(to_dlpack(x), None, to_dlpack(y), None, eps, stream_of(x))
    return y


@torch.library.custom_op("hrmcore::add_rms_norm", mutates_args=(), device_types=DEVICES)
def _add_rms_norm(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _C.rms_norm_forward(to_dlpack(x), to_dlpack(residual), to_dlpack(y), to_dlpack(total), eps, stream_of(x))
    return y, total


@torch.library.custom_op("hrmcore::rms_norm_backward", mutates_args=(), device_types=DEVICES)
def _rms_norm_backward(u: Tensor, grad_y: Tensor, grad_sum: Tensor | None, eps: float) -> Tensor:
    grad_u = u.new_empty(u.shape)
    grad_sum = None if grad_sum is None else to_dlpack(grad_sum.contiguous())
    operands = to_dlpack(u), to_dlpack(grad_y.contiguous()), grad_sum, to_dlpack(grad_u)
    _C.rms_norm_backward(*operands, eps, stream_of(u))
    return grad_u


@_rms_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_rms_norm_backward.register_fake
def _(u: Tensor, grad_y: Tensor, grad_sum: Tensor | None, eps: float) -> Tensor:
    return u.new_empty(u.shape)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the sum that ends the last visit has no gradient; autograd would make zeros
    ctx.save_for_backward(output[1])
    ctx.eps = inputs[2]


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
    return _rms_norm_backward(*ctx.saved_tensors, grad_y, None, ctx.eps), None


def _add_backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor, Tensor, None]:
    grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
    grad = _rms_norm_backward(*ctx.saved_tensors, grad_y, grad_sum, ctx.eps)
    return grad, grad, None


_rms_norm.register_autograd(_backward, setup_context=_save_input)
_add_rms_norm.register_autograd(_add_backward, setup_context=_save_sum)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: ragged sizes, one element, real shapes."""
    generator = torch.Generator().manual_seed(0)
    for tokens, width, with_residual, eps in [
        (1, 1, False, 0.5),  # a small eps would cancel the whole gradient of a one-column row
        (3, 7, True, 1e-6),
        (5, 33, False, 1e-2),
        (17, 100, True, 1e-6),
        (64, 192, True, 1e-6),
        (512, 1536, True, 1e-6),
    ]:
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        residual = torch.randn(tokens, width, generator=generator).to(dtype) if with_residual else None
        yield {"x": x, "residual": residual, "eps": eps}


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs that it must compute, backward with every output's gradient."""
    x, with_residual = case["x"], case["residual"] is not None
    if backward:
        return {"bytes": (3 + with_residual) * x.nbytes, "flops": (7 + with_residual) * x.numel()}
    return {"bytes": (2 + 2 * with_residual) * x.nbytes, "flops": (4 + with_residual) * x.numel()}
