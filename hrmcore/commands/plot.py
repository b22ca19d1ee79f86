"""`hrmcore plot`: the curves of a training run as a picture."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hrmcore import plots

EXAMPLE = """\
examples:
  hrmcore plot run/                     writes run/curves.png
  hrmcore plot run/ --out curves.svg
  hrmcore plot run1/ run2/ --out both.png    the runs over one another
  hrmcore plot run/ --csv               writes run/metrics.csv, for a spreadsheet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore plot`."""
    parser.epilog = EXAMPLE
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of `hrmcore train`")
    parser.add_argument(
        "--out", type=Path, help="the picture; its ending is the format (curves.png in the first run's folder)"
    )
    parser.add_argument("--csv", action="store_true", help="write a table of every step instead of a picture")


def run(args: argparse.Namespace) -> int:
    """Draw what the runs have recorded so far, or write it as a table."""
    out = args.out or args.runs[0] / ("metrics.csv" if args.csv else "curves.png")
    runs = {name: read_metrics(folder / "metrics.jsonl") for name, folder in named(args.runs).items()}
    if args.csv:
        write_csv(runs, out)
    else:
        plots.check(out)
        plots.training(runs, out)
    print(out)
    return 0


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names, or by their whole paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return dict(zip(names, folders, strict=True))
    return {str(folder): folder for folder in folders}


def write_csv(runs: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Every step's figures, a row a step; with several runs, the first column names the run."""
    columns = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row))
    several = ["run"] if len(runs) > 1 else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*several, *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"run": name, **row} for name, rows in runs.items() for row in rows)


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
