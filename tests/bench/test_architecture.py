"""bench/studies/architecture.py at toy size: every cell runs, is run once, and costs what HRM costs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hrmcore.planner import parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench.studies.architecture")


@pytest.mark.slow
def test_cells_are_matched_and_resumed(
    bench: ModuleType,
    tmp_path: Path,
    figures: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench.main([str(tmp_path), "--toy", "--plan"])
    planned = capsys.readouterr().out.splitlines()
    assert len(planned) == 13
    assert planned[-1].startswith("12 runs and ")
    bench.main([str(tmp_path), "--toy"])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert report == json.loads((tmp_path / "architecture.json").read_text())
    assert [axes.get_xlabel() for axes in figures[0].axes] == ["right answers"] * 2 + [
        "held-out loss, nats a token"
    ] * 2
    assert figures[0].get_suptitle().startswith("Most right answers: ")
    assert not list((tmp_path / "work").iterdir())
    cells = {(line["data"], line["architecture"], line["objective"]): line["runs"] for line in report["lines"]}
    assert len(cells) == len(report["lines"]) == 2 * (4 + 3 - 1)
    for line in report["lines"]:
        for run in line["runs"]:
            assert 0 <= run["exact"] <= 1
            assert 0 < run["heldout_loss"] < 20
            # A step is the smallest unit, and a batch is now and then less full than the mean one.
            assert abs(run["flops"] / line["budget"] - 1) < 0.15 + 1 / run["steps"]
        assert f"| {line['architecture']} |" in printed or f"| {line['objective']} |" in printed
    for data in bench.DATA:
        hrm, once = (cells[data, name, bench.PUBLISHED][0] for name in ("HRM", "Transformer"))
        assert once["tokens"] > 2 * hrm["tokens"]
        losses = [cells[data, "HRM", name][0]["heldout_loss"] for name in bench.OBJECTIVES]
        assert len(set(losses)) == 3

    monkeypatch.setattr(bench, "Trainer", lambda *_: pytest.fail("a finished run ran again"))
    bench.main([str(tmp_path), "--toy"])
    assert capsys.readouterr().out.split("##", 1)[1] == printed.split("##", 1)[1]


@pytest.mark.slow
def test_a_sweep_takes_each_cells_best_rate_to_the_other_seeds(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With results made up: the loss is least at a rate that depends on the cell."""
    ran = []

    def made_up(run: object, _: object) -> dict[str, object]:
        best = 1e-3 if run.cell.architecture == "TRM" else 4e-3  # type: ignore[attr-defined]
        ran.append((run.cell, run.rate, run.seed))  # type: ignore[attr-defined]
        loss = abs(run.rate - best) + 1  # type: ignore[attr-defined]
        return {"heldout_loss": loss, "exact": 0.5, "flops": 1e9, "tokens": 3000, "seconds": 1.0, "parameters": 7}

    monkeypatch.setattr(bench, "result_of", made_up)
    monkeypatch.setattr(bench, "TOY", bench.TOY | {"seeds": 2})
    bench.main([str(tmp_path), "--toy", "--sweep", "--data", "iq"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {line["architecture"]: line["rate"] for line in report["lines"]} == {
        "HRM": 4e-3,
        "Transformer": 4e-3,
        "looped": 4e-3,
        "TRM": 1e-3,
    }
    assert len(ran) == len(set(ran)) == 6 * (3 + 1)
    assert {(cell.architecture, rate) for cell, rate, seed in ran if seed == 1} == {
        (line["architecture"], line["rate"]) for line in report["lines"]
    }


def test_the_baselines_have_hrms_parameters(bench: ModuleType) -> None:
    for width, least, most in ((64, 0.25e6, 0.4e6), (96, 0.5e6, 0.7e6), (128, 0.9e6, 1.1e6)):
        counts = {
            parameters(bench.Cell(name, bench.PUBLISHED, "iq").config(400, width, 2)) for name in bench.ARCHITECTURES
        }
        assert len(counts) == 1
        assert least < counts.pop() < most
