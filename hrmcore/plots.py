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
