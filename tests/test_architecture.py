"""bench/architecture.py at toy size: every cell runs, is written once, and costs what HRM costs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hrmcore.planner import parameters

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = [
    "--tokens",
    "3000",
    "--records",
    "60",
    "--seeds",
    "1",
    "--width",
    "32",
    "--layers",
    "1",
    "--batch-tokens",
    "1024",
]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_cells_are_matched_and_resumed(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.main(["--out", str(tmp_path), *TOY])
    printed = capsys.readouterr().out
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(results) == len(bench.DATA) * (len(bench.ARCHITECTURES) + len(bench.OBJECTIVES) - 1)
    for result in results.values():
        assert 0 <= result["exact"] <= 1
        assert 0 < result["heldout_loss"] < 20
        # A batch is never quite full; a step is the smallest unit.
        assert 0.6 < result["flops"] / result["budget"] < 1 + 1 / result["steps"]
    for name in (*bench.ARCHITECTURES, *bench.OBJECTIVES):
        assert f"| {name} |" in printed
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("a finished cell ran again"))
    bench.main(["--out", str(tmp_path), *TOY])
    assert capsys.readouterr().out.split("##", 1)[1] == printed.split("##", 1)[1]
    with pytest.raises(SystemExit, match="other settings"):
        bench.main(["--out", str(tmp_path), *TOY, "--learning-rate", "1"])


def test_the_baselines_have_hrms_parameters(bench: ModuleType) -> None:
    counts = {
        name: parameters(bench.model_config(bench.Cell(name, bench.PUBLISHED, "iq", 0), 300, 128, 2))
        for name in bench.ARCHITECTURES
    }
    assert len(set(counts.values())) == 1
    assert 0.8e6 < counts["HRM"] < 1.2e6
