"""hrmcore plot: the curves of one run and of several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import rewrite

from hrmcore.cli import main
from hrmcore.commands.plot import read_metrics
from hrmcore.train.run_file import (
    read_config,
)
from hrmcore.train.trainer import Trainer


def test_the_curves_are_drawn(run_file: Path, figures: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(rewrite(run_file, "seed = 7", 'seed = 7\noptimizer = "sophia-g"'))
    Trainer(config).run()
    capsys.readouterr()
    assert main(["plot", config.out]) == 0
    picture = Path(config.out) / "curves.png"
    assert capsys.readouterr().out == f"{picture}\n"
    panels = {axes.get_ylabel(): axes for axes in figures[0].axes}
    assert panels.keys() >= {"loss, nats a token", "gradient norm", "clipped fraction", "tokens/s"}
    legend = panels["loss, nats a token"].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["training", "held-out"]
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert list(panels["gradient norm"].lines[0].get_ydata()) == [row["grad_norm"] for row in rows]
    assert (
        figures[0].get_suptitle() == f"Held-out loss {rows[-1]['heldout_loss']:.3g} after {rows[-1]['step']:.0f} steps"
    )
    file = Path(config.out) / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 13, "lo')  # being written
    assert len(read_metrics(file)) == 12
    file.write_text("[1]\n")
    assert main(["plot", config.out]) == 2
    assert capsys.readouterr().err == f"hrmcore plot: {file}:1: not a step's metrics\n"
    assert main(["plot", config.out + "/nothing"]) == 2


def test_runs_are_drawn_over_one_another_and_written_as_a_table(
    tmp_path: Path, figures: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, losses in (("a", (4.0, 3.0)), ("b", (4.0, 2.0))):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": loss, "heldout_loss": loss + 1} for step, loss in enumerate(losses, start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["plot", *runs, "--out", str(tmp_path / "both.png")]) == 0
    legend = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["a, training", "a, held-out", "b, training", "b, held-out"]
    assert list(figures[0].axes[0].lines[2].get_ydata()) == [4.0, 2.0]
    assert figures[0].get_suptitle() == "Held-out loss 3 after 2 steps: b is lowest"
    capsys.readouterr()
    assert main(["plot", runs[1], "--csv"]) == 0
    table = tmp_path / "b" / "metrics.csv"
    assert capsys.readouterr().out == f"{table}\n"
    assert table.read_text() == "step,loss,heldout_loss\n1.0,4.0,5.0\n2.0,2.0,3.0\n"
    assert main(["plot", *runs, "--csv", "--out", str(tmp_path / "both.csv")]) == 0
    assert (tmp_path / "both.csv").read_text().splitlines()[::3] == ["run,step,loss,heldout_loss", "b,1.0,4.0,5.0"]


def test_plot_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "curves.docx")]) == 2
    assert "curves.docx: a picture's name must end in one of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert main(["plot", str(tmp_path)]) == 2
    said = "hrmcore plot: matplotlib is not installed; `pip install hrmcore[bench]` brings it\n"
    assert capsys.readouterr().err == said
