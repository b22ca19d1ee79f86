"""Every picture, in one style, each from JSON that something else wrote. Needs matplotlib (the extra `bench`).

Ours is in colour, what it is compared with in grey, intervals are bars or bands. A title says what was found, the line
at the bottom under which conditions.
"""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

OURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: safe for colour-blind eyes
PEERS = ("#6e6e6e", "#a6a6a6")
FAINT = "#d9d9d9"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "figure.dpi": 100,
}

Row = tuple[str, Sequence[float], str]  # a label, its values, a colour


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


def figure_with(rows: int, columns: int, size: tuple[float, float], heights: list[float] | None = None) -> Any:
    """A figure in our style and its axes (rows, columns), drawn without a display; `heights` are those of the rows."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is not installed; `pip install hrmcore[bench]` brings it") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, height_ratios=heights, squeeze=False)
        for axes in grid.flat:
            axes.tick_params(labelsize=STYLE["xtick.labelsize"], length=3)
    return figure, grid


def save(figure: Any, path: Path, finding: str, conditions: str = "") -> None:
    """Write the picture, with what it says above and its conditions below."""
    width = figure.get_size_inches()[0]
    title = "\n".join(textwrap.wrap(finding, int(8.5 * width)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold", parse_math=False)
    if conditions:
        below = "\n".join(textwrap.wrap(conditions, int(13 * width)))
        figure.supxlabel(below, x=0.01, ha="left", fontsize=9, color=PEERS[0], parse_math=False)
    figure.savefig(path, dpi=150)


def legend(axes: Any, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=10, **place)


def bar_rows(axes: Any, rows: Iterable[tuple[str, dict[str, float], str]], text: str) -> None:
    """Horizontal bars from the top, a row being (label, {median, low, high}, colour), the interval and the value shown.

    `low` and `high` may be missing; `limit`, where it is there, is drawn as a mark that the bar could reach.
    """
    rows = list(rows)
    for place, (_, found, colour) in enumerate(rows):
        value, low, high = found["median"], found.get("low"), found.get("high")
        sides = None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        axes.barh(place, value, xerr=sides, height=0.66, color=colour, ecolor="black", capsize=3)
        if "limit" in found:
            axes.plot([found["limit"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        _value(axes, text.format(value), max(value, high or value), place)
    _name_rows(axes, [label for label, _, _ in rows])
    most = max(max(found.get(key) or 0.0 for key in ("median", "high", "limit")) for _, found, _ in rows)
    axes.set_xlim(0, 1.2 * most or 1.0)


def _value(axes: Any, text: str, end: float, place: float) -> None:
    axes.annotate(text, (end, place), (7, 0), textcoords="offset points", va="center", fontsize=10)


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _seeds(axes: Any, rows: Sequence[Row], text: str) -> None:
    """A line a row from the least to the most of its values, a point for each, a mark and a number at their mean."""
    for place, (_, values, colour) in enumerate(rows):
        mean = fmean(values)
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=6, alpha=0.6)
        axes.plot([mean], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)
        _value(axes, text.format(mean), max(values), place)
    _name_rows(axes, [label for label, _, _ in rows])
    low, high = min(min(values) for _, values, _ in rows), max(max(values) for _, values, _ in rows)
    room = high - low or 1.0
    axes.set_xlim(low - 0.08 * room, high + 0.2 * room)


def ops(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore.microbench.run` returned: each op's share of the machine's limit, and its speed over torch."""
    lines, machine = report["ops"], report["machine"]
    labels = list(dict.fromkeys(f"{line['op']} {line['direction']}" for line in lines))
    figure, [[limit, peer]] = figure_with(1, 2, (11, 2 + 0.5 * len(labels)))
    for offset, dtype, colour in ((-0.2, "float32", OURS[0]), (0.2, "bfloat16", OURS[1])):
        chosen = [line for line in lines if line["dtype"] == dtype]
        places = [labels.index(f"{line['op']} {line['direction']}") + offset for line in chosen]
        for axes, key, text in ((limit, "share_of_limit", "{:.0%}"), (peer, "times_torch", "{:.1f}")):
            bars = axes.barh(places, [line[key] for line in chosen], height=0.38, color=colour, label=dtype)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.bar_label(bars, [text.format(line[key]) for line in chosen], padding=3, fontsize=9, bbox=behind)
    _name_rows(limit, labels)
    _name_rows(peer, [""] * len(labels))
    limit.set_xlabel("share of the machine's measured limit")
    limit.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    peer.set_xlabel("speed over plain torch")
    for axes in (limit, peer):
        axes.axvline(1, color="black", linewidth=1, linestyle="--", zorder=1.5)
        axes.margins(x=0.12)
    legend(peer, loc="lower right")
    faster = sum(line["times_torch"] > 1 for line in lines)
    conditions = f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads"
    save(figure, path, f"{faster} of {len(lines)} kernels are faster than plain torch", conditions)


