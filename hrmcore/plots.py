"""Every picture, each from JSON that something else wrote. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d98032"}


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    """A figure and its axes, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is not installed; `pip install hrmcore[bench]` brings it") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def ops(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore.microbench.run` returned: each op's share of the machine's limit, and its speed over torch."""
    lines, machine = report["ops"], report["machine"]
    labels = list(dict.fromkeys(f"{line['op']} {line['direction']}" for line in lines))
    figure, (limit, peer) = _figure(1, 2, (11, 1.6 + 0.5 * len(labels)))
    for offset, (dtype, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        chosen = [line for line in lines if line["dtype"] == dtype]
        places = [labels.index(f"{line['op']} {line['direction']}") + offset for line in chosen]
        for axes, key, text in ((limit, "share_of_limit", "{:.0%}"), (peer, "times_torch", "{:.1f}")):
            bars = axes.barh(places, [line[key] for line in chosen], height=0.38, color=colour, label=dtype)
            axes.bar_label(bars, [text.format(line[key]) for line in chosen], padding=3, fontsize=8)
    limit.set_yticks(range(len(labels)), labels)
    peer.set_yticks(range(len(labels)), [])
    limit.set_xlabel("share of the machine's measured limit")
    limit.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    peer.set_xlabel("speed over plain torch")
    for axes in (limit, peer):
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    peer.legend(frameon=False, loc="lower right")
    figure.suptitle(f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=150)


def decode(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/decode.py measured: decode speed by batch and by context, one line for each dtype."""
    figure, (batches, contexts) = _figure(1, 2, (10, 4))
    for axes, key, label in ((batches, "batches", "sequences together"), (contexts, "contexts", "tokens in the cache")):
        for line in report["lines"]:
            axes.plot([int(x) for x in line[key]], list(line[key].values()), marker="o", label=line["dtype"])
        axes.set_xlabel(label)
        axes.set_ylabel("decoded tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=150)


def peers(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/peers.py measured: prefill and decode speed of every engine."""
    lines = report["lines"]
    figure, panels = _figure(1, 2, (11, 1 + 0.4 * len(lines)))
    for axes, key in zip(panels, ("prefill", "decode"), strict=True):
        bars = axes.barh([line["engine"] for line in lines], [line[key] for line in lines])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_xlabel(f"{key}, tokens/s")
        axes.invert_yaxis()
        axes.margins(x=0.15)  # room for the labels
    figure.savefig(path, dpi=150)


def evals(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore eval` found: right answers with 95% intervals and chance, and the curve over noise."""
    tasks = report["tasks"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        if task["noise"] is not None:
            curves.setdefault(task["task"], []).append(task)
    height = 1.5 + 0.32 * max(len(tasks), 8)
    figure, panels = _figure(1, 2, (11, height)) if curves else _figure(1, 1, (7, height))
    bars = panels[0] if curves else panels
    names = [t["task"] if t["noise"] is None else f"{t['task']}, noise {t['noise']}" for t in tasks]
    style: dict[str, Any] = {"color": COLOURS["float32"], "ecolor": "black", "capsize": 3, "height": 0.6}
    bars.barh(range(len(tasks)), [t["accuracy"] for t in tasks], xerr=_intervals(tasks), **style)
    chances = [(t["chance"], place) for place, t in enumerate(tasks) if t["chance"] is not None]
    if chances:
        bars.plot(*zip(*chances, strict=True), "|", color=COLOURS["bfloat16"], markersize=14, markeredgewidth=2)
    bars.set_yticks(range(len(tasks)), names, fontsize=8)
    bars.set_xlim(0, 1)
    bars.set_xlabel("right answers, 95% interval; orange: chance")
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    if curves:
        _noise_curves(panels[1], curves)
    figure.suptitle(f"{report['model']}, seed {report['seed']}, n = {max(t['n'] for t in tasks)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _noise_curves(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Right answers over the number of irrelevant facts, one line a task; the noise axis is logarithmic above 1."""
    for name, points in curves.items():
        noise, shares = [t["noise"] for t in points], [t["accuracy"] for t in points]
        axes.errorbar(noise, shares, yerr=_intervals(points), marker="o", capsize=3, label=name)
    levels = sorted({t["noise"] for points in curves.values() for t in points})
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("irrelevant facts in the question")
    axes.set_ylim(0, 1)
    axes.set_ylabel("right answers, 95% interval")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _intervals(tasks: list[dict[str, Any]]) -> list[list[float]]:
    """The two sides of each 95% interval, as error bars take them."""
    return [[t["accuracy"] - t["low"] for t in tasks], [t["high"] - t["accuracy"] for t in tasks]]


def training(rows: list[dict[str, float]], path: Path) -> None:
    """Draw the steps that `hrmcore train` recorded: loss, held-out loss and answers, gradients, speed."""
    panels = [
        ("loss, nats a token", ("loss", "heldout_loss"), "log"),
        ("held-out answers that are right", ("heldout_exact",), "linear"),
        ("gradient norm", ("grad_norm",), "log"),
        ("clipped fraction", ("clipped_fraction",), "linear"),
        ("learning rate", ("learning_rate",), "linear"),
        ("tokens/s", ("tokens_per_second",), "linear"),
    ]
    known = {key for row in rows for key in row}
    panels = [panel for panel in panels if panel[1][0] in known]
    figure, grid = _figure(-(-len(panels) // 2), 2, (11, 1 + 2.6 * -(-len(panels) // 2)))
    for axes, (label, keys, scale) in zip(grid.flat, panels, strict=False):
        for key in keys:
            found = [(row["step"], row[key]) for row in rows if key in row]
            if found:
                marker = "o" if key.startswith("heldout") else None
                axes.plot(*zip(*found, strict=True), label=key, linewidth=1, marker=marker, markersize=3)
        axes.set_yscale(scale)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(keys) > 1:
            axes.legend(frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=150)
