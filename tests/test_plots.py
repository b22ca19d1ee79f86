"""The pictures say what the figures say: titles, labels, intervals; docs/results/ can be drawn again from its data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hrmcore import plots

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def drawn(name: str, report: dict[str, Any], path: Path, figures: list[Any]) -> Any:
    getattr(plots, name)(report, path / f"{name}.png")
    assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return figures[-1]


def labels(axes: Any) -> list[str]:
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_peers_are_grey_and_have_intervals(tmp_path: Path, figures: list[Any]) -> None:
    engines = ("hrmcore int8", "transformers bfloat16", "llama.cpp q8_0")
    speed = [{"median": median, "low": median - 1, "high": median + 2} for median in (9.0, 4.0, 3.0)]
    lines = [{"engine": name, "prefill": s, "decode": s} for name, s in zip(engines, speed, strict=True)]
    ratios = {
        "decode: hrmcore int8 / llama.cpp q8_0": {"median": 3.0},
        "prefill: hrmcore int8 / best peer": {"median": 2.25},
    }
    report = {"checkpoint": "1B", "threads": 2, "prefill": 256, "turns": 5, "lines": lines, "ratios": ratios}
    figure = drawn("peers", report, tmp_path, figures)
    title = "Prefill 2.25 to 2.25x as fast as the best peer, decode 3.00 to 3.00x as fast as llama.cpp"
    assert figure.get_suptitle().replace("\n", " ") == title
    prefill, decode = figure.axes
    assert labels(prefill) == list(engines)
    for axes in (prefill, decode):
        assert [bar.get_width() for bar in axes.patches] == [9, 4, 3]
        assert len({bar.get_facecolor() for bar in axes.patches[1:]}) == 1
        assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
        ends = [segment[:, 0].tolist() for bars in axes.collections for segment in bars.get_segments()]
        assert ends == [[8, 11], [3, 6], [2, 5]]


def test_decoding_has_a_line_a_dtype_and_quartiles(tmp_path: Path, figures: list[Any]) -> None:
    line = {
        "batches": {"1": 2.0, "8": 8.0},
        "seconds": {"1": [0.5, 0.4, 0.6], "8": [1.0, 0.9, 1.2]},
        "contexts": {100: 2.0, 4000: 1.0},
    }
    report = {"checkpoint": "1B", "lines": [{"dtype": dtype, **line} for dtype in ("int8", "int4")]}
    figure = drawn("decode", report, tmp_path, figures)
    batches, contexts = figure.axes
    assert [text.get_text() for text in batches.get_legend().get_texts()] == ["int8", "int4"]
    assert figure.get_suptitle() == "int8 decodes 8 tokens/s at a batch of 8"
    [low, high] = batches.collections[0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx(((8 / 1.2 + 8) / 2, (8 / 0.9 + 8) / 2))
    assert len(contexts.containers) == 2


def test_convergence_shows_every_seed(tmp_path: Path, figures: list[Any]) -> None:
    curve = {"step": [1, 2], "seconds": [0.1, 0.2], "heldout_loss": [2.0, 1.0]}
    lines = [
        {"optimizer": name, "learning_rate": 2e-3, "final": [1.0, 1.2], "curves": [curve, curve]}
        for name in ("adamw", "sophia-g")
    ]
    figure = drawn("convergence", {"steps": 2, "lines": lines}, tmp_path, figures)
    steps, seconds, ends = figure.axes
    assert len(steps.lines) == len(seconds.lines) == 4
    assert labels(ends) == ["adamw, rate 0.002", "sophia-g, rate 0.002"]
    assert [text.get_text() for text in ends.texts] == ["1.100", "1.100"]
    assert figure.get_suptitle() == "adamw, rate 0.002 ends lowest, at 1.100"


def test_extrapolation_draws_a_band_over_the_seeds(tmp_path: Path, figures: list[Any]) -> None:
    runs = [
        {"form": form, "loss": {"128": 1.0, "512": end + seed}, "answered": {"16": 1.0, "512": 0.1}}
        for form, end in (("rope", 1.5), ("xpos", 0.9))
        for seed in (0.0, 0.2)
    ]
    figure = drawn("extrapolation", {"trained_at": 128, "runs": runs}, tmp_path, figures)
    assert figure.get_suptitle() == "Loss at 4 times the training length: rope +60.0%, xpos +0.0%"
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 1.7)


def test_bars_mark_a_limit(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"name": "ours", "median": 5.0, "limit": 2.0, "ours": True}, {"name": "theirs", "median": 9.0}]
    report = {"title": "t", "conditions": "c", "panels": [{"label": "ms", "text": "{:.1f}", "rows": rows}]}
    [axes] = drawn("bars", report, tmp_path, figures).axes
    assert [text.get_text() for text in axes.texts] == ["5.0", "9.0"]
    assert [line.get_xdata()[0] for line in axes.lines] == [2.0]


def test_the_results_can_be_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Any]) -> None:
    spec = importlib.util.spec_from_file_location("draw", RESULTS / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    names = sorted(path.stem for path in (RESULTS / "data").glob("*.json"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data").symlink_to(RESULTS / "data")
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.main(names)
    assert len(figures) == len(names)
    for name, figure in zip(names, figures, strict=True):
        assert (RESULTS / "pictures" / f"{name}.png").is_file(), name
        assert figure.get_suptitle()
        assert all(axes.get_xlabel() for axes in figure.axes)


def test_the_pages_have_the_figures_of_the_pictures() -> None:
    """What a picture is drawn from stands in a table, in the same digits."""
    pages = " ".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md"))
    for path in (RESULTS / "data").glob("*.json"):
        for key, value in figures_of(json.loads(path.read_text(encoding="utf-8"))):
            shown = {f"{value:,g}", f"{value:.1f}", f"{value:.2f}", f"{value:.3f}", f"{100 * value:.0f}%"}
            assert any(text in pages for text in shown), (path.name, key, value)


def figures_of(report: Any, key: str = "") -> list[tuple[str, float]]:
    """Every number that was measured, with the key that it stands under."""
    if isinstance(report, dict):
        return [found for name, value in report.items() for found in figures_of(value, name)]
    if isinstance(report, list):
        return [found for value in report for found in figures_of(value, key)]
    measured = isinstance(report, float) and key not in ("budget", "flops_share")
    return [(key, report)] if measured else []
