"""Choosing the next token from rows of logits: the options, the samplers (csrc/engine/sampler.h), their reference.

Imports no torch. Shapes: S sequences, V vocabulary. Scores are float64 (V); a token that a filter removed has the
score -inf.
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

Scores = NDArray[np.float64]


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
        require(_is_number(self.temperature) and self.temperature >= 0, "temperature", "0 or more", self.temperature)
        if self.top_k is not None:
            require(is_integer(self.top_k) and self.top_k >= 1, "top_k", "a whole number of at least 1", self.top_k)
        if self.top_p is not None:
            require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        if self.min_p is not None:
            require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        penalty = self.repetition_penalty
        require(_is_number(penalty) and penalty > 0, "repetition_penalty", "above 0 (1 is none)", penalty)
        if self.seed is not None:
            require(is_integer(self.seed) and self.seed >= 0, "seed", "a whole number of at least 0", self.seed)
            require(self.seed < 1 << 64, "seed", "a whole number below 2**64", self.seed)


class Sampler:
    """Draws the tokens of one request. Its n-th draw depends on seed and n alone, whatever runs beside it."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.core = _C.Sampler(
            temperature=sampling.temperature,
            top_k=min(sampling.top_k or 0, (1 << 63) - 1),
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            seed=secrets.randbits(64) if sampling.seed is None else int(sampling.seed),
            prompt=prompt if sampling.repetition_penalty != 1 else (),
        )


def sample(samplers: Sequence[Sampler], logits: NDArray[np.float32]) -> list[int]:
    """The next token of each sampler from its row of logits (S, V); on equal scores the lowest id wins.

    Raises ArithmeticError when the largest of a row is NaN or infinite; then no token counts as drawn.
    """
    tokens: list[int] = _C.sample([sampler.core for sampler in samplers], logits)
    return tokens


class SamplerRef:
    """The specification of `Sampler` in numpy, random numbers included: the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._seen = set(prompt)
        self._seed = secrets.randbits(64) if sampling.seed is None else int(sampling.seed)
        self._draws = 0

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token from logits (V)."""
        sampling = self._sampling
        scores = logits.astype(np.float64)
        if sampling.repetition_penalty != 1:
            scores = penalize(scores, self._seen, sampling.repetition_penalty)
        token = int(scores.argmax())
        if not math.isfinite(scores[token]):
            raise ArithmeticError(f"the model's logits are not finite: {scores[token]} for token {token}")
        if sampling.temperature > 0:
            token = self._draw(scores, scores[token])
        self._seen.add(token)
        self._draws += 1
        return token

    def _draw(self, scores: Scores, best: float) -> int:
        sampling = self._sampling
        with np.errstate(over="ignore"):  # towards -inf, which is what a tiny temperature means
            scores = (scores - best) / sampling.temperature
        if sampling.top_k is not None:
            scores = keep_top_k(scores, sampling.top_k)
        if sampling.top_p is not None:
            scores = keep_top_p(scores, sampling.top_p)
        if sampling.min_p is not None:
            scores = keep_min_p(scores, sampling.min_p)
        weights = np.exp(scores)
        kept = np.flatnonzero(weights)
        cumulative = weights[kept].cumsum()
        # numpy's generator counts up before it draws: this is the number of counter draws + 1, key seed.
        uniform = np.random.Generator(np.random.Philox(counter=self._draws, key=self._seed)).random()
        index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        return int(kept[min(index, len(kept) - 1)])


def penalize(scores: Scores, seen: set[int], penalty: float) -> Scores:
    """Divide positive scores of seen tokens by the penalty, multiply negative ones (arXiv 1909.05858, section 4.1)."""
    scores = scores.copy()
    ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
    chosen = scores[ids]
    scores[ids] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
    return scores


def keep_top_k(scores: Scores, k: int) -> Scores:
    """Keep the k largest scores, and whatever equals the k-th (arXiv 1805.04833)."""
    if k >= len(scores):
        return scores
    return np.where(scores < np.partition(scores, -k)[-k], -np.inf, scores)


def keep_top_p(scores: Scores, p: float) -> Scores:
    """Keep the fewest most probable tokens whose mass reaches p (arXiv 1904.09751); on ties lower ids go first."""
    if p == 1:
        return scores
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order] - scores[order[0]])
    mass_before = np.concatenate([[0.0], weights.cumsum()[:-1]])
    scores = scores.copy()
    scores[order[mass_before >= p * weights.sum()]] = -np.inf
    return scores


def keep_min_p(scores: Scores, p: float) -> Scores:
    """Keep tokens at least p times as probable as the most probable one (arXiv 2407.01082)."""
    return np.where(np.exp(scores - scores.max()) < p, -np.inf, scores)


def require(ok: bool, name: str, expected: str, value: object) -> None:
    """Raise the ValueError that names an argument, what it must be, and what came."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_integer(value: object) -> bool:
    """Whether it is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
