"""The two halves of a block over frozen weights with low-rank adapters: what `sublayers.py` is for trained weights.

A frozen weight W (M, N) is float32, bfloat16, or int8 with a float32 scale a row. Some of its rows have an adapter, two
float32 factors A (r, N) and B (rows, r): there the weight is W + s·B·A (LoRA, arXiv 2106.09685). Only factors get
gradients, the sum over all uses of a weight. Backward keeps what the other sublayers keep, and no dense gradient of a
weight exists. The reference is `AdaptedLinear.forward` in hrmcore/lora.py within `Block.forward`.

Shapes: T tokens, D width, H heads, d head_dim, A = H d, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrmcore.ops.attention import PackedMask
from hrmcore.ops.sublayers import (
    add_norm,
    norm,
    norm_backward_,
    rotate_and_attend,
    rotate_and_attend_backward,
    swiglu_backward_,
    swiglu_product,
)


@dataclass(frozen=True)
class Projection:
    """A frozen weight, and which of its rows have adapters; their factors travel beside it, A and B in turn."""

    weight: Tensor  # (M, N) float32, bfloat16 or int8
    scale: Tensor | None  # (M) float32, of int8
    rows: tuple[slice, ...]
    scaling: float

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """x (T, N) -> (T, M), in the dtype of x. Whole numbers up to 127 are exact in bfloat16: a row is scaled after
        the product."""
        y = torch.mm(x, self.weight.to(x.dtype).T)
        if self.scale is not None:
            y.mul_(self.scale)
        for rows, a, b in self._adapters(factors):
            y[:, rows].addmm_(torch.mm(x, a.to(x.dtype).T), b.to(x.dtype).T, alpha=self.scaling)
        return y

    def rows_backward(self, grad: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of x, and of each x Aᵀ (T, r)."""
        scaled = grad if self.scale is None else (grad * self.scale).to(grad.dtype)
        grad_x = torch.mm(scaled, self.weight.to(grad.dtype))
        inner = []
        for rows, a, b in self._adapters(factors):
            inner.append(torch.mm(grad[:, rows], b.to(grad.dtype)).mul_(self.scaling))
            grad_x.addmm_(inner[-1], a.to(grad.dtype))
        return grad_x, inner

    def factors_backward(
        self, grad: Tensor, inner: Sequence[Tensor], x: Tensor, factors: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """The gradients of the factors; `inner` is what `rows_backward` returned."""
        for (rows, a, _), grad_inner in zip(self._adapters(factors), inner, strict=True):
            yield torch.mm(grad_inner.T, x).to(a.dtype)
            yield torch.mm(grad[:, rows].T, torch.mm(x, a.to(x.dtype).T)).mul_(self.scaling).to(a.dtype)

    def _adapters(self, factors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        return zip(self.rows, factors[::2], factors[1::2], strict=True)


@dataclass(frozen=True)
class Half:
    """What a half of a block computes with beside tensors that get gradients: two projections, in their order.

    `rotation` is (table, positions) as in `rope`; it and `mask`, without key_offsets, are for attention alone.
    """

    first: Projection
    second: Projection
    eps: float
    heads: int = 0
    rotation: tuple[Tensor, Tensor] | None = None
    mask: PackedMask | None = None

    def split(self, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The factors of either projection."""
        count = 2 * len(self.first.rows)
        return factors[:count], factors[count:]


def adapted_attention(normed: Tensor, stream: Tensor, half: Half, factors: Sequence[Tensor]) -> Tensor:
    """o(gated attention(rotated gqkv(normed))), (T, D), where normed = rms(stream); float32 or bfloat16.

    As `attention_sublayer`; `factors` are those of gqkv, then of o.
    """
    y: Tensor = _Attention.apply(normed, stream, half, *factors)
    return y


def adapted_mlp(x: Tensor, residual: Tensor, half: Half, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(down(swiglu(gate_up(rms(u)))), u) with u = x + residual; both (T, D), float32 or bfloat16.

    As `mlp_sublayer`; `factors` are those of gate_up, then of down.
    """
    y, u = _Mlp.apply(x, residual, half, *factors)
    return y, u


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, stream: Tensor, half: Half, *factors: Tensor) -> Tensor:
        assert half.rotation is not None
        assert half.mask is not None
        of_gqkv, of_o = half.split(factors)
        gqkv = half.first.forward(normed, of_gqkv).view(len(normed), 4, half.heads, -1)
        attended, lse = rotate_and_attend(gqkv, half.rotation, half.mask)
        ctx.half = half
        ctx.save_for_backward(stream, gqkv, attended, lse, *factors)
        return half.second.forward(attended.flatten(1), of_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        half: Half = ctx.half
        stream, gqkv, attended, lse, *factors = ctx.saved_tensors
        of_gqkv, of_o = half.split(factors)
        grad_attended, inner = half.second.rows_backward(grad_y, of_o)
        grads_o = list(half.second.factors_backward(grad_y, inner, attended.flatten(1), of_o))
        assert half.rotation is not None
        assert half.mask is not None
        grad_gqkv = rotate_and_attend_backward(gqkv, (attended, lse), half.rotation, half.mask, grad_attended)
        del grad_attended
        flat = grad_gqkv.flatten(1)
        grad_normed, inner = half.first.rows_backward(flat, of_gqkv)
        grads_gqkv = half.first.factors_backward(flat, inner, norm(stream, half.eps), of_gqkv)
        return grad_normed, None, None, *grads_gqkv, *grads_o


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, half: Half, *factors: Tensor) -> tuple[Tensor, Tensor]:
        of_gate_up, of_down = half.split(factors)
        normed, u = add_norm(x, residual, half.eps)
        ab = half.first.forward(normed, of_gate_up)
        ctx.half = half
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, ab, *factors)
        return half.second.forward(swiglu_product(ab), of_down), u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        half: Half = ctx.half
        u, ab, *factors = ctx.saved_tensors
        of_gate_up, of_down = half.split(factors)
        grad_y = torch.zeros_like(u) if grad_y is None else grad_y
        product, inner = half.second.rows_backward(grad_y, of_down)
        grad_ab = swiglu_backward_(product, ab)
        grads_down = list(half.second.factors_backward(grad_y, inner, product, of_down))
        del product
        grad_normed, inner = half.first.rows_backward(grad_ab, of_gate_up)
        grads_gate_up = list(half.first.factors_backward(grad_ab, inner, norm(u, half.eps), of_gate_up))
        grad = norm_backward_(grad_normed, u, grad_u, half.eps)
        return grad, grad, None, *grads_gate_up, *grads_down
