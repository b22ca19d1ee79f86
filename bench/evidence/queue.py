"""Which cell comes next: the same successive halving for every arm, then the seeds; what is known decides, not when.

Every arm has the same number of candidates. All are run to the first rung with seed 0; the better half (rounded up, by
held-out loss) goes on to the next, and the one that is left goes to the last rung with every seed. Cells of a rung come
candidate by candidate, arms in turn, and the last rung seed by seed: wherever a claim is cut short, its arms have been
treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One run: an arm, which of its candidates, the seed, and the rung up to which it goes."""

    arm: str
    candidate: int
    seed: int
    rung: int


Known = Callable[[Cell], float | None]  # the held-out loss of a cell; None: not run yet


@dataclass(frozen=True)
class Rule:
    """What is run. Raises ValueError where halving would not come down to one candidate before the last rung."""

    arms: tuple[str, ...]
    candidates: int
    rungs: int
    seeds: int

    def __post_init__(self) -> None:
        if self.width(self.rungs - 1) != 1:
            raise ValueError(f"{self.candidates} candidates are more than {self.rungs} rungs halve down to one")

    def width(self, rung: int) -> int:
        """How many candidates of an arm come to a rung."""
        return math.ceil(self.candidates / 2**rung)

    def survivors(self, arm: str, rung: int, known: Known) -> list[int] | None:
        """The candidates that come to a rung, the best first; None while the rung before is not complete."""
        if rung == 0:
            return list(range(self.candidates))
        before = self.survivors(arm, rung - 1, known)
        losses = {which: known(Cell(arm, which, 0, rung - 1)) for which in before or ()}
        if before is None or None in losses.values():
            return None
        return sorted(before, key=lambda which: (losses[which], which))[: self.width(rung)]

    def next_cell(self, known: Known) -> Cell | None:
        """What to run next; None when all is known."""
        for rung in range(self.rungs):
            last = rung == self.rungs - 1
            alive = {arm: self.survivors(arm, rung, known) for arm in self.arms}
            for number in range(self.seeds if last else self.width(rung)):
                for arm, chosen in alive.items():
                    if chosen is None:  # cannot be: the rung before is complete, or a cell of it has been returned
                        raise AssertionError(f"{arm}: rung {rung} came before the one below it")
                    cell = Cell(arm, chosen[0], number, rung) if last else Cell(arm, chosen[number], 0, rung)
                    if known(cell) is None:
                        return cell
        return None

    def count(self) -> int:
        """How many cells there are; a run that goes on to a higher rung is one for each."""
        return len(self.arms) * (sum(self.width(rung) for rung in range(self.rungs - 1)) + self.seeds)

    def level(self, known: Known) -> int:
        """The highest rung at which every arm has a value; the lowest while there is none."""
        for rung in reversed(range(self.rungs)):
            if all(self.measured(arm, rung, known) for arm in self.arms):
                return rung
        return 0

    def measured(self, arm: str, rung: int, known: Known) -> dict[int, list[int]]:
        """The candidates with a value at a rung, the best by seed 0 first, and the seeds of each."""
        found: dict[int, list[int]] = {}
        for which in range(self.candidates):
            seeds = [seed for seed in range(self.seeds) if known(Cell(arm, which, seed, rung)) is not None]
            if 0 in seeds:
                found[which] = seeds
        alive = self.survivors(arm, rung, known)
        if alive is not None:  # one that was left behind may have been run so far by an earlier rule
            found = {which: seeds for which, seeds in found.items() if which in alive}
        losses = {which: known(Cell(arm, which, 0, rung)) for which in found}
        return {which: found[which] for which in sorted(found, key=lambda which: (losses[which], which))}