def extrapolation(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/studies/extrapolation.py measured: loss by length, answers by distance; a band over the seeds."""
    runs, trained = report["runs"], report["trained_at"]
    forms = list(dict.fromkeys(run["form"] for run in runs))
    colours = dict(zip(forms, (PEERS[0], OURS[1], OURS[0], *OURS[2:]), strict=False))
    figure, [panels] = figure_with(1, 2, (11, 4.6))
    labels = (("loss", "tokens of context", "nats a token"), ("answered", "tokens to the fact", "facts answered"))
    for axes, (key, across, up) in zip(panels, labels, strict=True):
        for form in forms:
            found = [run[key] for run in runs if run["form"] == form]
            places = [int(place) for place in found[0]]
            seeds = [[values[str(place)] for values in found] for place in places]
            axes.fill_between(places, [min(s) for s in seeds], [max(s) for s in seeds], color=colours[form], alpha=0.18)
            axes.plot(places, [fmean(s) for s in seeds], color=colours[form], marker="o", linewidth=2, label=form)
        axes.axvline(trained, color="black", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        ticks = [place for place in places if place & (place - 1) == 0 or place == places[-1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(xlabel=across, ylabel=up)
    legend(panels[0], loc="center right", bbox_to_anchor=(1, 0.3))

    lengths = [int(length) for length in runs[0]["loss"]]
    far = 4 * trained if 4 * trained in lengths else max(lengths)
    rises = []
    for form in forms:
        losses = [run["loss"] for run in runs if run["form"] == form]
        before, after = (fmean(loss[str(length)] for loss in losses) for length in (trained, far))
        rises.append(f"{form} {after / before - 1:+.1%}")
    conditions = f"trained on {trained} tokens (dashed); means of {report.get('seeds', len(runs) // len(forms))} seeds"
    conditions += ", band: all of them" if len(runs) > len(forms) else ""
    save(figure, path, f"Loss at {far / trained:.0f} times the training length: {', '.join(rises)}", conditions)


def decode(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/speed/decode.py measured: decode speed by batch and by context, one line for each dtype."""
    figure, [[batches, contexts]] = figure_with(1, 2, (11, 4.6))
    for axes, key, label in ((batches, "batches", "sequences together"), (contexts, "contexts", "tokens in the cache")):
        for line, colour in zip(report["lines"], OURS, strict=False):
            places, speeds = [int(place) for place in line[key]], list(line[key].values())
            sides = _quartiles(line) if key == "batches" and line.get("seconds") else None
            style: dict[str, Any] = {"marker": "o", "linewidth": 2, "capsize": 3, "color": colour}
            axes.errorbar(places, speeds, yerr=sides, label=line["dtype"], **style)
        axes.set(xlabel=label, ylabel="decoded tokens/s")
        axes.set_ylim(bottom=0)
    legend(batches)
    best = max(report["lines"], key=lambda line: max(line["batches"].values(), default=0.0))
    batch, speed = max(best["batches"].items(), key=lambda item: item[1], default=("0", 0.0))
    finding = f"{best['dtype']} decodes {speed:.3g} tokens/s at a batch of {batch}"
    save(figure, path, finding, f"{report['checkpoint']}; bars: quartiles of the turns")


def _quartiles(line: dict[str, Any]) -> list[list[float]]:
    """How far the quartiles of the turns lie below and above each batch's speed."""
    speeds = [[int(batch) / taken for taken in turns] for batch, turns in line["seconds"].items()]
    found = [quantiles(turns, n=4, method="inclusive") if len(turns) > 1 else turns * 3 for turns in speeds]
    middles = list(line["batches"].values())
    below = [max(middle - low, 0.0) for middle, (low, _, _) in zip(middles, found, strict=True)]
    return [below, [max(high - middle, 0.0) for middle, (_, _, high) in zip(middles, found, strict=True)]]


def peers(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/speed/peers.py measured: prefill and decode speed of every engine, with intervals."""
    lines = report["lines"]
    figure, [panels] = figure_with(1, 2, (11, 1.8 + 0.42 * len(lines)))
    for axes, key in zip(panels, ("prefill", "decode"), strict=True):
        colours = [OURS[0] if line["engine"].startswith("hrmcore") else PEERS[1] for line in lines]
        bar_rows(axes, [(li["engine"], li[key], colour) for li, colour in zip(lines, colours, strict=True)], "{:.4g}")
        axes.set_xlabel(f"{key}, tokens/s")
    panels[1].set_yticklabels([])
    leads = [_lead(report["ratios"], "prefill", "the best peer"), _lead(report["ratios"], "decode", "llama.cpp")]
    finding = ", ".join(lead for lead in leads if lead) or "prefill and decode of each engine"
    conditions = f"{report['checkpoint']}, {report['threads']} threads, prompts of {report['prefill']} tokens; "
    save(figure, path, finding.capitalize(), conditions + f"medians of {report['turns']} turns, 95% intervals")


def _lead(ratios: dict[str, dict[str, float]], key: str, peer: str) -> str:
    """From least to most, the medians of our speed over a peer's within a turn; empty where there is none."""
    found = [ratio["median"] for name, ratio in ratios.items() if name.startswith(key)]
    return f"{key} {min(found):.2f} to {max(found):.2f}x as fast as {peer}" if found else ""


def bars(report: dict[str, Any], path: Path) -> None:
    """Draw measurements as bars: {title, conditions, panels: [{label, text, rows: [{name, median}]}]}.

    A row may have `low` and `high` (an interval), `limit` (a mark) and `ours` (true: in colour).
    """
    panels = report["panels"]
    most = max(len(panel["rows"]) for panel in panels)
    figure, [grid] = figure_with(1, len(panels), (5.5 * len(panels), 1.8 + 0.42 * most))
    for axes, panel in zip(grid, panels, strict=True):
        rows = [(row["name"], row, OURS[0] if row.get("ours") else PEERS[1]) for row in panel["rows"]]
        bar_rows(axes, rows, panel["text"])
        axes.set_xlabel(panel["label"])
    save(figure, path, report["title"], report["conditions"])


def evals(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore eval` found: right answers with 95% intervals and chance, and the curve over noise."""
    tasks = report["tasks"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        if task["noise"] is not None:
            curves.setdefault(task["task"], []).append(task)
    height = 2 + 0.36 * max(len(tasks), 8)
    figure, [panels] = figure_with(1, 2, (11, height)) if curves else figure_with(1, 1, (7.5, height))
    names = [t["task"] if t["noise"] is None else f"{t['task']}, noise {t['noise']}" for t in tasks]
    found = [{"median": t["accuracy"], "low": t["low"], "high": t["high"]} for t in tasks]
    bar_rows(panels[0], [(name, line, OURS[0]) for name, line in zip(names, found, strict=True)], "{:.0%}")
    chances = [(t["chance"], place) for place, t in enumerate(tasks) if t["chance"] is not None]
    if chances:
        places = zip(*chances, strict=True)
        panels[0].plot(*places, "|", color=OURS[1], markersize=16, markeredgewidth=2.5, label="chance")
        legend(panels[0], loc="lower right")
    panels[0].set_xlim(0, 1.15)
    panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    panels[0].set_xlabel("right answers")
    if curves:
        _noise_curves(panels[1], curves)
    above = [t["low"] > t["chance"] for t in tasks if t["chance"] is not None]
    finding = f"{sum(above)} of {len(above)} tasks are answered above chance" if above else "Right answers by task"
    conditions = f"{report['model']}, seed {report['seed']}, n = {max(t['n'] for t in tasks)}, 95% intervals"
    save(figure, path, finding, conditions)


def _noise_curves(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Right answers over the number of irrelevant facts, one line a task; the noise axis is logarithmic above 1."""
    for (name, points), colour in zip(curves.items(), OURS, strict=False):
        noise, shares = [t["noise"] for t in points], [t["accuracy"] for t in points]
        sides = [[t["accuracy"] - t["low"] for t in points], [t["high"] - t["accuracy"] for t in points]]
        axes.errorbar(noise, shares, yerr=sides, marker="o", capsize=3, linewidth=2, color=colour, label=name)
    levels = sorted({t["noise"] for points in curves.values() for t in points})
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("irrelevant facts in the question")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("right answers")
    legend(axes)


def training(runs: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the steps that runs of `hrmcore train` recorded, by name: loss, held-out loss and answers, and so on."""
    panels = [
        ("loss, nats a token", ("loss", "heldout_loss"), "log"),
        ("held-out answers that are right", ("heldout_exact",), "linear"),
        ("gradient norm", ("grad_norm",), "log"),
        ("clipped fraction", ("clipped_fraction",), "linear"),
        ("learning rate", ("learning_rate",), "linear"),
        ("tokens/s", ("tokens_per_second",), "linear"),
    ]
    known = {key for rows in runs.values() for row in rows for key in row}
    panels = [panel for panel in panels if panel[1][0] in known]
    figure, grid = figure_with(-(-len(panels) // 2), 2, (11, 1.4 + 2.6 * -(-len(panels) // 2)))
    for axes, (label, keys, scale) in zip(grid.flat, panels, strict=False):
        for number, (name, rows) in enumerate(runs.items()):
            for part, key in enumerate(keys, number) if len(runs) == 1 else ((number, key) for key in keys):
                _curve(axes, rows, key, OURS[part % len(OURS)], name, len(runs) == 1)
        axes.set(xlabel="step", ylabel=label, yscale=scale)
        if scale == "log":
            plain_ticks(axes)
        if len(axes.lines) > 1:
            legend(axes)
    grid.flat[-1].set_visible(len(panels) % 2 == 0)
    key, what = ("heldout_loss", "Held-out loss") if "heldout_loss" in known else ("loss", "Loss")
    ends = [[(row[key], row["step"], n) for row in rows if key in row][-1:] for n, rows in runs.items()]
    loss, step, name = min(itertools.chain(*ends))
    save(figure, path, f"{what} {loss:.3g} after {step:,.0f} steps" + (f": {name} is lowest" if len(runs) > 1 else ""))


def _curve(axes: Any, rows: list[dict[str, float]], key: str, colour: str, run: str, alone: bool) -> None:
    """One figure of a run over its steps; beside other runs, training is drawn fainter than held-out records."""
    heldout = key.startswith("heldout")
    if found := [(row["step"], row[key]) for row in rows if key in row]:
        name = ("" if alone else f"{run}, ") + ("held-out" if heldout else "training")
        style = {"marker": "o", "markersize": 4} if heldout else {"alpha": 1 if alone else 0.5}
        axes.plot(*zip(*found, strict=True), color=colour, label=name, **style)


def plain_ticks(axes: Any) -> None:
    """Numbers as 0.9 and 2 on a logarithmic axis, not as powers of ten."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.1g}" if high < 10 * low else "")
    axes.tick_params(axis="y", which="minor", labelsize=STYLE["ytick.labelsize"])


def _study(
    lines: Sequence[Row], curves: dict[str, list[dict[str, list[float]]]], panels: dict[str, str], loss: str
) -> Any:
    """A figure of held-out losses: each seed's curve over what `panels` names, then the last values of every line."""
    drawn = panels if any(curves.values()) else {}
    size = (4.4 * len(drawn) + 5.2 if drawn else 8.5, 4.6 if drawn else 1.9 + 0.45 * len(lines))
    figure, [grid] = figure_with(1, len(drawn) + 1, size)
    for axes, (key, across) in zip(grid, drawn.items(), strict=False):
        for label, _, colour in lines:
            for curve in curves[label]:
                axes.plot(curve[key], curve[loss], color=colour, linewidth=1.5)
        axes.set(xlabel=across, ylabel="held-out loss, nats a token")
        axes.set_yscale("log")
        plain_ticks(axes)
    _seeds(grid[-1], lines, "{:.3f}")
    grid[-1].set_xlabel("held-out loss at the end, nats a token")
    return figure


def convergence(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/studies/convergence.py found: every seed's held-out loss by step and seconds, and at the end."""
    lines = report["lines"]
    labels = [line.get("label") or f"{line['optimizer']}, rate {line['learning_rate']:g}" for line in lines]
    ours = [line["optimizer"].startswith("sophia") for line in lines]
    rows = _rows(labels, [line["final"] for line in lines], ours)
    curves = {label: line.get("curves", []) for label, line in zip(labels, lines, strict=True)}
    figure = _study(rows, curves, {"step": "step", "seconds": "seconds of training"}, "heldout_loss")
    best = min(rows, key=lambda row: fmean(row[1]))
    finding = report.get("title") or f"{best[0]} ends lowest, at {fmean(best[1]):.3f}"
    save(figure, path, finding, f"{report['steps']} steps; points: seeds, mark: their mean")


def _rows(labels: Sequence[str], values: Sequence[Sequence[float]], ours: Sequence[bool]) -> list[Row]:
    """Each label's values with a colour: the next of ours, or the next grey."""
    left, grey = iter(OURS * len(ours)), iter(PEERS * len(ours))
    colours = [next(left if one else grey) for one in ours]
    return list(zip(labels, values, colours, strict=True))


def growth(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/studies/growth.py measured: held-out loss by FLOPs, by wall-clock and at the end."""
    arms = report["arms"]
    labels = [f"{arm['name']}, rate {arm['rate']:g}" for arm in arms]
    rows = _rows(labels, [arm["final_losses"] for arm in arms], [arm["name"] != "scratch" for arm in arms])
    curves = {label: arm.get("curves", []) for label, arm in zip(labels, arms, strict=True)}
    figure = _study(rows, curves, {"flops": "training FLOPs", "seconds": "seconds of steps"}, "losses")
    ends = {arm["name"]: fmean(arm["final_losses"]) for arm in arms}
    share = next(fmean(arm["flops_share"]) for arm in arms if arm["name"] == "grown")
    apart = ends["grown"] / ends["scratch"] - 1
    side = "above" if apart > 0 else "below"
    finding = f"Growing ends {abs(apart):.0%} {side} the loss from scratch, for {share:.0%} of the FLOPs"
    save(figure, path, finding, "points: seeds, mark: their mean")


def architecture(report: dict[str, Any], path: Path) -> None:
    """Draw what bench/studies/architecture.py found: answers and losses of every seed, a column a data set."""
    lines = report["lines"]
    data = list(dict.fromkeys(line["data"] for line in lines))
    kinds = len(lines) // len(data)
    figure, grid = figure_with(2, len(data), (5.6 * len(data), 2 * (1 + 0.4 * kinds)))
    measures = (("exact", "right answers", "{:.1%}"), ("heldout_loss", "held-out loss, nats a token", "{:.3g}"))
    for axes_of_row, (key, label, text) in zip(grid, measures, strict=True):
        for axes, name in zip(axes_of_row, data, strict=True):
            chosen = [line for line in lines if line["data"] == name]
            rows = [_cell(line, report["published"], key) for line in chosen]
            _seeds(axes, rows, text)
            axes.set_xlim(0, 1.15 * max(max(values) for _, values, _ in rows) or 1.0)
            axes.set_xlabel(label)
            if key == "exact":
                axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        for axes in axes_of_row[1:]:
            axes.set_yticklabels([])
    for axes, name in zip(grid[0], data, strict=True):
        budget = next(line["budget"] for line in lines if line["data"] == name)
        axes.set_title(f"{name}, {budget:.2g} FLOPs a run")
    published = [line for line in lines if line["objective"] == report["published"]]
    best = [max((li for li in published if li["data"] == name), key=_exact) for name in data]
    leads = ", ".join(f"{line['architecture']} on {line['data']} ({_exact(line):.0%})" for line in best)
    conditions = "the same training FLOPs for every cell of a data set; points: seeds, mark: their mean"
    save(figure, path, f"Most right answers: {leads}", conditions)


def _exact(line: dict[str, Any]) -> float:
    return fmean(run["exact"] for run in line["runs"])


def _cell(line: dict[str, Any], published: str, key: str) -> Row:
    """The seeds of an architecture, or of one of HRM's other objectives."""
    values = [run[key] for run in line["runs"]]
    if line["objective"] != published:
        return f"HRM, {line['objective']}", values, OURS[5]
    return line["architecture"], values, OURS[0] if line["architecture"] == "HRM" else PEERS[0]


def lens(report: dict[str, Any], path: Path) -> None:
    """Draw what `hrmcore inspect` saw: a cell for each layer of each visit, and below them the three curves.

    A cell names the token that the step would have answered; the darker it is, the likelier the token. Its size is
    fixed, so the picture grows with the number of visits and layers, and the text stays readable.
    """
    steps, layers = report["steps"], report["layers"]
    names = list(dict.fromkeys(step["visit"] for step in steps))
    columns = len(names)
    cells = [(names.index(step["visit"]), step["layer"]) for step in steps]
    size = max(7.0, 1.6 + 1.35 * columns), 2.2 + 0.36 * layers + 3.3
    figure, panels = figure_with(4, 1, size, [0.36 * layers, 1.1, 1.1, 1.1])
    grid, *curves = panels[:, 0]
    _tokens(grid, report, names, cells)
    for axes, key, label in zip(curves, ("kl", "norm", "change"), ("KL to\nthe answer", "norm", "change"), strict=True):
        places = [column + (layer + 0.5) / layers for column, layer in cells]
        axes.plot(places, [step[key] for step in steps], ".-", markersize=6, color=OURS[0])
        axes.set_xlim(0, columns)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.set_xticks([])
    for axes in panels[:, 0]:
        for column in range(1, columns):
            heavy = names[column - 1].startswith("H")
            axes.axvline(column, color="black" if heavy else FAINT, linewidth=1.6 if heavy else 0.8, zorder=1)
    figure.align_ylabels()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks is drawn as boxes
        figure.draw_without_rendering()
        cell = 0.92 * grid.get_window_extent().width / columns
        for text in grid.texts:  # a few wide letters take a smaller size
            text.set_fontsize(text.get_fontsize() * min(1.0, cell / text.get_window_extent().width))
        asked = " ".join(report["prompt"].split())[:90]
        below = f"{asked} {report['answered']}→ {report['answer']}; a column a visit, bold: the token finally answered"
        save(figure, path, _standing(report), below)


def _tokens(grid: Any, report: dict[str, Any], names: list[str], cells: list[tuple[int, int]]) -> None:
    """The upper panel of the lens: every layer's token in its cell (column, layer), the likelier the darker."""
    steps, layers, columns = report["steps"], report["layers"], len(names)
    shares = [[0.0] * columns for _ in range(layers)]
    for step, (column, layer) in zip(steps, cells, strict=True):
        shares[layer][column] = step["probability"]
    grid.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, columns, layers, 0))
    grid.grid(False)
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


def _standing(report: dict[str, Any]) -> str:
    """From which visit on every visit ends in the token that is answered, and what the H before it would have said."""
    last: dict[str, dict[str, Any]] = {step["visit"]: step for step in report["steps"]}
    answer, visits = report["steps"][-1]["token"], list(last)
    other = [place for place, visit in enumerate(visits) if last[visit]["token"] != answer]
    if not other:
        return f"The answer {report['answer']} stands from the first visit on"
    since = visits[other[-1] + 1]
    said = [f"; {visit} said {last[visit]['text']}" for visit in visits[: other[-1] + 1] if visit.startswith("H")]
    return f"The answer {report['answer']} stands from {since} on" + (said[-1] if said else "")
