"""What a results page shows of a report: the tables as Markdown, and the same figures as JSON for docs/results/data.

    python -m bench.evidence.page OUT/report-sudoku4.json docs/results/data/evidence_objectives_sudoku4.json

The JSON holds what the tables print, in the same digits, so that a picture can be drawn again from a page's figures:
means over the seeds that all arms have, at some POINTS spends up to the table's rung, and the intervals at the rung.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.evidence import table
from bench.evidence.cell import Curve

POINTS = 6


def page(found: dict[str, Any]) -> dict[str, Any]:
    """Of a report; figures rounded as they are printed. Spends are whole numbers, losses have three digits."""
    axis, places, lines = found["axis"], places_of(found), []
    for line in found["lines"]:
        if not line["n"]:
            continue
        curves = [Curve(**curve) for curve in line["curves"]]
        means = [fmean(curve.at(axis, place, "loss") for curve in curves) for place in places]
        lines.append(
            {
                "arm": line["arm"],
                "settings": line["settings"],
                "n": line["n"],
                "verdict": table.verdict(line["loss_difference"]) if "loss_difference" in line else "",
                "losses": [round(mean, 3) for mean in means],
                "loss": rounded(line["loss_interval"], 3),
                "right_percent": rounded({key: percent(v) for key, v in line["exact_interval"].items()}, 1),
            }
        )
    names = ("claim", "data", "axis", "reference")
    return {**{name: found[name] for name in names}, "places": places, "complete": found["complete"], "lines": lines}


def places_of(found: dict[str, Any]) -> list[int]:
    """POINTS spends up to the table's rung, without those before a curve's first validation."""
    first = max(curve[found["axis"]][0] for line in found["lines"] for curve in line.get("curves", ()))
    places = (round(found["at"] * number / POINTS) for number in range(1, POINTS + 1))
    return [place for place in places if place >= first]


def rounded(found: dict[str, Any], digits: int) -> dict[str, float | None]:
    return {key: None if value is None else round(value, digits) for key, value in found.items()}


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def curves(shown: dict[str, Any]) -> str:
    """The losses on the way, as a table."""
    unit = "steps" if shown["axis"] == "step" else "FLOPs"
    heads = [f"held-out loss by {unit}", *(f"{place:.3g}" for place in shown["places"])]
    rows = [heads, ["---"] * len(heads)]
    rows += [[line["arm"], *(f"{loss:.3f}" for loss in line["losses"])] for line in shown["lines"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def crossings(shown: dict[str, Any]) -> list[str]:
    """From where on each arm is below the reference, of the places of the table; or that it is so nowhere."""
    theirs = next(line["losses"] for line in shown["lines"] if line["arm"] == shown["reference"])
    said = []
    for line in shown["lines"]:
        if line["arm"] == shown["reference"]:
            continue
        above = [index for index, (a, b) in enumerate(zip(line["losses"], theirs, strict=True)) if a >= b]
        first = above[-1] + 1 if above else 0
        where = "at the end it is not" if first == len(theirs) else f"from {shown['places'][first]:.3g} on"
        said.append(f"{line['arm']} below {shown['reference']}: {where}")
    return said


def tried(found: dict[str, Any]) -> str:
    """Every setting's loss with seed 0, by the rung that it came to: nothing is left out."""
    rungs = sorted({entry["at"] for entry in found["tried"]})
    losses = {(e["arm"], e["settings"], e["at"]): e["loss"] for e in found["tried"] if e["seed"] == 0}
    heads = ["seed 0", "settings", *(f"{rung:g}" for rung in rungs)]
    rows = [heads, ["---"] * len(heads)]
    for arm, settings in dict.fromkeys((e["arm"], e["settings"]) for e in found["tried"]):
        values = [losses.get((arm, settings, rung)) for rung in rungs]
        rows.append([arm, settings, *("" if value is None else f"{value:.3f}" for value in values)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("data", type=Path, nargs="?", help="where the JSON goes (nowhere)")
    args = parser.parse_args()
    found = json.loads(args.report.read_text(encoding="utf-8"))
    shown = page(found)
    print(f"{table.text(found)}\n\n{curves(shown)}\n\n{tried(found)}\n")
    print("\n".join(crossings(shown)))
    if args.data:
        args.data.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
