"""Tests carry the marks by which the sanitizers and `make check` choose: see `markers` in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CALLS = {
    "emulated": ("emulated_cuda(", "same_bits_for_every_schedule("),
    "inside_torch": ("opcheck(", "gradgradcheck("),
}


def marks_of_module(tree: ast.Module) -> str:
    return " ".join(ast.unparse(node) for node in tree.body if ast.unparse(node).startswith("pytestmark"))


@pytest.mark.parametrize("path", sorted(HERE.rglob("test_*.py")), ids=lambda path: path.relative_to(HERE).as_posix())
def test_what_a_test_calls_is_among_its_marks(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_module = marks_of_module(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = of_module + " ".join(ast.unparse(mark) for mark in node.decorator_list)
            missing = [
                name
                for name, calls in CALLS.items()
                if any(call in ast.unparse(node) for call in calls) and f"mark.{name}" not in marks
            ]
            assert not missing, f"{node.name} lacks {missing}"


@pytest.mark.parametrize("path", sorted((HERE / "ops").glob("test_*.py")), ids=lambda path: path.stem)
def test_tests_of_ops_are_native(path: Path) -> None:
    assert "mark.native" in marks_of_module(ast.parse(path.read_text(encoding="utf-8")))
