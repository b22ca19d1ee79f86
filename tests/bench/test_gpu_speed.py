"""bench/gpu/speed.sh on the emulator: it runs, says what it did not measure, and finds what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import speed

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


@pytest.mark.emulated
@pytest.mark.slow
def test_it_runs_on_the_emulator(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [str(ROOT / "bench" / "gpu" / "speed.sh"), "--emulated", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    assert json.loads(ran.stdout.splitlines()[-1]) == report
    assert report["right"] is True
    assert set(report["errors"]) == {"bfloat16", "int8", "int4", "bfloat16, int8 cache"}
    assert len(report["cases"]) == 8
    assert report["left_out"] == []
    for case in report["cases"]:
        assert case["measured"] == {"same_bits": True, "ms": None, "graph_ms": None, "phases": None}
        assert case["ms"] > 0
    assert "| int4, 2 requests, 70 tokens | - / " in ran.stdout


def test_launches_are_dealt_to_phases() -> None:
    order = ["gqkv", "o", "gqkv", "o", "head"]
    begins = [0.0, 3.0, 5.0, 9.0, 10.0, 100.0, 105.0, 107.0, 111.0, 112.0]
    spans = [(begin, begin + 0.5) for begin in begins]
    assert speed.phase_times(spans, order) == {"gqkv": 4.0, "o": 1.5, "head": 0.5}
    assert speed.phase_times(spans[:-1], order) == "the profiler saw 9 launches where a token has 5"
    assert speed.phase_times([], order) == "the profiler saw 0 launches where a token has 5"


def test_an_error_too_large_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "error_of", lambda plan, model, dtype, *cache: 0.5 if dtype == "int4" else 1e-3)
    monkeypatch.setattr(speed, "LIMIT", -1.0)
    assert speed.main(["--emulated"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["right"] is False
    assert report["cases"] == []
    assert len(report["left_out"]) == 8


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert speed.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
