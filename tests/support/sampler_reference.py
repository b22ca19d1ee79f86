"""The specification of `hrmcore.engine.sampling.Sampler` in numpy, random numbers included.

Shapes: V vocabulary. Scores are float64 (V); a token that a filter removed has the score -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hrmcore.engine.sampling import Sampling

Scores = NDArray[np.float64]


class SamplerRef:
    """Draws the tokens of one request: with the same seed, those that `Sampler` draws."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._seen = set(prompt)
        self._seed = sampling.seed or 0
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
        # numpy adds 1 to the counter before it draws: draw n, from 0, uses counter n + 1 and key seed.
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
