"""What the tests of the optimizers share: parameters and gradients of odd shapes, one optimizer of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hrmcore.optim import AdamAtan2, AdamW, Sophia

SHAPES = [(), (1,), (7, 33), (3, 2, 5), (40_003,)]  # the last is three blocks of work, the third ragged
BATCH_TOKENS = 50

KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SophiaG": (Sophia, {"variant": "G", "lr": 0.01, "betas": (0.9, 0.97), "rho": 0.5, "weight_decay": 0.3}),
    "AdamAtan2": (AdamAtan2, {"lr": 0.01, "weight_decay": 0.3}),
    "AdamAtan2Paper": (AdamAtan2, {"lr": 0.01, "weight_decay": 0.3, "form": "paper"}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-5}),
}


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(step: int) -> list[Tensor]:
    """Of every size between 1e-5 and 1, each coordinate keeping its own, as in a model."""
    sizes = [10 ** (-5 * torch.rand(shape, generator=torch.Generator().manual_seed(9))) for shape in SHAPES]
    return [size * random(shape, 100 + step) for size, shape in zip(sizes, SHAPES, strict=True)]


def parameters() -> list[torch.nn.Parameter]:
    """Small beside what 20 steps move them, so that the error of the movement shows."""
    return [torch.nn.Parameter(random(shape, 1, 0.02)) for shape in SHAPES]


def make(kind: str, params: list[torch.nn.Parameter], **options: Any) -> Any:
    optimizer, defaults = KINDS[kind]
    return optimizer(params, **{**defaults, **options})


def take_step(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    if isinstance(optimizer, Sophia) and step % 4 == 1:
        for p, gradient in zip(params, gradients(-1 - step), strict=True):
            p.grad = gradient
        optimizer.update_hessian()
    for p, gradient in zip(params, gradients(step), strict=True):
        p.grad = gradient
    optimizer.step(**({"batch_tokens": BATCH_TOKENS} if isinstance(optimizer, Sophia) else {}))


def relative_error(out: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Of all tensors as one vector: one number alone may have cancelled to nearly nothing. A NaN counts as inf."""
    assert [x.shape for x in out] == [x.shape for x in reference]
    a, b = (torch.cat([x.detach().double().flatten() for x in side]) for side in (out, reference))
    error = (a - b).norm() / b.norm()
    return math.inf if error.isnan() else error.item()


def tensors(optimizer: Any, params: list[torch.nn.Parameter]) -> list[Tensor]:
    """Everything that an optimizer changes, copied."""
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]
