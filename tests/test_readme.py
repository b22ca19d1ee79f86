"""README tells the truth: its tree is the tree, its Python example runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNLISTED = {"LICENSE", "pyproject.toml", "constraints.txt", "hrmcore/__main__.py", "hrmcore/_C.pyi"}


def listed() -> set[str]:
    """The paths of README's tree: a line is an indented name, then what it is."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert block
    paths, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            paths.add(folder + name.rstrip("/"))
        else:
            folder = name if name.endswith("/") else ""
            paths.add(name.rstrip("/"))
    return paths


def tracked() -> set[str]:
    """What git tracks at the top level, and one level down in csrc/ and hrmcore/."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = set()
    for file in files:
        top, _, rest = file.partition("/")
        if top.startswith("."):
            continue
        paths.add(top)
        if top in ("csrc", "hrmcore") and rest:
            paths.add(f"{top}/{rest.split('/')[0]}")
    return paths - UNLISTED


def test_the_tree_is_true() -> None:
    assert listed() == tracked() | {"hrmcore/__init__.py"}


def test_the_example_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["logits"].shape[0] == 4  # type: ignore[attr-defined]
