"""`[[grow]]`: a run that begins small and grows on its way. The stages, and where a run stands among them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrmcore import optim, planner
from hrmcore.config import HRMConfig
from hrmcore.gpus import GPUS
from hrmcore.growth.operators import SIZES, Growth, growth_under_way, state_metadata
from hrmcore.model import HRM

TOLERANCE = 1e-5  # relative change of the loss on a fixed batch that a growth may make


@dataclass(frozen=True)
class GrowStage:
    """One `[[grow]]` table: from `at_tokens` on, the sizes that are given. The others stay.

    `mode`, `mask_steps` and `interleaved` are those of Growth. Vocabulary and cycles do not grow in a run: the
    vocabulary is the tokenizer's, and more cycles would change the loss.
    """

    at_tokens: int = field(metadata={"explain": "tokens after which the model grows"})
    hidden_size: int | None = field(default=None, metadata={"explain": "the larger width"})
    num_layers_per_stack: int | None = field(default=None, metadata={"explain": "layers of L and of H alike"})
    L_layers: int | None = field(default=None, metadata={"explain": "layers of L alone"})
    H_layers: int | None = field(default=None, metadata={"explain": "layers of H alone"})
    intermediate_size: int | None = field(default=None, metadata={"explain": "more units of the FFN"})
    num_attention_heads: int | None = field(default=None, metadata={"explain": "more heads"})
    warmup_steps: int = field(default=100, metadata={"explain": "steps over which the learning rate rises anew"})
    mode: str = field(
        default="zero",
        metadata={
            "explain": "'zero': new entries begin without effect; 'ramped' (experimental): random ones rise from 0"
        },
    )
    mask_steps: int = field(default=0, metadata={"explain": "steps over which mode ramped rises"})
    interleaved: bool = field(
        default=False, metadata={"explain": "new layers between the old ones, not on top (experimental)"}
    )

    def growth(self, config: HRMConfig, seed: int) -> Growth:
        """From the config before this stage. Raises ValueError where that is not growing."""
        sizes = {name: size for name in SIZES if (size := getattr(self, name, None)) is not None}
        options = {"mode": self.mode, "mask_steps": self.mask_steps, "interleaved": self.interleaved}
        return Growth.of(config, sizes, seed=seed, **options)


def read_stages(tables: Any) -> tuple[GrowStage, ...]:
    """The stages of a run file. Raises ValueError that counts the tables from 1 and names the key."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError("grow must be written as tables, each under [[grow]]")
    stages = []
    for number, table in enumerate(tables, 1):
        fields = {field.name: field for field in dataclasses.fields(GrowStage)}
        if unknown := sorted(set(table) - set(fields)):
            raise ValueError(f"[[grow]] {number}: unknown key {unknown[0]!r}; the keys are {', '.join(fields)}")
        if "at_tokens" not in table:
            raise ValueError(f"[[grow]] {number}: missing key 'at_tokens'")
        for name, value in table.items():
            expected = str(fields[name].type).removesuffix(" | None")
            if type(value).__name__ != expected:
                raise ValueError(f"[[grow]] {number}: {name} must be of type {expected}, got {value!r}")
        stages.append(GrowStage(**table))
    for number, stage in enumerate(stages, 1):
        if stage.warmup_steps < 0:
            raise ValueError(f"[[grow]] {number}: warmup_steps must be at least 0, got {stage.warmup_steps}")
        if stage.at_tokens <= (stages[number - 2].at_tokens if number > 1 else 0):
            raise ValueError(f"[[grow]] {number}: at_tokens must rise from stage to stage, got {stage.at_tokens}")
    return tuple(stages)


def growths_of(stages: Sequence[GrowStage], config: HRMConfig, seed: int) -> list[Growth]:
    """One growth for each stage, each from the config that the one before it ends at. Raises ValueError."""
    growths: list[Growth] = []
    for number, stage in enumerate(stages, 1):
        try:
            growths.append(stage.growth(growths[-1].after if growths else config, seed))
        except ValueError as error:
            raise ValueError(f"[[grow]] {number}: {str(error).removeprefix('grow: ')}") from None
    return growths


