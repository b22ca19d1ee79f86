"""The matrices of a model as the products of one step take them: rounded once, their gradients summed in the products.

A recurrent model multiplies by the same matrix at every visit. Autograd alone would round the matrix at each of them,
and would write every visit's gradient before it adds it to the others'. Here the first product of a backward pass
writes the gradient, the later ones add to it, and autograd gets the sum: the same tensor as before, by less traffic.

Shapes: T tokens, a matrix (M, N).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether torch has a GEMM of bfloat16 that adds to float32 on this GPU; since 2.8 some have it and refuse."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    rows, total = (torch.zeros(8, 8, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, rows, rows, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class Weight:
    """A matrix (M, N) as the products of one forward pass and its backward passes take it.

    `traced` is what autograd follows to the parameter; `rounded` is the same in the dtype of the products.
    """

    def __init__(self, parameter: Tensor, rounded: Tensor) -> None:
        self.rounded = rounded
        self.sum = GradientSum(parameter)
        self.traced: Tensor = _Traced.apply(parameter, self.sum)

    @classmethod
    def of(cls, weight: Tensor | Weight, dtype: torch.dtype) -> Weight:
        """A matrix for products of this dtype; one that is shared already is returned as it is."""
        return weight if isinstance(weight, Weight) else cls(weight, weight.detach().to(dtype))


class SharedWeights:
    """The matrices that all visits of a pass share."""

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        listed = [p for p in parameters if p.dim() == 2]
        rounded = [p.detach() if p.dtype == dtype else torch.empty_like(p, dtype=dtype) for p in listed]
        if copied := [(r, p.detach()) for r, p in zip(rounded, listed, strict=True) if r.dtype != p.dtype]:
            torch._foreach_copy_([r for r, _ in copied], [p for _, p in copied])
        self._of = {id(p): Weight(p, r) for p, r in zip(listed, rounded, strict=True)}

    def of(self, parameter: Tensor) -> Weight:
        """Raises KeyError for one that was not named."""
        return self._of[id(parameter)]


class GradientSum:
    """The gradient of one matrix while a backward pass goes on, (M, N) in the parameter's dtype."""

    def __init__(self, parameter: Tensor) -> None:
        self._like = parameter.detach()
        self._sum: Tensor | None = None
        self._task = -1  # the backward pass that it belongs to: one that was given up leaves a part

    def buffer(self) -> tuple[Tensor, bool]:
        """Where the next product adds to, and whether it is the first: then nothing stands there yet."""
        task = torch._C._current_graph_task_id()
        begins = self._sum is None or self._task != task
        if begins:
            self._sum, self._task = torch.empty_like(self._like, memory_format=torch.contiguous_format), task
        assert self._sum is not None
        return self._sum, begins

    def take(self) -> Tensor | None:
        """The sum of this backward pass, which is then forgotten; None where no product added to it."""
        found, self._sum = self._sum, None
        return found if self._task == torch._C._current_graph_task_id() else None


class _Traced(torch.autograd.Function):
    """The identity. Its gradient is what the products have added up; they pass none on themselves.

    Autograd comes here once all of them are through.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, total: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.total.take(), None


def gemm(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, N) weight (M, N)^T -> (T, M)."""
    return torch.mm(rows, weight.T)


def gemm_rows_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (T, N) of `gemm` to its rows, given that of its result (T, M)."""
    return torch.mm(grad, weight)


def gemm_weight_backward_(total: Tensor, begins: bool, grad: Tensor, rows: Tensor) -> None:
    """Add the gradient of `gemm` to its weight, grad (T, M)^T rows (T, N), to `total` (M, N).

    Where the sum `begins`, what stands in `total` is not read. Rounded once where torch has a product that adds to
    float32; else the product is rounded to the dtype of the rows before it is added.
    """
    beta = 0 if begins else 1
    if rows.dtype == total.dtype:
        torch.addmm(total, grad.T, rows, beta=beta, out=total)
    elif rows.is_cuda and _adds_to_float32(rows.device):
        torch.addmm(total, grad.T, rows, out_dtype=total.dtype, beta=beta, out=total)
    elif begins:
        total.copy_(torch.mm(grad.T, rows))
    else:
        total += torch.mm(grad.T, rows)
