"""The utilisation of a step stands beside a peak that a busy moment cannot spoil."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from hrmcore import machine, planner
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch, pack
from hrmcore.data.records import Corpus
from hrmcore.train.throughput import Throughput, supervised_of, tokens_of, visible_pairs

MODEL = HRMConfig(97, 64, 128, 1, 2, 32, 1, 1, max_position_embeddings=64)


def batch() -> PackedBatch:
    lengths, prefix = np.array([9, 7]), np.array([4, 3])
    corpus = Corpus(np.arange(18, dtype=np.int32), np.array([0, 10, 18]), prefix)
    assert (corpus.lengths == lengths).all()
    return pack(corpus, [0, 1], 16)


def shares(monkeypatch: pytest.MonkeyPatch, peaks: list[float], rates: list[float]) -> tuple[list[float], int]:
    """The utilisation of steps of these FLOP/s where the measurements give `peaks`, and how many were taken."""
    packed = batch()
    pairs = visible_pairs(packed, MODEL.prefix_lm)
    flops = planner.training_flops(MODEL, 2, tokens_of([packed]), supervised_of([packed]), pairs).total
    measured = iter(peaks)
    monkeypatch.setattr(machine, "peak_flops", lambda precision, device: next(measured))
    world = cast(Any, SimpleNamespace(ranks=1, device=torch.device("cpu")))
    throughput = Throughput(world, "float32")
    found = [throughput.of(MODEL, 2, [packed], flops / rate)["mfu"] for rate in rates]
    return found, len(peaks) - len(list(measured))


def test_the_best_of_several_measurements_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found, taken = shares(monkeypatch, [2e9, 8e9, 4e9, 1e9], [1e9] * 9)
    assert found == pytest.approx([1 / 2, *[1 / 8] * 8])
    assert taken == 4, "at steps 1, 2, 4 and 8"


def test_a_share_above_one_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found, taken = shares(monkeypatch, [1e9, 10e9, 10e9, 1e9], [0.5e9, 0.5e9, 5e9, 5e9, 20e9, 10e9])
    assert found[2:] == pytest.approx([0.5, 0.5, 1.0, 0.5]), "the step of 20 GFLOP/s is the best measurement of all"
    assert taken == 4, "at steps 1, 2 and 4, and at the step that seemed too fast"
