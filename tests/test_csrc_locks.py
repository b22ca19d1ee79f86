"""No lock of the C++ core is held where Python can run (docs/design/engine.md): each has a case that provokes it, and
the sources show that none can.

Python runs where a binding asks for it: in csrc/bindings, and in the calls of `Interrupt::wanted`, which engines get
from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.inside_a_step import CASES

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path for kind in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in CSRC.glob(f"*/{kind}"))

# Every lock, and the case of support/inside_a_step.py in which Python takes it, or waits for it, while a step runs on
# the same thread.
LOCKS = {
    "core/mapped_file.cpp mutex": "everything_else_works",
    "core/threads.cpp mutex_": "everything_else_works",
    "core/threads.cpp pool_mutex": "everything_else_works",
    "emulator/machine.h one_launch": "emulated_kernels_work",
    "engine/engine.h mutex_": "handler_closes",
    "engine/waiting_room.h mutex_": "everything_else_works",
    "engine/turns.h mutex_": "a_step_that_waits_can_be_interrupted",
}


def locks_in(text: str) -> list[str]:
    """The names of the mutexes that a file declares."""
    return re.findall(r"\bstd::(?:recursive_|shared_|timed_)*mutex\s+(\w+)\s*;", text)


def test_every_lock_has_a_case_that_provokes_it() -> None:
    found = {f"{path.relative_to(CSRC)} {name}" for path in SOURCES for name in locks_in(path.read_text())}
    assert found == set(LOCKS)
    assert set(LOCKS.values()) <= {case.__name__ for case in CASES}


def test_python_and_locks_do_not_meet_in_a_file() -> None:
    for path in SOURCES:
        text = path.read_text()
        knows_python = re.search(r"pybind11|Python\.h|py::|PyErr_", text) is not None
        assert knows_python == (path.parent.name == "bindings"), path
        assert not (knows_python and re.search(r"mutex|lock_guard|unique_lock|call_once", text)), path


def while_locked(text: str) -> Iterator[str]:
    """The pieces of a file that run with a lock held: to the end of the guard's block, less what it is let go for."""
    for match in re.finditer(r"std::(?:lock_guard|unique_lock|scoped_lock)(?:<[^>]*>)?\s+(\w+)\(", text):
        depth = 0
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth < 0:
                break
        yield re.sub(rf"\b{match[1]}\.unlock\(\);.*?\b{match[1]}\.lock\(\);", "", text[match.end() : end], flags=re.S)


def test_nothing_is_asked_while_a_lock_is_held() -> None:
    pieces = [(path, piece) for path in SOURCES for piece in while_locked(path.read_text())]
    assert len(pieces) >= 15
    for path, piece in pieces:
        assert not re.search(r"\bwanted\b|\binterrupt\b", piece), f"{path}: {piece}"


@pytest.mark.parametrize(
    ("body", "asks"),
    [
        ("{ std::lock_guard<std::mutex> a(m); if (x) { y(); } i.wanted(c); }", True),
        ("{ { std::lock_guard<std::mutex> a(m); y(); } i.wanted(c); }", False),
        ("{ std::unique_lock<std::mutex> a(m); a.unlock(); i.wanted(c); a.lock(); y(); }", False),
        ("{ std::unique_lock<std::mutex> a(m); a.unlock(); y(); a.lock(); i.wanted(c); }", True),
    ],
)
def test_the_search_finds_what_is_planted(body: str, asks: bool) -> None:
    [piece] = while_locked(body)
    assert ("wanted" in piece) == asks
