"""Tables and ends of the programs of this room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def finish(report: dict[str, Any], out: Path | None, show: Callable[[dict[str, Any]], None]) -> int:
    """A report for people, what the deadline left out of it, and its JSON, also in `out`; returns the exit status."""
    text = json.dumps(report)
    if out:
        out.write_text(text + "\n")
    show(report)
    for name in report["left_out"]:
        print(f"left out, the time was over: {name}")
    print(text)
    return 0 if report["right"] else 1
