"""bench/studies/growth.py in its toy form: it measures what it says, and what is finished is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hrmcore import plots

ROOT = Path(__file__).parents[2]


def run(out: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.studies.growth", "--toy", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((out / "growth.json").read_text()) == report
    return report


@pytest.mark.slow
def test_the_toy_measures_three_arms_and_is_resumed(tmp_path: Path, figures: list[Any]) -> None:
    report = run(tmp_path)
    assert [arm["name"] for arm in report["arms"]] == ["scratch", "grown", "grown, lr factor"]
    arms = report["arms"]
    for arm in arms:
        assert arm["swept"].keys() == {"0.001", "0.003"}
        assert len(arm["curves"]) == 2
        for curve, final in zip(arm["curves"], arm["final_losses"], strict=True):
            assert curve["losses"][-1] == final < curve["losses"][0]
            assert curve["flops"] == sorted(curve["flops"])
            assert 0.6 * 2048 < curve["tokens"][-1] <= 2048  # the toy's batches are not full
    scratch, grown, factor = report["arms"]
    assert scratch["flops_share"] == scratch["flops_to_scratch_loss"] == [1.0, 1.0]
    assert all(0.3 < share < 0.6 for share in grown["flops_share"])
    assert grown["flops_share"] == pytest.approx(factor["flops_share"], rel=0.02)
    assert grown["final_losses"] != factor["final_losses"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    plots.growth(report, tmp_path / "again.png")
    flops, seconds, ends = figures[0].axes
    assert len(flops.lines) == len(seconds.lines) == 3 * 2  # arms, seeds
    assert [tick.get_text() for tick in ends.get_yticklabels()] == [f"{a['name']}, rate {a['rate']:g}" for a in arms]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    removed = tmp_path / "scratch-0.001-0"
    (removed / "checkpoint" / "config.json").unlink()
    assert run(tmp_path) == report
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert after == before
    assert (removed / "checkpoint" / "config.json").exists()