class GrowthSchedule:
    """Where a run stands among its stages; `config` is the model's shape now.

    A state's metadata carries all of it, and a resumed run grows as an uninterrupted one does.
    """

    def __init__(self, stages: Sequence[GrowStage], config: HRMConfig, seed: int) -> None:
        self.config = config
        self._first = config
        self._stages = stages
        self._growths = growths_of(stages, config, seed)
        self._grown: list[int] = []  # the steps after which the model grew
        self._ramp: tuple[Growth, int] | None = None  # a growth in mode ramped under way, and the step of its begin

    @property
    def largest(self) -> HRMConfig:
        """The model's shape after the last stage."""
        return self._growths[-1].after if self._growths else self._first

    def due(self, tokens: int) -> bool:
        """Whether the next stage's time has come; one in mode ramped is waited for."""
        number = len(self._grown)
        return self._ramp is None and number < len(self._stages) and tokens >= self._stages[number].at_tokens

    def rate(self, step: int) -> float:
        """What the learning rate of a step, counted from 0, is multiplied by: it rises again after a growth."""
        if not self._grown:
            return 1.0
        warmup = self._stages[len(self._grown) - 1].warmup_steps
        return min(1.0, (step - self._grown[-1] + 1) / warmup) if warmup else 1.0

    def grow(
        self,
        model: HRM,
        optimizer: optim.AdamW | optim.AdamAtan2 | optim.Sophia,
        loss: Callable[[HRM], float],
        step: int,
    ) -> tuple[HRM, optim.AdamW | optim.AdamAtan2 | optim.Sophia, dict[str, float]]:
        """The larger model and its optimizer, and what the metrics say of it; the smaller ones stay as they are.

        `loss` is that of a model on a fixed batch. Raises FloatingPointError, with nothing changed, when it moved by
        more than TOLERANCE.
        """
        growth = self._growths[len(self._grown)]
        bigger = growth.model(model)
        before, after = loss(model), loss(bigger)
        if not abs(after - before) <= TOLERANCE * abs(before):
            raise FloatingPointError(
                f"growing after step {step} moved the loss on a fixed batch from {before:.7g} to {after:.7g}, by more "
                f"than {TOLERANCE:g} of it; the run stops, and the state before the growth is intact"
            )
        larger = growth.optimizer(optimizer, model, bigger)
        self._grown.append(step)
        self.config = growth.after
        self._ramp = (growth, step) if growth.mask_steps else None
        report = {"grown_parameters": planner.parameters(growth.after), "growth_loss_before": before}
        return bigger, larger, report | {"growth_loss_after": after}

    def advance(self, model: HRM, step: int) -> None:
        """After step number `step`, counted from 1: raise the scalar of mode ramped."""
        if self._ramp is None:
            return
        growth, begin = self._ramp
        growth.advance(model, step - begin)
        if step - begin >= growth.mask_steps:
            self._ramp = None

    def metadata(self) -> dict[str, str]:
        """What a training state has to carry."""
        known = {"grown": json.dumps(self._grown), "model_config": json.dumps(self.config.to_dict())}
        return known if self._ramp is None else known | state_metadata(*self._ramp)

    def resume(self, metadata: Mapping[str, str]) -> None:
        """Stand where a training state stood. Raises ValueError when the stages that it has behind it are others."""
        grown: list[int] = json.loads(metadata.get("grown", "[]"))
        shapes = [self._first, *(growth.after for growth in self._growths)]
        reached = shapes[min(len(grown), len(self._growths))]
        elsewhere = grown and HRMConfig.from_dict(json.loads(metadata["model_config"])) != reached
        if len(grown) > len(self._growths) or elsewhere:
            raise ValueError(
                f"its model has grown {len(grown)} times, to a shape that the run file does not reach by then; "
                "[model] and what is behind in [[grow]] must stay as they were"
            )
        self._grown, self._ramp = grown, growth_under_way(metadata)
        self.config = shapes[len(grown)]

    def flops(self, tokens: float, record: planner.Record, horizon: planner.Horizon) -> tuple[float, float]:
        """Training FLOPs of the whole schedule, and of the last stage's model from scratch, over so many tokens.

        Raises ValueError when a stage would come after the run's end.
        """
        starts = [0, *(stage.at_tokens for stage in self._stages)]
        if starts[-1] >= tokens:
            raise ValueError(f"[[grow]]: at_tokens {starts[-1]} comes after the run's end, at most {tokens:.0f} tokens")
        shapes = [self._first, *(growth.after for growth in self._growths)]
        stages = [
            planner.Stage(start, str(n), shape) for n, (start, shape) in enumerate(zip(starts, shapes, strict=True))
        ]
        budget = planner.Budget(tokens, GPUS["H100"], record=record, horizon=horizon)
        planned = planner.plan(stages, budget)
        return planned.flops.total, planned.from_scratch.total
