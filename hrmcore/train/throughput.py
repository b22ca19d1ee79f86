"""What a run costs: memory and FLOPs before it starts, tokens a second and model FLOPs utilization of every step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from hrmcore import machine, planner
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.data.records import Corpus
from hrmcore.distributed.world import World
from hrmcore.growth.stages import GrowthSchedule
from hrmcore.train.run_file import TrainConfig


class Throughput:
    """The speed of a run's steps, and the share of all ranks' peak FLOP/s that they reach (MFU)."""

    def __init__(self, world: World, precision: str) -> None:
        self._world = world
        self._precision = precision

    def of(self, model: HRMConfig, horizon: int, batches: Sequence[PackedBatch], seconds: float) -> dict[str, float]:
        """The figures of one step over the batches of all ranks, as the metrics name them."""
        pairs = sum(visible_pairs(batch, model.prefix_lm) for batch in batches)
        flops = planner.training_flops(model, horizon, tokens_of(batches), supervised_of(batches), pairs)
        return {
            "tokens_per_second": tokens_of(batches) / seconds,
            "flops": flops.total,
            "mfu": flops.total / seconds / (self._world.ranks * self._peak),
            "memory": machine.peak_memory(self._world.device),
        }

    @functools.cached_property
    def _peak(self) -> float:
        return machine.peak_flops(self._precision, device=str(self._world.device))


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
    supervised = float((corpus.lengths - corpus.prefix + 1).sum() / corpus.lengths.sum())
    tokens = -(-config.batch_tokens // world.ranks)
    holders = world.ranks if config.parallel == "sharded" else 1
    need = planner.memory(largest, config.horizon_last, tokens, supervised, holders, config.precision, config.recompute)
    average = need.weights if config.ema else 0.0
    state = need.weights + need.optimizer + average
    more = "more" if world.device.type == "cpu" else "of main memory"
    return (
        f"{planner.parameters(largest) / 1e6:.2f} M parameters; about {(need.peak + average) / 1e9:.2f} GB at "
        f"a step's peak, torch and the data aside, and {state / 1e9:.2f} GB {more} while a state is written; "
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
