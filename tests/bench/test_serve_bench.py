"""bench/speed/serve.py: what it counts, what it asks, and that it runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.speed.serve import LONGEST, SHORTEST, Answer, at, counted, mix, picture, read_report, summary, table
from hrmcore.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def test_what_comes_in_time_is_counted() -> None:
    """Two tokens a piece where that is known, only pieces within the time, gaps and first pieces from then on."""
    before = Answer(asked=0.0, tokens=4, pieces=[1.0, 11.0], complete=True)
    within = Answer(asked=11.0, tokens=6, pieces=[12.0, 13.0, 15.0], complete=True)
    cut = Answer(asked=16.0, tokens=100, pieces=[18.0, 19.0, 21.0])
    none = Answer(asked=19.0, tokens=100)
    found = counted([before, within, cut, none], 10.0, 20.0)
    assert found["tokens_a_second"] == pytest.approx((2 * 1 + 2 * 3 + 2 * 2) / 10)
    assert found["first"] == [1.0, 2.0]
    assert found["gaps"] == [1.0, 2.0, 1.0, 2.0]
    assert found["complete"] == 2
    assert counted([], 0.0, 1.0) == {"tokens_a_second": 0.0, "first": [], "gaps": [], "complete": 0}


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert [at([1.0, 2.0, 3.0, 4.0], share) for share in (0.25, 0.5, 0.51, 0.99, 1.0)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert at([], 0.5) is None


def test_questions_are_of_all_lengths(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    lengths = [len(tokenizer.prompt(question)) for question in mix(tokenizer)]
    assert len(lengths) > 300
    assert SHORTEST <= min(lengths) < 2 * SHORTEST
    assert LONGEST / 2 < max(lengths) < LONGEST
    assert mix(tokenizer) == mix(tokenizer)


def test_a_report_becomes_a_table_and_a_picture() -> None:
    turn = {"tokens_a_second": 10.0, "first": [0.1, 0.3], "gaps": [0.01], "complete": 2}
    found = summary([turn, {**turn, "tokens_a_second": 30.0}])
    assert (found["tokens_a_second"], found["first"], found["complete"]) == (
        20.0,
        {"n": 4, "median": 0.1, "p99": 0.3},
        4,
    )
    report = {"checkpoint": "m", "dtype": "int8", "gguf": None, "threads": 1, "processor": "p"}
    report["cells"] = {"16": {"hrmcore": found}, "2": {"hrmcore": found}}
    assert table(report).splitlines()[2] == "| 2 | hrmcore | 20 | 100 (300) | 10 (10) | 4 |"
    assert [row["name"] for row in picture(report)["panels"][0]["rows"]] == [
        "2 callers, hrmcore",
        "16 callers, hrmcore",
    ]


@pytest.mark.slow
def test_it_runs_and_keeps_what_it_found(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve"
    command = [sys.executable, "-m", "bench.speed.serve", str(checkpoint), "--threads", "1", "--seconds", "1"]
    command += ["--turns", "1", "--dtype", "float32", "--out", str(out)]
    for callers in ("1", "3"):
        subprocess.run([*command, "--callers", callers], cwd=ROOT, check=True, capture_output=True, timeout=120)
    report = json.loads(out.with_suffix(".json").read_text())
    assert set(report["cells"]) == {"1", "3"}
    assert all(cell["hrmcore"]["tokens_a_second"] > 0 for cell in report["cells"].values())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert out.with_suffix(".md").read_text() == table(report)
    other = argparse.Namespace(checkpoint=checkpoint, dtype="int8", threads=1, gguf=None, out=out)
    assert read_report(other)["cells"] == {}
