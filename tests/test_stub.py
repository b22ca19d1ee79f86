"""mypy sees the native module as it is."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_committed_stub_is_what_the_built_module_says() -> None:
    stub = runpy.run_path(str(ROOT / "cmake" / "make_stub.py"))["stub"]()
    assert (ROOT / "hrmcore" / "_C.pyi").read_text(encoding="utf-8") == stub, "run `make stub`"
