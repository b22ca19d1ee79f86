"""`make check`: style, types and tests of what changed since the branch left main, within a minute on two processors.

    PYTHONPATH=tests python -m support.changed_rooms [BASE]

First the tests of each room that changed, without those marked `slow`. Then, while SECONDS last, the tests that import
a changed module, and those of the rooms that import one. It prints what it ran and what it left out.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 40  # the tests under way then take some more
OUT_OF_TIME = "make check was out of time"

# Where a room's tests are, besides tests/ROOM/, tests/test_ROOM.py and tests/test_ROOM_*.py; patterns below tests/.
ELSEWHERE = {
    "model": ["test_cuda_model.py", "test_depths.py", "test_position_encoding.py"],
    "optim": ["test_sophia.py"],
    "operands": ["test_optim.py"],
    "gpus": ["test_planner.py"],
    "graphs": ["train/test_captured.py", "engine/test_prefill_buckets.py"],
    "machine": ["test_microbench.py", "test_microbench_cuda.py"],
    "step_bench": ["test_microbench_cuda.py"],
    "durable": ["checkpoint/test_training_state.py", "data/test_store.py"],
    "limits": ["fuzz/test_readers.py"],
    "lora": ["train/test_lora.py", "train/test_lora_cost.py"],
    "lens_names": ["serving/test_served_lens.py", "test_lens.py"],
    "plots": ["test_microbench.py", "test_lens.py"],
    "commands": ["test_cli.py"],
    "repl": ["commands/test_repl.py"],
    "_lazy": ["test_layers.py"],
    "__init__": ["test_layers.py"],
    "__main__": ["test_cli.py"],
    "_C": ["test_core.py"],
    "assets": ["test_cli.py"],
}
NATIVE = {
    "bindings": ["test_core.py", "ops/test_rms_norm.py", "engine/test_engine_core.py"],
    "core": ["test_core.py", "ops/test_rms_norm.py"],
    "ops": ["ops/*"],
    "gemm": ["engine/test_engine_core.py"],
    "kv": ["engine/test_engine_core.py", "engine/test_recurrence.py"],
    "engine": ["engine/test_engine_core.py", "engine/test_recurrence.py", "engine/test_sampling.py"],
    "decode": ["engine/test_*cuda*.py", "engine/test_*decode*.py"],
    "emulator": ["test_emulator.py"],
}


def git(*arguments: str) -> list[str]:
    """The lines that git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def changed_files(base: str) -> list[str]:
    """What differs from where the branch left `base`, committed or not."""
    known = [name for name in (base, f"origin/{base}") if git("branch", "--all", "--list", name, f"remotes/{name}")]
    start = git("merge-base", known[0], "HEAD")[0] if known else "HEAD"
    return sorted({*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")})


@cache
def files(*patterns: str) -> list[str]:
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def room_tests(name: str) -> list[str]:
    """The test files of the room that a file of the tree is in; a page of ops is a room of its own."""
    top, *rest = Path(name).with_suffix("").parts
    page = f"ops/test_{rest[-1].removesuffix('_backward')}.py" if rest else ""
    if top in ("hrmcore", "csrc") and rest[0] == "ops" and files(f"tests/{page}"):
        patterns = [page]
    elif top == "hrmcore":
        room = rest[0]
        named = [f"{room}/test_*.py", f"test_{room}.py", f"test_{room}_*.py"]
        patterns = [*named, *ELSEWHERE.get(room, []), "test_layers.py"]
    elif top == "csrc":
        patterns = NATIVE.get(rest[0], NATIVE["bindings"])
    elif top == "tests":
        patterns = [name.removeprefix("tests/")] if Path(name).name.startswith("test_") else []
    elif top == "bench":
        patterns = ["bench/test_*.py"]
    else:
        patterns = ["test_layers.py", "test_readme.py"]
    return [
        test for test in files("tests/**/test_*.py") if any(fnmatch(test, f"tests/{pattern}") for pattern in patterns)
    ]


def module_of(name: str) -> str:
    """The dotted name of a Python file, as tests import it."""
    return name.removeprefix("tests/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imported_by(name: str) -> set[str]:
    """The modules that a Python file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def select(changed: Iterable[str]) -> tuple[list[str], list[str]]:
    """The test files of the rooms that changed, and those that depend on a changed module, the most specific first."""
    changed = list(changed)
    own = sorted({test for name in changed for test in room_tests(name)})
    modules = {module_of(name) for name in changed if name.endswith(".py")}
    imported = {name: imported_by(name) for name in files("hrmcore/**/*.py", "tests/**/*.py")}
    users = sorted((name for name in imported if imported[name] & modules), key=lambda name: len(imported[name]))
    dependent = [name for name in users if name.startswith("tests/") and Path(name).name.startswith("test_")]
    for name in users:
        if name.startswith("hrmcore/"):
            dependent += room_tests(name)
    if "tests/conftest.py" in changed:
        dependent += files("tests/**/test_*.py")
    return own, [name for name in dict.fromkeys(dependent) if name not in own]


def slow_tests(tests: Iterable[str]) -> list[str]:
    """The functions marked `slow` in some test files."""
    return [
        f"{name}::{node.name}"
        for name in tests
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and any("mark.slow" in ast.unparse(mark) for mark in node.decorator_list)
    ]


def commands(changed: Iterable[str]) -> list[list[str]]:
    """What looks at the text of the files that changed; mypy looks at the whole package, most of it from its cache."""
    there = [name for name in changed if (ROOT / name).exists()]
    python = [name for name in there if name.endswith((".py", ".pyi"))]
    native = [name for name in there if name.startswith("csrc/") and name.endswith((".cpp", ".h", ".cu", ".cuh"))]
    chosen = []
    if python:
        chosen += [["ruff", "check", *python], ["ruff", "format", "--check", *python]]
    if native:
        chosen.append(["clang-format", "--dry-run", "--Werror", *native])
    if any(name.startswith("hrmcore/") for name in python):
        chosen.append(["mypy"])
    return chosen


def run(command: list[str]) -> int:
    """The status of a tool of this environment; its first line says what it is."""
    print("$", " ".join(command if len(command) < 8 else [*command[:6], f"... ({len(command)} words)"]), flush=True)
    return subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], cwd=ROOT, check=False).returncode


def main(base: str = "main") -> int:
    start = time.time()
    changed = changed_files(base)
    if not changed:
        print(f"Nothing has changed since {base}.")
        return 0
    own, dependent = select(changed)
    failed = [command[0] for command in commands(changed) if run(command)]
    print("Rooms that changed:", *own, sep="\n  ")
    print("While time lasts:", *dependent, sep="\n  ", flush=True)
    if own or dependent:
        spare = [f"--spare={name}" for name in dependent]
        pytest_command = ["-m", "pytest", "-p", "support.changed_rooms", "-n", "auto", "--dist", "load"]
        limits = ["-m", "not slow", f"--until={start + SECONDS}", *spare]
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        if subprocess.run(
            [sys.executable, *pytest_command, *limits, *own, *dependent], cwd=ROOT, env=environment, check=False
        ).returncode:
            failed.append("pytest")
    print("Left out, because marked slow:", *slow_tests(own + dependent), sep="\n  ")
    print(f"{time.time() - start:.0f} seconds;", f"failed: {', '.join(failed)}" if failed else "all is well")
    return 1 if failed else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--spare", action="append", default=[], help="a file whose tests run only before --until")
    parser.addoption("--until", type=float, default=float("inf"), help="a moment, in seconds since 1970")


def pytest_runtest_setup(item: pytest.Item) -> None:
    name = item.path.relative_to(ROOT).as_posix()
    if name in item.config.getoption("--spare") and time.time() > item.config.getoption("--until"):
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.getreports("skipped") if OUT_OF_TIME in report.longrepr[2]]
    for name in dict.fromkeys(report.nodeid.split("::")[0] for report in skipped):
        terminalreporter.write_line(f"left out, because out of time: {name}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
