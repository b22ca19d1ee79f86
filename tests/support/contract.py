"""What every op owes: checks that take any op and any arguments of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from support.oracle import FRAME, framed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Case = dict[str, Any]
CONSTANT = ("table",)  # floating operands that get no gradient
Results = dict[str, Tensor]


def differentiable(case: Case) -> list[str]:
    """The operands of an op that must get a gradient."""
    return [
        name for name, x in case.items() if isinstance(x, Tensor) and x.is_floating_point() and name not in CONSTANT
    ]


def exact(case: Case) -> Case:
    """The same arguments in float64."""
    return case | {name: case[name].double() for name in differentiable(case)}


def differentiate(
    op: Callable[..., Any],
    case: Case,
    place: Callable[[Tensor], Tensor] = torch.clone,
    rounded_to: torch.dtype | None = None,
) -> Results:
    """The op's outputs, by number, and its gradients, by operand.

    `place` says where the operands lie in memory, `rounded_to` the dtype of the gradients that come back, other than
    that of the outputs.
    """
    leaves = {name: place(case[name]).detach().requires_grad_() for name in differentiable(case)}
    constants = {name: place(case[name]) for name in CONSTANT if name in case}
    outputs = op(**(case | constants | leaves))
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(rounded_to or out.dtype).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [place(g) if g.dim() else g for g in grads])
    return {str(i): out.detach() for i, out in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))


class Outputs:
    """The outputs that ops allocate: NaNs in a frame of one number, so that missed and stray writes show."""

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        inside = framed(torch.full(tuple(shape), torch.nan, dtype=dtype), FRAME)
        buffer = inside.new_tensor(()).set_(inside.untyped_storage())
        self.made.append((buffer, inside))
        return inside

    def all_written(self) -> bool:
        """True when every element of every output was written, and nothing beside them."""
        for buffer, inside in self.made:
            written = inside.detach()
            if written.isnan().any():
                return False
            written.fill_(FRAME)
            if not (buffer == FRAME).all():
                return False
        return True


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[Outputs]:
    """Whatever an op allocates in this context is one of `Outputs`."""
    outputs = Outputs()

    def new_empty(x: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        return outputs.make(shape[0] if isinstance(shape[0], Sequence) else shape, dtype or x.dtype)

    def empty_like(x: Tensor) -> Tensor:
        return outputs.make(x.shape, x.dtype)

    with mock.patch.object(Tensor, "new_empty", new_empty), mock.patch.object(torch, "empty_like", empty_like):
        yield outputs


class Calls(TorchDispatchMode):
    """The calls of our torch.library ops in this context: (op, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hrmcore":
            self.made.append((func, tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))
