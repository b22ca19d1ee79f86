"""95% intervals of a mean over few seeds, and of the mean difference of pairs with the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# Student's t at 0.975 for 1 to 12 degrees of freedom (any textbook's table); a study has no more seeds.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
MOST_SEEDS = len(T975) + 1

Interval = dict[str, float | None]


def of_mean(values: Sequence[float]) -> Interval:
    """The mean and Student's interval around it: mean ± t s / √n; of one value, or where one is infinite, no interval.

    Raises ValueError without a value, and on more than 13.
    """
    n = len(values)
    if not 1 <= n <= MOST_SEEDS:
        raise ValueError(f"an interval is of 1 to {MOST_SEEDS} values, got {n}")
    mean = fmean(values)
    if n == 1 or not math.isfinite(mean):
        return {"mean": mean, "low": None, "high": None}
    half = T975[n - 2] * stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def of_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of ours minus theirs, seed by seed: what the seeds have in common, data and order, does not widen it."""
    return of_mean([a - b for a, b in zip(ours, theirs, strict=True)])


def within(found: Interval, least: float, most: float) -> Interval:
    """The same interval of what cannot be less or more: Student's knows nothing of that, and is wide with few seeds."""
    if found["low"] is None or found["high"] is None:
        return found
    return {**found, "low": max(found["low"], least), "high": min(found["high"], most)}


def shown(found: Interval, form: str = "{:.3f}") -> str:
    """Such as 0.812 (0.790 to 0.834)."""
    mean = form.format(found["mean"])
    if found["low"] is None:
        return mean
    return f"{mean} ({form.format(found['low'])} to {form.format(found['high'])})"
