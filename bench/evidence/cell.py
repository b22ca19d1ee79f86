"""One cell of a claim: a training run that goes as far as it is asked to, and on from there when it is asked again.

It is hrmcore's own trainer. A cell ends at the first validation at or past its target, when its deadline has passed,
or when it has nothing more to say: SOLVED of the held-out answers are right at two validations in a row, or it has left
the plateau (LEFT of the answers were right) and PATIENT validations have brought no better loss. What was reached then
stands for everything behind it. Rate and horizon are constant after the warm-up, so a run of t steps is the beginning
of every longer one, and a cell that is stopped or killed anywhere gives the curve of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hrmcore.durable import replacing
from hrmcore.train.run_file import TrainConfig
from hrmcore.train.trainer import Trainer

SOLVED, LEFT, PATIENT = 0.995, 0.05, 20
STEPS = 1 << 30  # a run file needs a number: no cell comes so far

Cost = Callable[[TrainConfig, dict[str, float]], float]  # FLOPs of a step that are not the model's, from its metrics


def no_cost(config: TrainConfig, row: dict[str, float]) -> float:
    """A step costs the model's FLOPs alone."""
    return 0.0


@dataclass
class Curve:
    """What a run's validations found, by what had been spent; `failed` says why it became no number."""

    step: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the steps; other programs' share included
    loss: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    failed: str = ""

    def spent(self, axis: str) -> float:
        """At the last validation."""
        return max(getattr(self, axis), default=0.0)

    @property
    def ended(self) -> bool:
        """Whether going on would say nothing more; see the module."""
        if self.failed or (len(self.exact) > 1 and min(self.exact[-2:]) >= SOLVED):
            return True
        since = len(self.loss) - 1 - self.loss.index(min(self.loss)) if self.loss else 0
        return since >= PATIENT and max(self.exact) >= LEFT

    def reaches(self, axis: str, target: float) -> bool:
        """Whether its value at the target is known."""
        return self.ended or self.spent(axis) >= target

    def at(self, axis: str, target: float, key: str) -> float:
        """Loss or exact at a spend, by a straight line between validations; behind an end, what stood at the end.

        Raises ValueError where that is not known.
        """
        if not self.reaches(axis, target):
            raise ValueError(f"the run has come to {self.spent(axis):g}, not to {target:g}")
        across, values = getattr(self, axis), getattr(self, key)
        if self.failed:
            return math.inf if key == "loss" else 0.0
        for index, spent in enumerate(across):
            if spent >= target:
                if index == 0:
                    return float(values[0])
                share = (target - across[index - 1]) / (spent - across[index - 1])
                return float(values[index - 1] + share * (values[index] - values[index - 1]))
        return float(values[self.loss.index(min(self.loss))])  # of the best validation

    def reached(self, axis: str, loss: float) -> float | None:
        """The spend at which the loss first was so low, by a straight line between validations; None: never."""
        for index, value in enumerate(self.loss):
            if value <= loss:
                across = getattr(self, axis)
                if index == 0:
                    return float(across[0])
                share = (self.loss[index - 1] - loss) / (self.loss[index - 1] - value)
                return float(across[index - 1] + share * (across[index] - across[index - 1]))
        return None


def curve_of(folder: Path, config: TrainConfig, cost: Cost = no_cost) -> Curve:
    """What stands in a run's folder; an empty curve where there is none."""
    curve, totals = Curve(), {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
    for row in _rows(folder / "metrics.jsonl"):
        totals["flops"] += row["flops"] + cost(config, row)
        totals["tokens"] = row["tokens_seen"]
        totals["seconds"] += row["tokens"] / row["tokens_per_second"]
        if "heldout_loss" in row:
            curve.step.append(row["step"])
            curve.loss.append(row["heldout_loss"])
            curve.exact.append(row.get("heldout_exact", 0.0))
            for key, value in totals.items():
                getattr(curve, key).append(value)
    if (fault := folder / "failed.txt").is_file():
        curve.failed = fault.read_text(encoding="utf-8")
    return curve


def _rows(metrics: Path) -> list[dict[str, float]]:
    """The figures of all steps; a killed run's last line may be half."""
    if not metrics.is_file():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def folder_of(out: Path, name: str, config: TrainConfig) -> Path:
    """A run's folder: its name for people, and a checksum of all that its curve depends on."""
    settled = replace(config, out="", save_every=1, keep=1)
    digest = hashlib.sha256(json.dumps(asdict(settled), sort_keys=True, default=str).encode()).hexdigest()[:8]
    safe = "".join(letter if letter.isalnum() or letter in ".+=-" else "_" for letter in name)
    return out / "runs" / f"{safe}-{digest}"


class CellTrainer(Trainer):
    """The trainer, which ends where its cell does; `why` says what ended it."""

    def __init__(self, config: TrainConfig, axis: str, target: float, deadline: float, cost: Cost = no_cost) -> None:
        self._axis, self._target, self._deadline, self._cost = axis, target, deadline, cost
        self.why = ""
        super().__init__(config)
        self._curve = curve_of(self.out, config, cost)
        self._flops = self._curve.spent("flops")
        known = self._curve.step[-1] if self._curve.step else 0
        for row in _rows(self.out / "metrics.jsonl"):
            if row["step"] > known:
                self._flops += row["flops"] + cost(config, row)

    def run(self) -> None:
        """Train to the cell's end, with a state there. Raises KeyboardInterrupt when someone else ended it."""
        try:
            super().run()
        except KeyboardInterrupt:
            if not self.why:
                raise

    def evaluate(self) -> dict[str, float]:
        """As the trainer's; ends the run where the cell ends."""
        found = super().evaluate()
        curve = self._curve
        curve.step.append(self.step)
        curve.flops.append(self._flops)
        curve.loss.append(found["heldout_loss"])
        curve.exact.append(found.get("heldout_exact", 0.0))
        if curve.ended:
            self._end("nothing more to say")
        elif curve.spent(self._axis) >= self._target:
            self._end("target")
        return found

    def _train_step(self) -> dict[str, float]:
        metrics = super()._train_step()
        self._flops += metrics["flops"] + self._cost(self.config, metrics)
        if time.monotonic() > self._deadline:
            self._end("deadline")
        return metrics

    def _end(self, why: str) -> None:
        self.why = self.why or why
        self._interruption.asked.set()


def train(
    trainer: type[CellTrainer], config: TrainConfig, axis: str, target: float, deadline: float, cost: Cost = no_cost
) -> Curve:
    """Bring a cell to its target, or as far as the deadline lets it; what stands in its folder then."""
    folder = Path(config.out)
    curve = curve_of(folder, config, cost)
    if curve.reaches(axis, target):
        return curve
    try:
        trainer(config, axis, target, deadline, cost).run()
    except FloatingPointError as error:
        with replacing(folder / "failed.txt") as [temporary]:
            temporary.write_text(str(error), encoding="utf-8")
    return curve_of(folder, config, cost)
