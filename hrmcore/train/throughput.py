"""What a run costs: memory and FLOPs before it starts, tokens a second and model FLOPs utilization of every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hrmcore import machine, planner
from hrmcore.config import HRMConfig, LoraConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.data.records import Corpus
from hrmcore.distributed.world import World
from hrmcore.growth.stages import GrowthSchedule
from hrmcore.train.run_file import TrainConfig


class Throughput:
    """The speed of a run's steps, and the share of all ranks' peak FLOP/s that they reach (MFU).

    The peak is the best of several measurements: one may fall into a moment in which other programs want the
    processor. It is taken again at the steps 1, 2, 4, 8, … and whenever a step seems faster than it.
    """

    def __init__(self, world: World, precision: str, lora: LoraConfig | None = None) -> None:
        self._world = world
        self._precision = precision
        self._lora = lora
        self._steps = 0
        self._peak = 0.0

    def of(self, model: HRMConfig, horizon: int, batches: Sequence[PackedBatch], seconds: float) -> dict[str, float]:
        """The figures of one step over the batches of all ranks, as the metrics name them."""
        pairs = sum(visible_pairs(batch, model.prefix_lm) for batch in batches)
        counts = tokens_of(batches), supervised_of(batches), pairs
        flops = planner.training_flops(model, horizon, *counts, self._lora)
        rate = flops.total / seconds / self._world.ranks
        return {
            "tokens_per_second": tokens_of(batches) / seconds,
            "flops": flops.total,
            "mfu": rate / self._peak_beside(rate),
            "memory": machine.peak_memory(self._world.device),
        }

    def _peak_beside(self, rate: float) -> float:
        """The peak of a rank, after a step of `rate` FLOP/s; a step that was faster than any measurement is one."""
        self._steps += 1
        power_of_two = self._steps & (self._steps - 1) == 0
        if power_of_two or rate > self._peak:
            measured = machine.peak_flops(self._precision, device=str(self._world.device))
            self._peak = max(self._peak, measured, rate)
        return self._peak


def tokens_of(batches: Sequence[PackedBatch]) -> int:
    """Input tokens of the batches' records, without the sequence that fills a batch up."""
    return sum(int(batch.offsets[len(batch.records)]) for batch in batches)


def supervised_of(batches: Sequence[PackedBatch]) -> int:
    """Tokens of the batches that are predicted."""
    return sum(len(batch.targets) for batch in batches)


def visible_pairs(batch: PackedBatch, prefix_lm: bool) -> float:
    """(query, key) pairs that attention sees in a batch: key j is visible to query i iff j < max(prefix, i + 1)."""
    count = len(batch.records)
    lengths = np.diff(batch.offsets[: count + 1].numpy()).astype(np.float64)
    prefix = batch.prefix[:count].numpy().astype(np.float64) * prefix_lm
    response = lengths - prefix
    return float((prefix**2 + response * prefix + response * (response + 1) / 2).sum())


def memory_needed(config: TrainConfig, largest: HRMConfig, corpus: Corpus, world: World) -> str:
    """One line on the memory of a step of the run's `largest` model, to be said before any of it is allocated."""
    adapters = planner.adapter_parameters(largest, config.lora) if config.lora else 0
    trained = f", and {adapters / 1e6:.2f} M of adapters, which alone are trained" if adapters else ""
    supervised = float((corpus.lengths - corpus.prefix + 1).sum() / corpus.lengths.sum())
    tokens = -(-config.batch_tokens // world.ranks)
    holders = world.ranks if config.parallel == "sharded" else 1
    of_step = largest, config.horizon_last, tokens, supervised
    if config.lora:
        need = planner.adapted_memory(*of_step, config.precision, config.lora)
    else:
        need = planner.memory(*of_step, holders, config.precision, config.recompute)
    average = (2.0 if config.ema_dtype == "bfloat16" else 4.0) if config.ema else 0.0
    state, averages = need.state(average), need.state(average) - need.state(0.0)
    # A shard is copied where it lies; what one GPU holds goes to main memory, which is kept for the next state.
    in_main = world.device.type == "cuda" and config.parallel != "sharded"
    when = "of main memory from the first state on" if in_main else "more while a state is written"
    return (
        f"{planner.parameters(largest) / 1e6:.2f} M parameters{trained}; about {(need.peak + averages) / 1e9:.2f} GB "
        f"at a step's peak, torch and the data aside, and {state / 1e9:.2f} GB {when}; "
        f"{machine.available_memory(world.device) / 1e9:.2f} GB are free"
    )


def growth_flops(config: TrainConfig, growing: GrowthSchedule, corpus: Corpus) -> tuple[float, float]:
    """FLOPs of the run with its growths, and of its last model from scratch over the same tokens.

    Raises ValueError when a stage would come after the run's end.
    """
    prompt = float(corpus.prefix.mean())
    record = planner.Record(prompt, float(corpus.lengths.mean()) - prompt)
    course = planner.Horizon(config.horizon_first, config.horizon_last, config.horizon_fraction)
    return growing.flops(config.steps * config.accumulate * config.batch_tokens, record, course)
