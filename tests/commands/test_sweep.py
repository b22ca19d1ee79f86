"""`hrmcore sweep`: every combination is a run, a killed sweep goes on, the best comes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import hrmcore
from support.runs import WORDS, metrics, repetitions, rewrite, write_run
from support.two_ranks import ENVIRONMENT

from hrmcore.train.sweep import cells_of, table
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_peak", "one_thread")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    keys = {"steps": 4, "batch_tokens": 256, "warmup_steps": 1, "eval_every": 4, "save_every": 1, "check_records": 8}
    heldout = [str(tmp_path / "train.jsonl")]
    return write_run(tmp_path, repetitions(WORDS), heldout_files=heldout, sample_answers=0, **keys)


def result(out: str) -> list[list[str]]:
    """The rows of the table in a command's output."""
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if "heldout_loss" in line)
    return [line.split() for line in lines[start:-2]]


def test_all_combinations_are_trained_and_the_best_is_named(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sweep", str(run_file), "--vary", "learning_rate=1e-5,3e-3", "--set", "seed=1")
    assert hrmcore(*command, "--vary", "betas=[0.9, 0.95],[0.8, 0.95]") == 0
    out, folder = capsys.readouterr().out, tmp_path / "out-sweep"
    heading, *rows = result(out)
    assert heading == ["learning_rate", "betas", "steps", "loss", "heldout_loss", "heldout_exact"]
    assert len(rows) == 4
    assert [row[0] for row in rows] == ["3e-3", "3e-3", "1e-5", "1e-5"]
    losses = [float(row[-2]) for row in rows]
    assert losses == sorted(losses)
    best = folder / f"learning_rate=3e-3,betas={rows[0][1]}_{rows[0][2]}"
    assert out.splitlines()[-2:] == [f"{folder}/sweep.png", f"next: hrmcore repl {best}/checkpoint"]
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert metrics(best)[-1]["heldout_loss"] == pytest.approx(losses[0], abs=5e-5)
    assert len(list(folder.glob("*/checkpoint/config.json"))) == 4
    record = (folder / "sweep.json").stat().st_mtime_ns
    assert hrmcore(*command) == 0  # what is trained is not trained again; one value less is another cell
    assert "run 1 of 2: learning_rate=1e-5" in capsys.readouterr().out
    assert (folder / "sweep.json").stat().st_mtime_ns > record


def test_only_what_is_new_is_trained(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore("sweep", str(run_file), "--vary", "seed=0,1") == 0
    first = result(capsys.readouterr().out)
    trained: list[str] = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trained.append(self.out.name) or run(self))
    assert hrmcore("sweep", str(run_file), "--vary", "seed=0,1,2") == 0
    assert trained == ["seed=2"]
    assert {tuple(row) for row in first} < {tuple(row) for row in result(capsys.readouterr().out)}


def test_a_run_that_becomes_no_number_does_not_end_the_sweep(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore("sweep", str(run_file), "--vary", "learning_rate=1e6,1e-3") == 0
    out = capsys.readouterr().out
    assert "learning_rate=1e6: step " in out
    rows = result(out)
    assert rows[1][0] == "1e-3"
    assert rows[2] == ["1e6", "-", "-", "-", "-", "became", "no", "number"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_gives_what_an_undisturbed_one_does(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vary = ["sweep", str(run_file), "--vary", "learning_rate=1e-4,1e-3", "--set", "steps=40"]
    child = subprocess.Popen(
        [sys.executable, "-m", "hrmcore", *vary, "--out", str(tmp_path / "killed")],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    second = tmp_path / "killed/learning_rate=1e-3/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (second.is_file() and len(second.read_text().splitlines()) >= 5):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = json.loads((tmp_path / "killed/sweep.json").read_text())["runs"]
    assert list(done) == ["learning_rate=1e-4"]
    assert hrmcore(*vary, "--out", str(tmp_path / "killed")) == 0
    killed = result(capsys.readouterr().out)
    assert hrmcore(*vary, "--out", str(tmp_path / "whole")) == 0
    assert killed == result(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary", "learning_rate"], "--vary must be KEY=VALUE,VALUE,…, got 'learning_rate'"),
        (["--vary", "seed="], "--vary must be KEY=VALUE,VALUE,…, got 'seed='"),
        (["--vary", "seed=1,1"], "--vary seed: a value is there twice in 1,1"),
        (["--vary", "seed=1", "--vary", "seed=2"], "--vary seed: is there twice"),
        (["--vary", "out=a,b"], "--vary out: each run has a folder of its own anyway; --out names the one around them"),
        (["--vary", "betas=[0.9"], "--vary: not a list of values: [0.9"),
        (["--vary", "sede=1"], "RUN: unknown key 'sede'"),
        (["--vary", "learning_rate=1e-3,fast"], "learning_rate=fast: RUN: learning_rate must be of type float"),
        (["--vary", f"seed={','.join(map(str, range(1001)))}"], "--vary: 1001 runs; a sweep has at most 1000"),
    ],
)
def test_what_cannot_be_varied_is_one_line_before_the_first_run(
    run_file: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore("sweep", str(run_file), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hrmcore sweep: {said.replace('RUN', str(run_file))}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out-sweep").exists()


def test_another_run_file_is_another_sweep(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hrmcore("sweep", str(run_file), "--vary", "seed=0") == 0
    rewrite(run_file, "batch_tokens = 256", "batch_tokens = 128")
    assert hrmcore("sweep", str(run_file), "--vary", "seed=0") == 2
    assert "a sweep of another run file, or with other --set; name another --out" in capsys.readouterr().err


def test_names_and_tables() -> None:
    assert [cell.name for cell in cells_of(["model.head_dim=32,64", "optimizer=adamw"])] == [
        "model.head_dim=32,optimizer=adamw",
        "model.head_dim=64,optimizer=adamw",
    ]
    [cell] = cells_of(["train_files=['a/b.jsonl']"])
    assert "/" not in cell.name
    lines = table([(cell, {"steps": 3, "loss": 1.0}), (cell, {"failed": "step 0"})])
    assert [line.split() for line in lines] == [
        ["train_files", "steps", "loss"],
        ['["a/b.jsonl"]', "3", "1.0000"],
        ['["a/b.jsonl"]', "-", "-", "became", "no", "number"],
    ]
