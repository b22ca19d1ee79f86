"""What lies between two visits: final norm, injection, next norm. Kernels: csrc/ops/rms_norm.{h,cpp,cu}.

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
from hrmcore.ops.rms_norm import rms_norm_ref


def rms_norm_inject_ref(
    x: Tensor, residual: Tensor, injection: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: state = rms(x + residual), u = state + injection; returns (state, rms(u), u), all (T, D).

    rms is that of `rms_norm`. Source: the recurrence of arXiv 2605.20613.
    """
    state, _ = rms_norm_ref(x, residual, eps)
    return (state, *rms_norm_ref(state, injection, eps))


def rms_norm_inject(x: Tensor, residual: Tensor, injection: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Closes a visit that ended with x + residual and opens the next, which adds `injection` to the state.

    Returns (state, normalised, sum): the state and what the next visit begins with, all (T, D), float32 or bfloat16.
    Raises ValueError on a wrong dtype, shape, device, stride or eps.
    """
    if reference_active():
        return rms_norm_inject_ref(x, residual, injection, eps)
    return _rms_norm_inject(x, residual, injection, eps)[:3]


@torch.library.custom_op("hrmcore::rms_norm_inject", mutates_args=(), device_types=DEVICES)
def _rms_norm_inject(
    x: Tensor, residual: Tensor, injection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state, y, total = (x.new_empty(x.shape) for _ in range(3))
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    operands = x, residual, injection, state, y, total, scale
    _C.rms_norm_inject_forward(*map(to_dlpack, operands), eps, stream_of(x))
    return state, y, total, scale


@torch.library.custom_op("hrmcore::rms_norm_inject_backward", mutates_args=(), device_types=DEVICES)
def _rms_norm_inject_backward(
    state: Tensor,
    total: Tensor,
    scale: Tensor,
    grad_state: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    eps: float,
    to_injection: bool,
) -> tuple[Tensor, Tensor]:
    grad_u = state.new_empty(state.shape)
    grad_injection = state.new_empty(state.shape if to_injection else (0,))
    grads = (None if g is None else to_dlpack(g.contiguous()) for g in (grad_state, grad_y, grad_sum))
    written = to_dlpack(grad_u), to_dlpack(grad_injection) if to_injection else None
    _C.rms_norm_inject_backward(*map(to_dlpack, (state, total, scale)), *grads, *written, eps, stream_of(state))
    return grad_u, grad_injection


@_rms_norm_inject.register_fake
def _(x: Tensor, residual: Tensor, injection: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape), scale


@_rms_norm_inject_backward.register_fake
def _(state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(state.shape if others[-1] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    state, _, total, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(state, total, scale)
    ctx.eps = inputs[3]


def _backward(
    ctx: Any, grad_state: Tensor | None, grad_y: Tensor | None, grad_sum: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    state, total, scale = ctx.saved_tensors
    grad_y = torch.zeros_like(state) if grad_y is None else grad_y
    to_injection = ctx.needs_input_grad[2]
    grads = grad_state, grad_y, grad_sum
    grad, grad_injection = _rms_norm_inject_backward(state, total, scale, *grads, ctx.eps, to_injection)
    return grad, grad, grad_injection if to_injection else None, None


_rms_norm_inject.register_autograd(_backward, setup_context=_save)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: ragged sizes, one element, real shapes."""
    generator = torch.Generator().manual_seed(0)
    for tokens, width, eps in [
        (1, 1, 0.5),  # a small eps would cancel the whole gradient of a one-column row
        (3, 7, 1e-6),
        (5, 33, 1e-2),
        (17, 100, 1e-6),
        (64, 192, 1e-6),
        (512, 1536, 1e-6),
    ]:
        x, residual, injection = torch.randn(3, tokens, width, generator=generator).to(dtype)
        yield {"x": x, "residual": residual, "injection": injection, "eps": eps}


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs that it must compute, backward with every output's gradient."""
    x, scales = case["x"], 4 * len(case["x"])
    if backward:
        return {"bytes": 7 * x.nbytes + scales, "flops": 14 * x.numel()}
    return {"bytes": 6 * x.nbytes + scales, "flops": 10 * x.numel()}
