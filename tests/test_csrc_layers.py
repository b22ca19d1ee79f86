"""The native code's includes go one way: a room of csrc/ sees the rooms in its line here, and itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SEES = {
    "core": set(),
    "ops": {"core"},
    "gemm": {"core"},
    "kv": {"core", "gemm"},
    "engine": {"core", "gemm", "kv"},
    "decode": {"core", "gemm"},
    "emulator": {"core"},
    "bindings": {"core", "ops", "gemm", "kv", "engine", "decode"},
}
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES)


def violations(room: str, source: str) -> Iterator[str]:
    """The includes of a file in `room` that go to no room, or to one that it must not see."""
    for target in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source, re.MULTILINE):
        folder, _, name = target.partition("/")
        if not name or folder not in SEES[room] | {room}:
            yield target


def test_the_parser_of_includes_sees_what_it_should() -> None:
    source = (
        '#include <vector>\n#include "core/isa.h"\n  #  include "kv/kv_cache.h"\n// "engine/engine.h"\n#include "a.h"'
    )
    assert list(violations("gemm", source)) == ["kv/kv_cache.h", "a.h"]
    assert list(violations("kv", source)) == ["a.h"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_go_down(path: Path) -> None:
    room, *rest = path.relative_to(CSRC).parts
    assert len(rest) == 1, "a room is one folder deep: the Makefile's lint and rebuilds reach no further"
    assert not list(violations(room, path.read_text(encoding="utf-8")))


def test_every_room_has_its_line() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in SOURCES} == set(SEES)
    for room, seen in SEES.items():
        assert room not in set().union(*(SEES[other] for other in seen)), f"{room} and a room it sees see each other"
