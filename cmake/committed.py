"""Figures of compiled code beside the committed ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def compare(found: Mapping[Path, str], again: str) -> None:
    """Print the first; with --update write all, else exit where one differs. `again`: how to have them written.

    The first file's first line names the compiler: figures of another one are not compared.
    """
    first, text = next(iter(found.items()))
    print(text, end="")
    if "--update" in sys.argv:
        for path, figures in found.items():
            path.write_text(figures, encoding="utf-8")
        return
    if first.read_text(encoding="utf-8").splitlines()[0] != text.splitlines()[0]:
        print(f"{first} was made by another compiler; not compared")
        return
    differ = [str(path) for path, figures in found.items() if path.read_text(encoding="utf-8") != figures]
    if differ:
        sys.exit(f"{', '.join(differ)}: other figures; if the change is meant: {again}")
