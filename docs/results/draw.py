"""Draws docs/results/pictures/ again from docs/results/data/, which holds the figures of the pages as they are printed.

    python docs/results/draw.py            every picture
    python docs/results/draw.py peers ops  these

The lens is drawn from the embedded model itself. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hrmcore import cli, plots

HERE = Path(__file__).parent
sys.path.append(str(Path(__file__).parents[2]))  # for bench/; last, so that the installed package wins

QUESTION = "Spell this word backward (example: sun -> nus): lantern"


def main(names: list[str]) -> None:
    for name in names or [*sorted(path.stem for path in (HERE / "data").glob("*.json")), "lens"]:
        to = HERE / "pictures" / f"{name}.png"
        if name == "lens":
            cli.main(["inspect", QUESTION, "--plot", str(to)])
            continue
        report = json.loads((HERE / "data" / f"{name}.json").read_text(encoding="utf-8"))
        if name == "architecture":
            report["lines"] = [with_seeds(line) for line in report["lines"]]
        if name.startswith("evidence_"):
            from bench.evidence import picture

            picture.draw(report, to)
        else:
            getattr(plots, name, plots.bars)(report, to)


def with_seeds(line: dict[str, Any]) -> dict[str, Any]:
    """The three seeds of a cell: the least, the most, and the one that the mean leaves."""
    exact, loss = (three(**line[key]) for key in ("exact_percent", "heldout_loss"))
    runs = [{"exact": share / 100, "heldout_loss": nats} for share, nats in zip(exact, loss, strict=True)]
    return {**line, "runs": runs}


def three(mean: float, least: float, most: float) -> list[float]:
    seeds = [least, min(max(3 * mean - least - most, least), most), most]
    return [seed + mean - sum(seeds) / 3 for seed in seeds]  # what rounding took from the mean


if __name__ == "__main__":
    main(sys.argv[1:])
