"""`make check` finds the tests of whatever changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.changed_rooms import ROOT, files, module_of, room_tests, select, slow_tests

SOURCES = files("hrmcore/**/*.py", "csrc/**/*.cpp", "csrc/**/*.cu")
ONLY_IMPORTED = {"hrmcore/__init__.py", "hrmcore/_lazy.py"}  # the test of the layers is theirs


@pytest.mark.parametrize("room", sorted({"/".join(name.split("/")[:2]) for name in SOURCES} - ONLY_IMPORTED))
def test_every_room_has_tests(room: str) -> None:
    found = room_tests(next(name for name in SOURCES if name.startswith(room)))
    assert set(found) - {"tests/test_layers.py"}


@pytest.mark.parametrize(
    ("changed", "own", "dependent"),
    [
        ("hrmcore/train/metrics.py", "tests/train/test_metrics.py", None),
        ("hrmcore/durable.py", "tests/data/test_store.py", "tests/checkpoint/test_tensor_file.py"),
        ("hrmcore/ops/rope.py", "tests/ops/test_rope.py", "tests/test_model.py"),
        ("csrc/ops/rope.cpp", "tests/ops/test_rope.py", None),
        ("csrc/ops/attention_backward.cu", "tests/ops/test_attention.py", None),
        ("tests/test_core.py", "tests/test_core.py", None),
        ("tests/support/runs.py", None, "tests/train/test_objective.py"),
        ("tests/conftest.py", None, "tests/test_core.py"),
        ("bench/speed/train.py", "tests/bench/test_architecture.py", None),
        ("README.md", "tests/test_readme.py", None),
    ],
)
def test_what_a_change_chooses(changed: str, own: str | None, dependent: str | None) -> None:
    chosen, also = select([changed])
    assert own is None or own in chosen
    assert dependent is None or dependent in also
    assert not set(chosen) & set(also)


def test_the_names_of_modules() -> None:
    names = ["hrmcore/ops/rope.py", "hrmcore/data/__init__.py", "tests/support/runs.py"]
    assert [module_of(name) for name in names] == ["hrmcore.ops.rope", "hrmcore.data", "support.runs"]


def test_slow_tests_are_named() -> None:
    assert slow_tests([Path(__file__).relative_to(ROOT).as_posix()]) == []
