"""When a run that no longer gets better ends, and which of its steps was the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The best validation so far and how many have passed since; off where `patience` is 0.

    `step` and `loss` are those of the best validation, -1 and infinity before the first.
    """

    patience: int
    step: int = -1
    loss: float = math.inf
    waited: int = 0

    def judge(self, step: int, loss: float) -> bool:
        """Take note of a validation; whether it is the best so far. A loss that is NaN is not."""
        if loss < self.loss:
            self.step, self.loss, self.waited = step, loss, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations were no better than the best before them."""
        return 0 < self.patience <= self.waited

    @property
    def best(self) -> int | None:
        """The step whose state is kept and exported; None where the last one is."""
        return self.step if self.patience and self.step >= 0 else None

    def metadata(self) -> dict[str, str]:
        """What a training state carries."""
        if self.best is None:
            return {}
        return {"best": json.dumps({"step": self.step, "heldout_loss": self.loss, "waited": self.waited})}

    @classmethod
    def read(cls, patience: int, metadata: Mapping[str, str]) -> EarlyStopping:
        """Where a state's run stood; at the beginning where it had no patience."""
        if not patience or "best" not in metadata:
            return cls(patience)
        best = json.loads(metadata["best"])
        return cls(patience, best["step"], best["heldout_loss"], best["waited"])
