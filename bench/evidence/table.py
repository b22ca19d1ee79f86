"""The table of a claim: valid from its first cell on, with n, seeds and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bench.evidence import intervals
from bench.evidence.queue import Cell

if TYPE_CHECKING:
    from bench.evidence.claim import Study


def report(study: Study) -> dict[str, Any]:
    """All that is known, as JSON: a line for each arm at the highest rung that all arms have come to.

    A line's candidate is the best of those at that rung by seed 0; its seeds are those that all arms have, so that
    differences are of pairs. `tried` holds every cell, at every rung.
    """
    claim, rule, known = study.claim, study.rule, study.known
    level = rule.level(known)
    target = study.scale.rungs[level]
    found = {arm: rule.measured(arm, level, known) for arm in rule.arms}
    best = {arm: next(iter(measured.items()), None) for arm, measured in found.items()}
    common = set.intersection(*(set(entry[1]) for entry in best.values() if entry)) if any(best.values()) else set()
    cells = {
        arm: [Cell(arm, entry[0], seed, level) for seed in sorted(common)] if entry else []
        for arm, entry in best.items()
    }
    lines = [_line(study, arm, cells, target) for arm in rule.arms]
    every = [Cell(a, c, s, r) for r in range(rule.rungs) for a in rule.arms for c in range(rule.candidates)
             for s in range(rule.seeds)]  # fmt: skip
    tried = [
        {"arm": cell.arm, "settings": written(claim.arms[cell.arm][cell.candidate]), "seed": cell.seed,
         "at": study.scale.rungs[cell.rung], "loss": loss}
        for cell in every if (loss := known(cell)) is not None
    ]  # fmt: skip
    return {
        "claim": claim.name,
        "asks": claim.asks,
        "data": study.name,
        "axis": claim.axis,
        "reference": claim.reference,
        "at": target,
        "last": study.scale.rungs[-1],
        "cells": rule.count(),
        "complete": rule.next_cell(known) is None,
        "scale": asdict(study.scale),
        "lines": lines,
        "tried": tried,
    }


def _line(study: Study, arm: str, cells: dict[str, list[Cell]], target: float) -> dict[str, Any]:
    claim, mine = study.claim, cells[arm]
    theirs = cells[claim.reference]
    line: dict[str, Any] = {"arm": arm, "n": len(mine), "seeds": [cell.seed for cell in mine]}
    if not mine:
        return line
    curves = [study.curve(cell) for cell in mine]
    for key, most in (("loss", math.inf), ("exact", 1.0)):
        line[key] = [curve.at(claim.axis, target, key) for curve in curves]
        line[f"{key}_interval"] = intervals.within(intervals.of_mean(line[key]), 0.0, most)
    line["settings"] = written(claim.arms[arm][mine[0].candidate])
    line["ended_early"] = sum(curve.ended for curve in curves)
    for key in ("step", "tokens", "flops", "seconds"):
        line[key] = fmean(min(curve.spent(key), _at(curve, claim.axis, target, key)) for curve in curves)
    line["curves"] = [{key: getattr(curve, key) for key in ("step", "flops", "loss", "exact")} for curve in curves]
    if theirs and arm != claim.reference:
        others = [study.curve(cell) for cell in theirs]
        for key in ("loss", "exact"):
            reference = [curve.at(claim.axis, target, key) for curve in others]
            line[f"{key}_difference"] = intervals.of_difference(line[key], reference)
    if theirs:
        goal = fmean(study.curve(cell).at(claim.axis, target, "loss") for cell in theirs)
        for axis in ("step", "flops"):
            line[f"{axis}_to_reference"] = [curve.reached(axis, goal) for curve in curves]
    return line


def _at(curve: Any, axis: str, target: float, key: str) -> float:
    """A running total at a spend: of the first validation at or behind it, or of the last."""
    values, across = getattr(curve, key), getattr(curve, axis)
    if not values:  # it became no number before the first one
        return 0.0
    return float(next((value for value, spent in zip(values, across, strict=True) if spent >= target), values[-1]))


def text(found: dict[str, Any]) -> str:
    """The report as a table for people."""
    unit = "steps" if found["axis"] == "step" else "FLOPs"
    state = "complete" if found["complete"] else f"cut short, its last rung is {found['last']:g}"
    heads = ["", "settings", "n", "held-out loss", f"minus {found['reference']}'s", "right", "verdict",
             f"{unit} to {found['reference']}'s loss"]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    rows += [_row(line, found) for line in found["lines"]]
    title = f"{found['claim']} on {found['data']}, at {found['at']:g} {unit} ({state}), {len(found['tried'])} values"
    return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in rows)])


def _row(line: dict[str, Any], found: dict[str, Any]) -> list[str]:
    if not line["n"]:
        return [line["arm"], *["-"] * 7]
    difference = line.get("loss_difference")
    goal = [share(spent, found["at"]) for spent in line.get(f"{found['axis']}_to_reference", ())]
    return [
        line["arm"],
        line["settings"],
        str(line["n"]),
        intervals.shown(line["loss_interval"]),
        intervals.shown(difference, "{:+.3f}") if difference else "-",
        intervals.shown(line["exact_interval"], "{:.1%}"),
        verdict(difference) if difference else "-",
        ", ".join(goal),
    ]


def written(candidate: Mapping[str, Any]) -> str:
    """Such as rate=0.002,b1=0.8."""
    return ",".join(f"{key}={value:g}" for key, value in candidate.items())


def share(spent: float | None, whole: float) -> str:
    return "never" if spent is None else f"{spent / whole:.0%}"


def verdict(difference: intervals.Interval) -> str:
    """Of a difference of losses: whether its 95% interval lies on one side of nothing."""
    if difference["low"] is None:
        return "open: one seed"
    if difference["high"] is not None and difference["high"] < 0:
        return "lower"
    return "higher" if difference["low"] > 0 else "not told apart"
