"""The two halves of a block as one op each, so that training keeps little and copies nothing.

The reference is `Block.forward` in hrmcore/model.py, which runs the same op by op. Here the GEMMs (torch's) and the
kernels run in one call. Forward saves the residual stream, the rotated projection, the attention's output and SwiGLU's
input; backward computes the norms and SwiGLU's output again, unless they are to be kept as well. Queries and keys are
rotated in place, in the projection's buffer, and all four gradients of the projection are written into one buffer.

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
from hrmcore.ops.weights import Weight, gemm, gemm_rows_backward, gemm_weight_backward_


def attention_sublayer(
    normed: Tensor,
    stream: Tensor,
    gqkv_weight: Tensor | Weight,
    o_weight: Tensor | Weight,
    heads: int,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    mask: PackedMask,
    keep: bool = False,
) -> Tensor:
    """o(gated attention(rotated gqkv(normed))), (T, D), where normed = rms(stream); float32 or bfloat16.

    gqkv_weight: (4 A, D), rows gate | q | k | v; o_weight: (D, A); both rounded to the stream's dtype for the products.
    `eps` is that of the norm, which backward computes again from the stream, or with `keep` finds; the gradient goes to
    `normed` alone. `rotation` is (table, positions) as in `rope`; `mask`, without key_offsets, as in `attention`; both
    check them. Raises ValueError on a wrong dtype, shape or stride.
    """
    gqkv, o = Weight.of(gqkv_weight, normed.dtype), Weight.of(o_weight, normed.dtype)
    if not torch.is_grad_enabled():  # most visits of a step: spared what only autograd needs
        return _attend(normed, gqkv, o, heads, rotation, mask)[0]
    y: Tensor = _AttentionSublayer.apply(
        normed, stream, gqkv.traced, o.traced, gqkv, o, heads, eps, rotation, mask, keep
    )
    return y


def mlp_sublayer(
    x: Tensor,
    residual: Tensor,
    gate_up_weight: Tensor | Weight,
    down_weight: Tensor | Weight,
    eps: float,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """(down(swiglu(gate_up(rms(u)))), u) with u = x + residual; both (T, D), float32 or bfloat16.

    gate_up_weight: (2 F, D), rows gate | up; down_weight: (D, F); both rounded to x's dtype for the products. Backward
    computes the norm and SwiGLU's output again, or with `keep` finds them. Raises ValueError on a wrong dtype, shape or
    stride.
    """
    gate_up, down = Weight.of(gate_up_weight, x.dtype), Weight.of(down_weight, x.dtype)
    if not torch.is_grad_enabled():
        return _mlp_sublayer(x, residual, gate_up.rounded, down.rounded, eps)[:2]
    y, u = _MlpSublayer.apply(x, residual, gate_up.traced, down.traced, gate_up, down, eps, keep)
    return y, u


def add_norm(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms(u) and u = x + residual."""
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _C.rms_norm_forward(*map(to_dlpack, (x, residual, normed, total)), eps, stream_of(x))
    return normed, total


def norm(u: Tensor, eps: float) -> Tensor:
    """rms(u)."""
    normed = torch.empty_like(u)
    _C.rms_norm_forward(to_dlpack(u), None, to_dlpack(normed), None, eps, stream_of(u))
    return normed


def norm_backward_(grad_normed: Tensor, u: Tensor, grad_u: Tensor | None, eps: float) -> Tensor:
    """The gradient of u and of both its summands; overwrites grad_normed."""
    passed_on = None if grad_u is None else to_dlpack(grad_u.contiguous())
    operands = to_dlpack(u), to_dlpack(grad_normed), passed_on, to_dlpack(grad_normed)
    _C.rms_norm_backward(*operands, eps, stream_of(u))
    return grad_normed


def _buffers(ctx: Any, first: int) -> list[Any]:
    """Where the gradients of the weights, arguments from number `first` on, are added up, and whether they begin.

    None for a weight that wants none.
    """
    found = [s.buffer() if ctx.needs_input_grad[first + i] else (None, False) for i, s in enumerate(ctx.sums)]
    return [total for total, _ in found] + [begins for _, begins in found]


# Attention


