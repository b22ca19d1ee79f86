"""The two halves of a block as one op each, so that training keeps little and copies nothing.

The reference is `Block.forward` in hrmcore/model.py, which runs the same op by op. Here the GEMMs (torch's) and the
kernels run in one call. Forward saves the residual stream, the rotated projection, the attention's output and SwiGLU's
input; backward computes the norms and SwiGLU's output again. Queries and keys are rotated in place, in the projection's
buffer, and all four gradients of the projection are written into one buffer.

Shapes: T tokens, D width, H heads, d head_dim, A = H d, F ffn, P positions, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.attention import PackedMask, launch_backward, launch_forward
from hrmcore.ops.backend import DEVICES, stream_of


def attention_sublayer(
    normed: Tensor,
    stream: Tensor,
    gqkv_weight: Tensor,
    o_weight: Tensor,
    heads: int,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    mask: PackedMask,
) -> Tensor:
    """o(gated attention(rotated gqkv(normed))), (T, D), where normed = rms(stream); float32 or bfloat16.

    gqkv_weight: (4 A, D), rows gate | q | k | v; o_weight: (D, A); both rounded to the stream's dtype for the products.
    `eps` is that of the norm, which backward computes again from the stream; the gradient goes to `normed` alone.
    `rotation` is (table, positions) as in `rope`; `mask`, without key_offsets, as in `attention`; both check them.
    Raises ValueError on a wrong dtype, shape or stride.
    """
    flat = (*rotation, mask.offsets, mask.prefix, mask.log_decay, mask.tiles, mask.window)
    return _attention_sublayer(normed, stream, gqkv_weight, o_weight, heads, eps, *flat)[0]


def mlp_sublayer(
    x: Tensor, residual: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(down(swiglu(gate_up(rms(u)))), u) with u = x + residual; both (T, D), float32 or bfloat16.

    gate_up_weight: (2 F, D), rows gate | up; down_weight: (D, F); both rounded to x's dtype for the products. Raises
    ValueError on a wrong dtype, shape or stride.
    """
    return _mlp_sublayer(x, residual, gate_up_weight, down_weight, eps)[:2]


