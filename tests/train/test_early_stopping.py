"""Runs that end when they no longer get better, states exported and continued by their step, resuming in an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import hrmcore
from support.runs import final_state, metrics, rewrite

from hrmcore.checkpoint.hrm_text import load_model
from hrmcore.checkpoint.training_state import find_states, load_state, save_state, state_path
from hrmcore.data import packing
from hrmcore.data.packing import BatchStream
from hrmcore.data.records import Corpus
from hrmcore.train import resume, validation
from hrmcore.train.early_stopping import EarlyStopping
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_peak", "one_thread")


def heldout_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """What the validations of runs find, one after the other."""
    found = iter(losses)
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(found))


def averages(out: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = final_state(out, step)
    return {name.removeprefix("optimizer.ema."): t for name, t in tensors.items() if name.startswith("optimizer.ema.")}


def check_exported(folder: Path, out: Path, step: int) -> None:
    """The checkpoint has the averaged weights of a step, in bfloat16."""
    weights = load_model(folder).state_dict()
    for name, tensor in averages(out, step).items():
        assert torch.equal(weights[name], tensor.bfloat16().float()), name


def test_the_best_state_is_kept_and_exported_and_the_run_ends(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rewrite(run_file, "eval_every = 6", "eval_every = 2\npatience = 2\nkeep = 1\ncheck_records = 0")
    heldout_losses(monkeypatch, [3.0, 2.0, 2.5, float("nan"), 1.0, 1.5])
    assert hrmcore("train", str(run_file)) == 0
    assert [row["step"] for row in metrics(out)][-1] == 8
    assert [step for step, _ in find_states(out)] == [8, 4]
    said = capsys.readouterr().err
    assert "no better validation in 2: the best was that after step 4" in said
    assert f"{out}/checkpoint: of step 4, the best validation" in said
    check_exported(out / "checkpoint", out, 4)
    assert hrmcore("train", str(run_file)) == 0  # it stays ended
    assert len(metrics(out)) == 8
    rewrite(run_file, "patience = 2", "patience = 3")
    assert hrmcore("train", str(run_file)) == 0  # and goes on when it may wait longer: 1.0 is the best
    assert metrics(out)[-1]["step"] == 12
    assert [step for step, _ in find_states(out)] == [12, 10]
    check_exported(out / "checkpoint", out, 10)


def test_a_resumed_run_knows_the_best_of_before(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(run_file, "eval_every = 6", "eval_every = 2\npatience = 3\ncheck_records = 0")
    heldout_losses(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0])
    config = read_config(run_file)
    first = Trainer(config)
    first.config = read_config(run_file, ["steps=6"])  # it is killed after its sixth step, so to speak
    first._train()
    first.save()
    first.close()
    second = Trainer(config)
    assert (second.step, second._stopping) == (6, EarlyStopping(3, 4, 1.0, 1))
    second.run()
    assert metrics(tmp_path / "out")[-1]["step"] == 10
    check_exported(tmp_path / "out/checkpoint", tmp_path / "out", 4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("patience = -1", "train config: patience must be at least 0, got -1"),
        ("patience = 1.5", "patience must be of type int, got 1.5"),
        (
            "patience = 2\nheldout_files = []",
            "train config: patience waits for a better validation; name heldout_files",
        ),
    ],
)
def test_a_patience_that_cannot_be(run_file: Path, keys: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in run_file.read_text().splitlines() if "heldout" not in line or "heldout" not in keys]
    run_file.write_text("\n".join([keys, *lines]))
    assert hrmcore("train", str(run_file)) == 2
    assert capsys.readouterr().err == f"hrmcore train: {run_file}: {said}\n"


def test_a_run_that_has_not_ended_says_how_to_use_it(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(read_config(run_file))
    trainer._train_step()
    trainer.save()
    trainer.close()
    out = tmp_path / "out"
    for command in (["generate", "?", "--model", str(out)], ["convert", str(out), str(tmp_path / "packed")]):
        capsys.readouterr()
        assert hrmcore(*command) == 2
        said = f"{out}: a run folder without a checkpoint; `hrmcore export {out}` writes one"
        assert capsys.readouterr().err == f"hrmcore {command[0]}: {said}\n"
    assert hrmcore("export", str(out)) == 0
    assert hrmcore("generate", "repeat alpha beta", "--model", str(out / "checkpoint-1"), "--max-new-tokens", "2") == 0


def test_any_kept_state_is_exported_by_its_step(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert hrmcore("train", str(rewrite(run_file, "save_every = 4", "save_every = 4\nkeep_every = 4"))) == 0
    capsys.readouterr()
    assert hrmcore("export", str(out), "--step", "4") == 0
    assert capsys.readouterr().out.startswith(f"{out}/checkpoint-4: the model after step 4, for hrmcore repl, ")
    check_exported(out / "checkpoint-4", out, 4)
    assert hrmcore("export", str(out), "--out", str(tmp_path / "last"), "--dtype", "float32") == 0
    for name, tensor in load_model(tmp_path / "last").state_dict().items():
        if name in averages(out, 12):
            assert torch.equal(tensor, averages(out, 12)[name])
    task = tmp_path / "train.jsonl"
    command = ["eval", "--model", str(out / "checkpoint-4"), "--tasks", str(task), "--n", "2", "--max-new-tokens", "2"]
    assert hrmcore(*command) == 0
    capsys.readouterr()
    for arguments, said in (
        (["--step", "5"], f"{out}: no state after step 5; there are 4, 8, 12"),
        (["--step", "4"], f"{out}/checkpoint-4: exists already; remove it or name another --out"),
    ):
        assert hrmcore("export", str(out), *arguments) == 2
        assert capsys.readouterr().err == f"hrmcore export: {said}\n"
    assert hrmcore("export", str(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err == f"hrmcore export: {tmp_path}/nowhere: no such folder\n"
    assert hrmcore("export", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"hrmcore export: {tmp_path}: holds no training state\n"


def test_a_run_goes_on_from_a_kept_state_in_another_folder(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing else changed it repeats, bit for bit, what came after that state."""
    rewrite(run_file, "save_every = 4", "save_every = 4\nkeep_every = 4")
    assert hrmcore("train", str(run_file)) == 0
    command = ["train", str(run_file), "--from-step", "4"]
    assert hrmcore(*command, "--set", f"out={tmp_path}/again") == 0
    assert [row["step"] for row in metrics(tmp_path / "again")] == list(range(5, 13))
    for name, tensor in final_state(tmp_path / "out", 12).items():
        assert torch.equal(tensor, final_state(tmp_path / "again", 12)[name]), name
    assert hrmcore(*command, "--set", f"out={tmp_path}/again", "--set", "steps=14") == 0  # it has states of its own
    assert metrics(tmp_path / "again")[-1]["step"] == 14
    capsys.readouterr()
    assert hrmcore(*command) == 2
    said = f"--from-step goes on in another folder, so that {tmp_path}/out stays as it is; add --set out=FOLDER"
    assert capsys.readouterr().err == f"hrmcore train: {said}\n"
    assert hrmcore("train", str(run_file), "--from-step", "3", "--set", f"out={tmp_path}/third") == 2
    assert capsys.readouterr().err == f"hrmcore train: {tmp_path}/out: no state after step 3; there are 4, 8, 12\n"


