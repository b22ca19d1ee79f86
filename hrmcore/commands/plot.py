"""`hrmcore plot`: the curves of a training run as a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hrmcore import plots

EXAMPLE = """\
examples:
  hrmcore plot run/                     writes run/curves.png
  hrmcore plot run/ --out curves.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore plot`."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, help="run folder of `hrmcore train`")
    parser.add_argument("--out", type=Path, help="the picture; its ending is the format (RUN/curves.png)")


def run(args: argparse.Namespace) -> int:
    """Draw what the run has recorded so far."""
    out = args.out or args.run / "curves.png"
    rows = read_metrics(args.run / "metrics.jsonl")
    plots.check(out)
    plots.training(rows, out)
    print(out)
    return 0


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps that a run has recorded; a last line that is being written is left out.

    Raises FileNotFoundError without the file, ValueError naming a line that holds no step or when there is none.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows.append({key: float(value) for key, value in row.items()})
            rows[-1]["step"]
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ValueError(f"{path}:{number}: not a step's metrics") from None
    if not rows:
        raise ValueError(f"{path}: no step has been recorded yet")
    return rows