def _split(gqkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, q, k, v (T, H, d) of (T, 4, H, d): views."""
    gate, q, k, v = gqkv.unbind(1)
    return gate, q, k, v


def rotate_and_attend(gqkv: Tensor, rotation: tuple[Tensor, Tensor], mask: PackedMask) -> tuple[Tensor, Tensor]:
    """Rotates q and k of gqkv (T, 4, H, d) in place; returns the gated attention (T, H, d) and its log-sum-exp."""
    gate, q, k, v = _split(gqkv)
    _C.rope(*map(to_dlpack, (q, k, *rotation, q, k)), False, stream_of(q))
    return launch_forward((q, k, v, gate), mask)


def rotate_and_attend_backward(
    gqkv: Tensor,
    results: tuple[Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    mask: PackedMask,
    grad_attended: Tensor,
) -> Tensor:
    """The gradient of gqkv as it was before `rotate_and_attend`, whose `results` and whose gqkv afterwards it takes.

    Overwrites grad_attended.
    """
    gate, q, k, v = _split(gqkv)
    grad_gqkv = torch.empty_like(gqkv)
    grad_gate, grad_q, grad_k, grad_v = _split(grad_gqkv)
    grads = grad_q, grad_k, grad_v, grad_gate
    grad_out = grad_attended.view(q.shape)
    launch_backward((q, k, v, gate), mask, results, grad_out, grads, overwrite=True, rotation=rotation)
    return grad_gqkv


@torch.library.custom_op("hrmcore::attention_sublayer", mutates_args=(), device_types=DEVICES)
def _attention_sublayer(
    normed: Tensor,
    gqkv_weight: Tensor,
    o_weight: Tensor,
    heads: int,
    table: Tensor,
    positions: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    log_decay: Tensor | None,
    tiles: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gqkv = gemm(normed, gqkv_weight).view(len(normed), 4, heads, -1)
    mask = PackedMask(offsets, prefix, None, log_decay, window, tiles)
    attended, lse = rotate_and_attend(gqkv, (table, positions), mask)
    return gemm(attended.flatten(1), o_weight), gqkv, attended, lse


@torch.library.custom_op(
    "hrmcore::attention_sublayer_backward", mutates_args=("gqkv_sum", "o_sum"), device_types=DEVICES
)
def _attention_sublayer_backward(
    stream: Tensor,
    normed: Tensor | None,
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
    gqkv_sum: Tensor | None,
    o_sum: Tensor | None,
    gqkv_begins: bool,
    o_begins: bool,
) -> Tensor:
    if o_sum is not None:
        gemm_weight_backward_(o_sum, o_begins, grad_y, attended.flatten(1))
    mask = PackedMask(offsets, prefix, None, log_decay, window, tiles)
    grad_attended = gemm_rows_backward(grad_y, o_weight)
    grad_gqkv = rotate_and_attend_backward(gqkv, (attended, lse), (table, positions), mask, grad_attended)
    del grad_attended
    grad_rows = grad_gqkv.flatten(1)
    if gqkv_sum is not None:
        gemm_weight_backward_(gqkv_sum, gqkv_begins, grad_rows, norm(stream, eps) if normed is None else normed)
    return gemm_rows_backward(grad_rows, gqkv_weight)


@_attention_sublayer.register_fake
def _(
    normed: Tensor, gqkv_weight: Tensor, o_weight: Tensor, heads: int, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, head_dim = normed.shape[0], o_weight.shape[1] // heads
    gqkv, attended = normed.new_empty(tokens, 4, heads, head_dim), normed.new_empty(tokens, heads, head_dim)
    return normed.new_empty(normed.shape), gqkv, attended, normed.new_empty(tokens, heads, dtype=torch.float32)


@_attention_sublayer_backward.register_fake
def _(stream: Tensor, *others: object) -> Tensor:
    return stream.new_empty(stream.shape)


def _attend(
    normed: Tensor, gqkv: Weight, o: Weight, heads: int, rotation: tuple[Tensor, Tensor], mask: PackedMask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positional = (*rotation, mask.offsets, mask.prefix, mask.log_decay, mask.tiles, mask.window)
    return _attention_sublayer(normed, gqkv.rounded, o.rounded, heads, *positional)


class _AttentionSublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normed: Tensor,
        stream: Tensor,
        gqkv_traced: Tensor,
        o_traced: Tensor,
        gqkv: Weight,
        o: Weight,
        heads: int,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        mask: PackedMask,
        keep: bool,
    ) -> Tensor:
        y, *kept = _attend(normed, gqkv, o, heads, rotation, mask)
        positional = (*rotation, mask.offsets, mask.prefix, mask.log_decay, mask.tiles)
        ctx.save_for_backward(stream, normed if keep else None, *kept, gqkv.rounded, o.rounded, *positional)
        ctx.eps, ctx.window, ctx.sums = eps, mask.window, (gqkv.sum, o.sum)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        sums = _buffers(ctx, 2)
        grad_normed = _attention_sublayer_backward(*ctx.saved_tensors, ctx.window, ctx.eps, grad_y, *sums)
        return grad_normed, *10 * [None]


# SwiGLU


@torch.library.custom_op("hrmcore::mlp_sublayer", mutates_args=(), device_types=DEVICES)
def _mlp_sublayer(
    x: Tensor, residual: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    normed, u = add_norm(x, residual, eps)
    ab = gemm(normed, gate_up_weight)
    product = swiglu_product(ab)
    return gemm(product, down_weight), u, ab, normed, product


def swiglu_product(ab: Tensor) -> Tensor:
    """SwiGLU (T, F) of ab (T, 2 F)."""
    product = ab.new_empty(ab.shape[0], ab.shape[1] // 2)
    _C.swiglu_forward(to_dlpack(ab), to_dlpack(product), stream_of(ab))
    return product


def swiglu_backward_(grad_product: Tensor, ab: Tensor, again: bool = True) -> Tensor:
    """The gradient of ab; SwiGLU's output, where it is to be computed `again`, overwrites `grad_product`."""
    grad_ab, product = torch.empty_like(ab), to_dlpack(grad_product) if again else None
    _C.swiglu_backward(*map(to_dlpack, (ab, grad_product, grad_ab)), product, stream_of(ab))
    return grad_ab


@torch.library.custom_op(
    "hrmcore::mlp_sublayer_backward", mutates_args=("gate_up_sum", "down_sum"), device_types=DEVICES
)
def _mlp_sublayer_backward(
    u: Tensor,
    ab: Tensor,
    normed: Tensor | None,
    product: Tensor | None,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    eps: float,
    grad_y: Tensor,
    grad_u: Tensor | None,
    gate_up_sum: Tensor | None,
    down_sum: Tensor | None,
    gate_up_begins: bool,
    down_begins: bool,
) -> Tensor:
    grad_product = gemm_rows_backward(grad_y, down_weight)
    grad_ab = swiglu_backward_(grad_product, ab, again=product is None)
    if down_sum is not None:
        gemm_weight_backward_(down_sum, down_begins, grad_y, grad_product if product is None else product)
    del grad_product
    if gate_up_sum is not None:
        gemm_weight_backward_(gate_up_sum, gate_up_begins, grad_ab, norm(u, eps) if normed is None else normed)
    return norm_backward_(gemm_rows_backward(grad_ab, gate_up_weight), u, grad_u, eps)


@_mlp_sublayer.register_fake
def _(
    x: Tensor, residual: Tensor, gate_up_weight: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, u, normed = (x.new_empty(x.shape) for _ in range(3))
    ffn = gate_up_weight.shape[0] // 2
    return y, u, x.new_empty(x.shape[0], 2 * ffn), normed, x.new_empty(x.shape[0], ffn)


@_mlp_sublayer_backward.register_fake
def _(u: Tensor, *others: object) -> Tensor:
    return u.new_empty(u.shape)


class _MlpSublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        gate_up_traced: Tensor,
        down_traced: Tensor,
        gate_up: Weight,
        down: Weight,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = gate_up.rounded, down.rounded
        y, u, ab, normed, product = _mlp_sublayer(x, residual, *weights, eps)
        ctx.save_for_backward(u, ab, *((normed, product) if keep else (None, None)), *weights)
        ctx.set_materialize_grads(False)  # or autograd would make zeros for an output that nothing uses
        ctx.eps, ctx.sums = eps, (gate_up.sum, down.sum)
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
        grad = _mlp_sublayer_backward(*ctx.saved_tensors, ctx.eps, grad_y, grad_u, *_buffers(ctx, 2))
        return grad, grad, *6 * [None]