def test_an_old_state_goes_on_with_the_papers_form_of_adamatan2(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state without the form's name is of the time when there was only the paper's; later ones name it."""
    paper = read_config(run_file, ["optimizer=adamatan2-paper", f"out={tmp_path}/paper", "keep_every=4"])
    Trainer(paper).run()
    tensors, found = load_state(state_path(tmp_path / "paper", 4))
    kept = ("step", "tokens", "skipped", "typical_loss", "data_fingerprint", "data_position", "rng")
    metadata = {name: found[name] for name in (*kept, "model_config", "grown") if name in found}
    save_state(state_path(tmp_path / "out", 4), tensors, {**metadata, "optimizer": "adamatan2"})
    for steps in (8, 12):  # the second time from a state that it wrote itself
        assert hrmcore("train", str(run_file), "--set", f"steps={steps}", "--set", "schedule=constant") == 0
        assert "with the paper's form of AdamAtan2, and the run goes on with it" in capsys.readouterr().err
    again = read_config(run_file, ["optimizer=adamatan2-paper", f"out={tmp_path}/whole", "schedule=constant"])
    save_state(state_path(tmp_path / "whole", 4), tensors, {**metadata, "optimizer": "adamatan2-paper"})
    Trainer(again).run()
    for name, tensor in final_state(tmp_path / "whole", 12).items():
        assert torch.equal(tensor, final_state(tmp_path / "out", 12)[name]), name
    fresh = read_config(run_file, [f"out={tmp_path}/fresh"])
    Trainer(fresh).run()
    assert load_state(state_path(tmp_path / "fresh", 12))[1][resume.FORM] == "hrm-text"


class Counted:
    """Tokens that count how often they are read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.reads = tokens, 0

    def __getitem__(self, place: Any) -> Any:
        self.reads += 1
        return self.tokens[place]

    def __len__(self) -> int:
        return len(self.tokens)


def test_resuming_deep_in_an_epoch_makes_nothing_that_lies_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(5, 40, 20_000)
    tokens = Counted(np.zeros(int(lengths.sum()), dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = Corpus(tokens, offsets, np.ones(len(lengths), dtype=np.int32))  # type: ignore[arg-type]
    filled: list[int] = []
    fill = packing._fill
    monkeypatch.setattr(packing, "_fill", lambda window, *rest: filled.append(len(window)) or fill(window, *rest))
    stream = BatchStream(corpus, 512, seed=3)
    for _ in range(700):
        next(stream)
    expected = [next(stream).records for _ in range(300)]  # into the next epoch
    marks = json.loads(json.dumps(stream_at(corpus, 700).bookmark))  # as a state keeps it
    tokens.reads, filled[:] = 0, []
    first, start, left = marks
    again = BatchStream(corpus, 512, 3, (0, 700), packing.Bookmark(first, start, tuple(left)))
    found = next(again)
    assert tokens.reads == len(found.records) < 100
    assert len(filled) == 1
    assert [found.records, *(next(again).records for _ in range(299))] == expected
    assert max(len(batch) for batch in expected) >= len(left)  # what a state has to carry is small


def stream_at(corpus: Corpus, batches: int) -> BatchStream:
    stream = BatchStream(corpus, 512, seed=3)
    for _ in range(batches):
        next(stream)
    return stream


def test_a_state_without_a_bookmark_counts_from_the_start(run_file: Path, tmp_path: Path) -> None:
    """As those of before: the same batches follow."""
    config = read_config(run_file, ["keep_every=4", "batch_tokens=64"])
    Trainer(config).run()
    tensors, metadata = load_state(state_path(tmp_path / "out", 8))
    assert json.loads(metadata["data_window"]) != [0, 0, []] or json.loads(metadata["data_position"])[0] == 0
    known = ("format", "version", "sha256", "header_sha256", "data_window")
    older = {name: value for name, value in metadata.items() if name not in known}
    save_state(state_path(tmp_path / "old", 8), tensors, older)
    Trainer(read_config(run_file, [f"out={tmp_path}/old", "batch_tokens=64"])).run()
    for name, tensor in final_state(tmp_path / "out", 12).items():
        assert torch.equal(tensor, final_state(tmp_path / "old", 12)[name]), name


def test_a_best_state_that_someone_removed_is_said_and_the_last_is_exported(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run_file, "eval_every = 6", "eval_every = 4\npatience = 5\ncheck_records = 0")
    heldout_losses(monkeypatch, [1.0, 2.0, 3.0])
    out = tmp_path / "out"
    assert hrmcore("train", str(run_file)) == 0
    state_path(out, 4).unlink()
    assert hrmcore("train", str(run_file)) == 0
    assert f"{out}: the state after step 4, the best, is gone; the last is exported" in capsys.readouterr().err
    check_exported(out / "checkpoint", out, 12)
