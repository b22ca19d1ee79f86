"""The picture of a claim from what bench/evidence/page.py wrote: losses on the way, and right answers at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hrmcore import plots


def draw(shown: dict[str, Any], path: Path) -> None:
    """The reference is grey, the others are in colour; bars are 95% intervals over the seeds."""
    lines, reference = shown["lines"], shown["reference"]
    others = [line["arm"] for line in lines if line["arm"] != reference]
    colours = {reference: plots.PEERS[0], **dict(zip(others, plots.OURS, strict=False))}
    answers = any(line["right_percent"]["mean"] > 0 for line in lines)  # a set may ask for none that can be exact
    figure, [[way, *right]] = plots.figure_with(1, 1 + answers, (11, 4.6))
    for line in lines:
        colour, interval = colours[line["arm"]], line["loss"]
        way.plot(shown["places"], line["losses"], color=colour, marker="o", markersize=4, label=line["arm"])
        if interval["low"] is not None:
            sides = [[max(interval["mean"] - interval["low"], 0.0)], [interval["high"] - interval["mean"]]]
            way.errorbar(shown["places"][-1:], [interval["mean"]], yerr=sides, color=colour, capsize=3)
    way.set(xlabel="steps" if shown["axis"] == "step" else "training FLOPs", ylabel="held-out loss, nats a token")
    losses = [loss for line in lines for loss in line["losses"]]
    if max(losses) > 3 * min(losses):
        way.set_yscale("log")
        plots.plain_ticks(way)
    plots.legend(way)
    bars = []
    for line in lines:
        found = line["right_percent"]
        spread = {} if found["low"] is None else {"low": found["low"], "high": found["high"]}
        bars.append((line["arm"], {"median": found["mean"], **spread}, colours[line["arm"]]))
    for axes in right:
        plots.bar_rows(axes, bars, "{:.1f}")
        axes.set_xlabel("held-out answers that are right, %")
    plots.save(figure, path, title(shown), conditions(shown))


def title(shown: dict[str, Any]) -> str:
    """Which arms' losses are shown to differ from the reference's; else which mean is lowest."""
    sides = {line["arm"]: line["verdict"] for line in shown["lines"] if line["verdict"] in ("lower", "higher")}
    if sides:
        said = ", ".join(f"{arm} {side}" for arm, side in sides.items())
        return f"{shown['data']}, loss beside that of {shown['reference']}: {said}"
    best = min(shown["lines"], key=lambda line: line["loss"]["mean"])
    return (
        f"{shown['data']}: {best['arm']} has the lowest mean loss, {best['loss']['mean']:.3f}; no difference is shown"
    )


def conditions(shown: dict[str, Any]) -> str:
    seeds = shown["lines"][0]["n"]
    over = f"means of {seeds} seeds, bars: 95% intervals" if seeds > 1 else "one seed"
    state = "" if shown["complete"] else "; the claim's runs are not complete"
    return f"{over}; each arm at the best of its settings{state}"
