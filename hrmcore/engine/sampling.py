"""Choosing the next token from rows of logits: the options, and the samplers of csrc/engine/sampler.h.

Imports no torch. Shapes: S sequences, V vocabulary. Their specification in numpy is tests/support/sampler_reference.py.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from hrmcore import _C

# The natural logarithm of a token's probability: of the one that was drawn, then of the most probable ones.
Scores = list[tuple[int, float]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy, otherwise a draw from what the filters leave.

    The filters apply in the order of the fields, after repetition_penalty and temperature. Raises ValueError on a
    value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        require(is_number(self.temperature) and self.temperature >= 0, "temperature", "0 or more", self.temperature)
        if self.top_k is not None:
            require(is_integer(self.top_k) and self.top_k >= 1, "top_k", "a whole number of at least 1", self.top_k)
        if self.top_p is not None:
            require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        if self.min_p is not None:
            require(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        penalty = self.repetition_penalty
        require(is_number(penalty) and penalty > 0, "repetition_penalty", "above 0 (1 is none)", penalty)
        if self.seed is not None:
            require(is_integer(self.seed) and self.seed >= 0, "seed", "a whole number of at least 0", self.seed)
            require(self.seed < 1 << 64, "seed", "a whole number below 2**64", self.seed)


class Sampler:
    """Draws the tokens of one request. The random number of the n-th draw depends on the seed and n alone."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(64) if sampling.seed is None else int(sampling.seed)
        self.core = _C.Sampler(
            temperature=sampling.temperature,
            top_k=min(sampling.top_k or 0, (1 << 63) - 1),
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            seed=self.seed,
            prompt=prompt if sampling.repetition_penalty != 1 else (),
        )


def sample(samplers: Sequence[Sampler], logits: NDArray[np.float32]) -> list[int]:
    """The next token of each sampler from its row of logits (S, V); on equal scores the lowest id wins.

    Raises ArithmeticError when the largest of a row is NaN or infinite; then no token counts as drawn.
    """
    tokens: list[int] = _C.sample([sampler.core for sampler in samplers], logits)
    return tokens


def score(tokens: Sequence[int], tops: Sequence[int | None], logits: NDArray[np.float32]) -> list[Scores | None]:
    """The log probabilities of tokens drawn from rows of logits (S, V), each with the `top` most probable; None: none.

    They are those of the model: before repetition penalty, temperature and filters.
    """
    found: list[Scores | None] = [None] * len(tokens)
    asked = {row: top for row, top in enumerate(tops) if top is not None}
    if asked:
        rows = list(asked)
        scores = _C.log_probabilities(logits[rows], [tokens[row] for row in rows], list(asked.values()))
        for row, pairs in zip(rows, scores, strict=True):
            found[row] = pairs
    return found


def require(ok: bool, name: str, expected: str, value: object) -> None:
    """Raise the ValueError that names an argument, what it must be, and what came."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_integer(value: object) -> bool:
    """Whether it is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a number that a float64 holds, and finite; True and False are not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False
