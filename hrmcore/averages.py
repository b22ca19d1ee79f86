"""Averages of weights in another dtype than theirs, and weights that stand back for their averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK = 1 << 20  # numbers of an average that are rounded together


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def move_rounded(
    numbers: Sequence[int], parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]], share: float
) -> None:
    """Averages in bfloat16 after a step: ema += share (p − ema) in float32, then rounded at random to bfloat16.

    The draws depend on a parameter's number and its step alone: a resumed run draws what an uninterrupted one draws.
    """
    for number, parameter, state in zip(numbers, parameters, states, strict=True):
        generator = torch.Generator(parameter.device).manual_seed((int(state["step"]) << 24) ^ number)
        weights, averages = local(parameter.detach()).flatten(), local(state["ema"]).view(-1)
        for p, average in zip(weights.split(_CHUNK), averages.split(_CHUNK), strict=True):
            wide = average.float()
            round_at_random(wide.add_(p - wide, alpha=share), average, generator)


def round_at_random(wide: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Write float32 numbers as bfloat16, each up or down with the odds at which the mean is right; `wide` is spoilt.

    A number between two of bfloat16, which lie 2^16 bit patterns apart, takes the larger one with the odds of its lower
    16 bits over 2^16. What is not finite stays so.
    """
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    noise.mul_(wide.isfinite())
    wide.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    out.copy_(wide)


@contextlib.contextmanager
def exchanged(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Of (weights, average) pairs, the weights are their average inside; afterwards both are as before, to the bit.

    Averages of the weights' dtype hold the weights meanwhile; those of another have no room for them, which takes
    memory.
    """
    alike = [pair for pair in pairs if pair[1].dtype == pair[0].dtype]
    others = [
        (weights, average, weights.detach().clone()) for weights, average in pairs if average.dtype != weights.dtype
    ]
    _swap(alike)
    _copy([(weights, average) for weights, average, _ in others])
    try:
        yield
    finally:
        _swap(alike)
        _copy([(weights, kept) for weights, _, kept in others])


@torch.no_grad()
def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        a.copy_(b)


@torch.no_grad()
def _swap(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