def _add_norm(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _C.rms_norm_forward(*map(to_dlpack, (x, residual, normed, total)), eps, stream_of(x))
    return normed, total


def _norm(u: Tensor, eps: float) -> Tensor:
    normed = torch.empty_like(u)
    _C.rms_norm_forward(to_dlpack(u), None, to_dlpack(normed), None, eps, stream_of(u))
    return normed


def _norm_backward_(grad_normed: Tensor, u: Tensor, grad_u: Tensor | None, eps: float) -> Tensor:
    """The gradient of u and of both its summands; overwrites grad_normed."""
    passed_on = None if grad_u is None else to_dlpack(grad_u.contiguous())
    operands = to_dlpack(u), to_dlpack(grad_normed), passed_on, to_dlpack(grad_normed)
    _C.rms_norm_backward(*operands, eps, stream_of(u))
    return grad_normed


def _gemm(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, N) weight (M, N)^T -> (T, M), in the dtype of the rows."""
    return torch.mm(rows, weight.to(rows.dtype).T)


def _gemm_backward(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `_gemm` to its rows and to its weight."""
    return _gemm_rows_backward(grad, weight), _gemm_weight_backward(grad, rows, weight)


def _gemm_rows_backward(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad, weight.to(grad.dtype))


def _gemm_weight_backward(grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad.T, rows).to(weight.dtype)


# Attention


def _split(gqkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, q, k, v (T, H, d) of (T, 4, H, d): views."""
    gate, q, k, v = gqkv.unbind(1)
    return gate, q, k, v


@torch.library.custom_op("hrmcore::attention_sublayer", mutates_args=(), device_types=DEVICES)
def _attention_sublayer(
    normed: Tensor,
    stream: Tensor,
    gqkv_weight: Tensor,
    o_weight: Tensor,
    heads: int,
    eps: float,
    table: Tensor,
    positions: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    log_decay: Tensor | None,
    tiles: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gqkv = _gemm(normed, gqkv_weight).view(len(normed), 4, heads, -1)
    gate, q, k, v = _split(gqkv)
    _C.rope(*map(to_dlpack, (q, k, table, positions, q, k)), False, stream_of(q))
    mask = PackedMask(offsets, prefix, None, log_decay, window, tiles)
    attended, lse = launch_forward((q, k, v, gate), mask)
    return _gemm(attended.flatten(1), o_weight), gqkv, attended, lse


@torch.library.custom_op("hrmcore::attention_sublayer_backward", mutates_args=(), device_types=DEVICES)
def _attention_sublayer_backward(
    stream: Tensor,
    gqkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    gqkv_weight: Tensor,
    o_weight: Tensor,
    table: Tensor,
    positions: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    log_decay: Tensor | None,
    tiles: Tensor | None,
    window: int,
    eps: float,
    grad_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_attended, grad_o_weight = _gemm_backward(grad_y, attended.flatten(1), o_weight)
    gate, q, k, v = _split(gqkv)
    grad_gqkv = torch.empty_like(gqkv)
    grad_gate, grad_q, grad_k, grad_v = _split(grad_gqkv)
    mask, grads = PackedMask(offsets, prefix, None, log_decay, window, tiles), (grad_q, grad_k, grad_v, grad_gate)
    launch_backward((q, k, v, gate), mask, (attended, lse), grad_attended.view(q.shape), grads, overwrite=True)
    del grad_attended
    _C.rope(*map(to_dlpack, (grad_q, grad_k, table, positions, grad_q, grad_k)), True, stream_of(q))
    return *_gemm_backward(grad_gqkv.flatten(1), _norm(stream, eps), gqkv_weight), grad_o_weight


@_attention_sublayer.register_fake
def _(
    normed: Tensor, stream: Tensor, gqkv_weight: Tensor, o_weight: Tensor, heads: int, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, head_dim = normed.shape[0], o_weight.shape[1] // heads
    gqkv, attended = normed.new_empty(tokens, 4, heads, head_dim), normed.new_empty(tokens, heads, head_dim)
    return normed.new_empty(normed.shape), gqkv, attended, normed.new_empty(tokens, heads, dtype=torch.float32)


@_attention_sublayer_backward.register_fake
def _(
    stream: Tensor, gqkv: Tensor, attended: Tensor, lse: Tensor, gqkv_weight: Tensor, o_weight: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return stream.new_empty(stream.shape), gqkv_weight.new_empty(gqkv_weight.shape), o_weight.new_empty(o_weight.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stream, gqkv_weight, o_weight, _, ctx.eps, *positional, ctx.window = inputs
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of these outputs
    ctx.save_for_backward(stream, *kept, gqkv_weight, o_weight, *positional)


def _attention_backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
    grad_normed, *grads = _attention_sublayer_backward(*ctx.saved_tensors, ctx.window, ctx.eps, grad_y)
    return grad_normed, None, *grads, *9 * [None]


_attention_sublayer.register_autograd(_attention_backward, setup_context=_save_attention)

# SwiGLU


@torch.library.custom_op("hrmcore::mlp_sublayer", mutates_args=(), device_types=DEVICES)
def _mlp_sublayer(
    x: Tensor, residual: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, u = _add_norm(x, residual, eps)
    ab = _gemm(normed, gate_up_weight)
    return _gemm(_swiglu(ab), down_weight), u, ab


def _swiglu(ab: Tensor) -> Tensor:
    product = ab.new_empty(ab.shape[0], ab.shape[1] // 2)
    _C.swiglu_forward(to_dlpack(ab), to_dlpack(product), stream_of(ab))
    return product


@torch.library.custom_op("hrmcore::mlp_sublayer_backward", mutates_args=(), device_types=DEVICES)
def _mlp_sublayer_backward(
    u: Tensor,
    ab: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    eps: float,
    grad_y: Tensor,
    grad_u: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_ab, product = torch.empty_like(ab), _gemm_rows_backward(grad_y, down_weight)
    # SwiGLU's output, computed again, overwrites its gradient.
    _C.swiglu_backward(*map(to_dlpack, (ab, product, grad_ab, product)), stream_of(ab))
    grad_down_weight = _gemm_weight_backward(grad_y, product, down_weight)
    del product
    grad_normed, grad_gate_up_weight = _gemm_backward(grad_ab, _norm(u, eps), gate_up_weight)
    return _norm_backward_(grad_normed, u, grad_u, eps), grad_gate_up_weight, grad_down_weight


@_mlp_sublayer.register_fake
def _(x: Tensor, residual: Tensor, gate_up_weight: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[0], gate_up_weight.shape[0])


@_mlp_sublayer_backward.register_fake
def _(
    u: Tensor, ab: Tensor, gate_up_weight: Tensor, down_weight: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        gate_up_weight.new_empty(gate_up_weight.shape),
        down_weight.new_empty(down_weight.shape),
    )


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, gate_up_weight, down_weight, ctx.eps = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], gate_up_weight, down_weight)


def _mlp_backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
    grads = _mlp_sublayer_backward(*ctx.saved_tensors, ctx.eps, grad_y, grad_u)
    return grads[0], *grads, None


_mlp_sublayer.register_autograd(_mlp_backward, setup_context=_save_mlp)
