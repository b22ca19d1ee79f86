"""bench/gpu/train.py and its model: what they say of a step, on the emulator, and when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import train, train_model
from bench.gpu.checks import Here
from bench.gpu.train_model import GOALS, MEASURED, SMALL, Work, before, mix, predict, rows, share
from hrmcore import planner
from hrmcore.config import HRMConfig

XL = HRMConfig.preset("XL")
HERE = Here(True, Path())


@pytest.mark.slow
@pytest.mark.emulated
def test_the_emulated_run_is_right(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "LIMIT", float("inf"))
    assert train.main(["--emulated", "--out", str(tmp_path / "train.json")]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert report == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["right"] is True
    assert report["left_out"] == []
    assert report["faults"] == {}
    assert report["parts"]["right"]["wrong"] == []
    assert report["parts"]["right"]["gradient_error"] <= train.ALLOWED
    assert {name for name in report["parts"] if name.startswith("toy")} == {
        f"toy{word}, K = {horizon}" for word in ("", ", captured") for horizon in (2, 5)
    }


@pytest.mark.emulated
def test_a_wrong_step_is_named(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that differ with what is recomputed, and a captured step with other bits."""
    plain = train.gradients

    def off(here: Here, model: torch.nn.Module, batch: object, recompute: str = "sublayer") -> list[torch.Tensor]:
        found = plain(here, model, batch, recompute)
        return [*found[:-1], found[-1] + 1] if recompute == "visit" else found

    monkeypatch.setattr(train, "gradients", off)
    monkeypatch.setattr(train, "captured_has_the_bits", lambda *_: False)
    found = train.right(HERE)
    assert found["wrong"] == ["same_bits_whatever_is_recomputed", "captured_has_the_bits"]


def test_a_part_that_raises_is_a_fault_and_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("a kernel")

    parts = {"right": lambda: {"wrong": []}, "broken": broken, "after": lambda: {"ms": 1.0}}
    monkeypatch.setattr(train, "parts_of", lambda plan: parts)
    report = train.run(train.plan_for(HERE), float("inf"))
    assert report["faults"] == {"broken": "RuntimeError: a kernel"}
    assert list(report["parts"]) == ["right", "after"]
    assert report["right"] is False


def test_what_there_is_no_time_for_is_named_and_nothing_counts_as_right() -> None:
    report = train.run(train.plan_for(HERE), -1.0)
    assert report["parts"] == {}
    assert "right" in report["left_out"]
    assert report["right"] is False


def test_kernels_are_counted_by_kind() -> None:
    names = [
        ("void hrmcore::cuda::backward_keys_mma<128, true, false>", 2000.0),
        ("void hrmcore::cuda::forward_mma<128, true, false>", 1000.0),
        ("sm90_xmma_gemm_bf16f32_bf16f32", 4000.0),
        ("void hrmcore::cuda::step<(Rule)1, 4>", 500.0),
        ("void at::native::elementwise_kernel", 250.0),
    ]
    assert train.by_kind(names) == {
        "attention backward": 2.0,
        "attention forward": 1.0,
        "products": 4.0,
        "optimizer": 0.5,
        "other": 0.25,
        "other: void at::native::elementwise_kernel": 0.25,
    }


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_terms_are_those_that_a_card_measured() -> None:
    """Nothing is fitted to them: bytes over a copy's bandwidth and FLOPs over a product's rate come out within 25%."""
    modelled = before(XL, mix(), 5)
    assert modelled.keys() == MEASURED.keys()
    for name, ms in MEASURED.items():
        assert modelled[name] == pytest.approx(ms, rel=0.25), name


def test_tiles_are_those_that_the_kernels_visit() -> None:
    """A tile of queries visits the keys up to the last that its last query sees."""
    for length in (1, 35, 64, 65, 130, 297):
        prefix = length // 2
        expected = sum(-(-max(prefix, min(first + 64, length)) // 64) for first in range(0, length, 64))
        assert Work((length,)).tiles == expected
    assert Work((64, 65)).tiles == 1 + 3


def test_more_horizon_or_more_tokens_takes_longer() -> None:
    work = mix()
    two, five = (sum(predict(XL, work, horizon).values()) for horizon in (2, 5))
    assert two < five < 5 / 2 * two
    assert sum(predict(XL, mix(2 * work.tokens), 5).values()) > 1.8 * five


def test_no_step_is_faster_than_its_products() -> None:
    for horizon in (2, 5):
        parts = predict(XL, mix(), horizon)
        assert share(XL, mix(), horizon, parts) < 1
        flops = planner.training_flops(XL, horizon, mix().tokens).total
        assert parts["products"] >= 1e3 * flops / train_model.Card().product


def test_the_table_has_a_line_for_each_goal() -> None:
    assert [row[0] for row in rows()] == [f"{name}, K = {horizon}" for name, horizon in GOALS]
    assert planner.parameters(SMALL) == pytest.approx(2.06e6, rel=0.05)


def test_float8_changes_products_alone_and_none_is_faster_than_assumed() -> None:
    for horizon in (2, 5):
        plain, float8 = predict(XL, mix(), horizon), train_model.with_float8(XL, mix(), horizon)
        assert {name for name in float8 if float8[name] != plain.get(name)} == {"products", "rounded to float8"}
        assert plain["products"] / train_model.Card().float8 < float8["products"] < plain["products"]


def test_a_state_costs_what_a_step_does_not_cover() -> None:
    card, size = train_model.Card(), 16 * planner.parameters(XL)
    assert train_model.state_seconds(XL, mix(), 5) == (size / card.to_pageable, 0.0)
    _, beside = train_model.state_seconds(XL, mix(1000), 2)
    assert 0 < beside < size / card.to_host
