"""Every picture, each from JSON that something else wrote. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d98032"}


def check(path: Path) -> None:
    """For a command to call before its work: raises ValueError when no picture can be written under this name."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise ValueError("matplotlib is not installed; `pip install hrmcore[bench]` brings it") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path}: a picture's name must end in one of {', '.join(f'.{kind}' for kind in known)}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: no such folder")


def _figure(rows: int, columns: int, size: tuple[float, float], heights: list[float] | None = None) -> Any:
    """A figure and its axes, drawn without a display; `heights` are those of the rows, in proportion."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is not installed; `pip install hrmcore[bench]` brings it") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, height_ratios=heights)


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


def extrapolation(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/extrapolation.py measured: loss by length and answers by distance; a thin line a seed."""
    figure, panels = _figure(1, 2, (11, 4))
    labels = (("loss", "tokens of context", "nats a token"), ("answered", "distance of the fact, tokens", "answered"))
    for axes, (key, across, up) in zip(panels, labels, strict=True):
        forms = list(dict.fromkeys(run["form"] for run in report["runs"]))
        for number, form in enumerate(forms):
            runs = [run[key] for run in report["runs"] if run["form"] == form]
            places = [int(place) for place in runs[0]]
            for values in runs:
                axes.plot(places, list(values.values()), color=f"C{number}", linewidth=0.7, alpha=0.5)
            means = [sum(values[str(place)] for values in runs) / len(runs) for place in places]
            axes.plot(places, means, color=f"C{number}", marker="o", label=form)
        axes.axvline(report["trained_at"], color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    panels[0].legend(frameon=False)
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
        bars = axes.barh([line["engine"] for line in lines], [line[key]["median"] for line in lines])
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


def convergence(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/convergence.py found: every seed's held-out loss by step and by seconds of training."""
    figure, panels = _figure(1, 2, (11, 4))
    for axes, key in zip(panels, ("step", "seconds"), strict=True):
        for index, line in enumerate(report["lines"]):
            for seed, curve in enumerate(line["curves"]):
                label = None if seed else f"{line['optimizer']}, rate {line['learning_rate']:g}"
                axes.plot(curve[key], curve["heldout_loss"], color=f"C{index}", linewidth=1, label=label)
        axes.set_xlabel(key)
        axes.set_ylabel("held-out loss, nats a token")
        axes.set_yscale("log")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def lens(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore inspect` saw: a cell for each layer of each visit, and below them the three curves.

    A cell names the token that the step would have answered; the darker it is, the likelier the token. Its size is
    fixed, so the picture grows with the number of visits and layers, and the text stays readable.
    """
    steps, layers = report["steps"], report["layers"]
    names = list(dict.fromkeys(step["visit"] for step in steps))
    columns = len(names)
    cells = [(names.index(step["visit"]), step["layer"]) for step in steps]
    figure, panels = _figure(
        4, 1, (max(7.0, 1.6 + 1.35 * columns), 1.6 + 0.36 * layers + 4.2), [0.36 * layers, 1.4, 1.4, 1.4]
    )
    grid, *curves = panels
    shares = [[0.0] * columns for _ in range(layers)]
    for step, (column, layer) in zip(steps, cells, strict=True):
        shares[layer][column] = step["probability"]
    grid.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, columns, layers, 0))
    for step, (column, layer) in zip(steps, cells, strict=True):
        share, text = step["probability"], step["text"]
        shown = f"{text if len(text) <= 9 else text[:8] + '…'}  {share:.0%}"
        style: dict[str, Any] = {"color": "white" if share > 0.55 else "black", "fontsize": 9}
        weight = "bold" if step["token"] == steps[-1]["token"] else "normal"
        grid.text(column + 0.5, layer + 0.5, shown, ha="center", va="center", parse_math=False, weight=weight, **style)
    grid.set_xticks([column + 0.5 for column in range(columns)], names)
    grid.xaxis.tick_top()
    grid.set_yticks([layer + 0.5 for layer in range(layers)], [str(layer + 1) for layer in range(layers)])
    grid.tick_params(length=0)
    grid.set_ylabel("layer")
    for axes, key, label in zip(curves, ("kl", "norm", "change"), ("KL to the answer", "norm", "change"), strict=True):
        places = [column + (layer + 0.5) / layers for column, layer in cells]
        axes.plot(places, [step[key] for step in steps], ".-", markersize=4)
        axes.set_xlim(0, columns)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.set_xticks([])
    for axes in panels:
        for column in range(1, columns):
            heavy = names[column - 1].startswith("H")
            axes.axvline(column, color="black" if heavy else "0.75", linewidth=1.6 if heavy else 0.6)
    curves[-1].set_xlabel("visits from first to last, each through all its layers; bold: the token finally answered")
    question = " ".join(report["prompt"].split())
    title = f"{question if len(question) <= 90 else question[:89] + '…'}\n{report['answered']} → {report['answer']}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks is drawn as boxes
        figure.draw_without_rendering()
        cell = 0.92 * grid.get_window_extent().width / columns
        for text in grid.texts:  # a few wide letters take a smaller size
            text.set_fontsize(text.get_fontsize() * min(1.0, cell / text.get_window_extent().width))
        figure.savefig(path, dpi=110)


def growth(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/growth.py measured: held-out loss against FLOPs and against wall-clock, one line a seed."""
    figure, panels = _figure(1, 2, (11, 4.5))
    for axes, key, label in zip(panels, ("flops", "seconds"), ("training FLOPs", "seconds of steps"), strict=True):
        for number, arm in enumerate(report["arms"]):
            for seed, curve in enumerate(arm["curves"]):
                name = f"{arm['name']}, rate {arm['rate']:g}" if seed == 0 else None
                axes.plot(curve[key], curve["losses"], color=f"C{number}", linewidth=1, label=name)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss, nats a token")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def architecture(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/architecture.py found: right answers and held-out loss; a bar is the mean of the seeds."""
    lines = report["lines"]
    data = list(dict.fromkeys(line["data"] for line in lines))
    studies = (
        ("architecture", [line for line in lines if line["objective"] == report["published"]]),
        ("objective", [line for line in lines if line["architecture"] == "HRM"]),
    )
    figure, grid = _figure(2, 2, (12, 6.5))
    labels = ("right answers", "held-out loss, nats a token")
    for row, (key, up) in zip(grid, zip(("exact", "heldout_loss"), labels, strict=True), strict=True):
        for axes, (name, chosen) in zip(row, studies, strict=True):
            groups = list(dict.fromkeys(line[name] for line in chosen))
            for line in chosen:
                number = data.index(line["data"])
                place = groups.index(line[name]) + 0.8 * (number + 0.5) / len(data) - 0.4
                found = [run[key] for run in line["runs"]]
                label = line["data"] if line[name] == groups[0] else None
                axes.bar(place, sum(found) / len(found), 0.75 / len(data), color=f"C{number}", alpha=0.6, label=label)
                axes.plot([place] * len(found), found, ".", color="black", markersize=4)
            axes.set_xticks(range(len(groups)), groups)
            axes.set_ylabel(up)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False)
    flops = ", ".join(f"{name} {next(li['budget'] for li in lines if li['data'] == name):.2g}" for name in data)
    figure.suptitle(f"the same training FLOPs for every cell ({flops}); points: seeds", fontsize=10)
    figure.savefig(path, dpi=150)
