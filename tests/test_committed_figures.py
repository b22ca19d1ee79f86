"""cmake/committed.py: figures of compiled code beside the committed ones."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "cmake")
    monkeypatch.setattr(sys, "argv", ["check"])
    return importlib.import_module("committed")


def test_other_figures_of_the_same_compiler_are_refused(committed: Any, tmp_path: Path) -> None:
    table, counts = tmp_path / "table.txt", tmp_path / "counts.json"
    table.write_text("registers; nvcc 1\na 3\n")
    counts.write_text("{}\n")
    committed.compare({table: "registers; nvcc 1\na 3\n", counts: "{}\n"}, "make table")
    with pytest.raises(SystemExit, match=r"counts.json: other figures; if the change is meant: make table"):
        committed.compare({table: "registers; nvcc 1\na 3\n", counts: "[]\n"}, "make table")
    committed.compare({table: "registers; nvcc 2\na 4\n", counts: "[]\n"}, "make table")


def test_update_writes_them(committed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "--update"])
    files = {tmp_path / "table.txt": "nvcc 1\n", tmp_path / "counts.json": "{}\n"}
    committed.compare(files, "make table")
    assert {path: path.read_text() for path in files} == files
