"""Which tokens carry loss: the response's, or all after the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import repetitions, write_run
from torch.nn.functional import cross_entropy

from hrmcore.data.records import Rejected, encode, read_records
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer
from hrmcore.train.explanation import explain
from hrmcore.train.run_file import read_config
from hrmcore.train.throughput import visible_pairs
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("alpha", "beta", "gamma", "delta", "omega")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    keys: dict[str, Any] = {"objective": "all", "steps": 2, "batch_tokens": 2048, "check_records": 0, "eval_every": 1}
    heldout = [str(tmp_path / "train.jsonl")]
    return write_run(tmp_path, repetitions(WORDS), model={"prefix_lm": False}, heldout_files=heldout, ema=0, **keys)


def losses_by_logits(model: HRM, folder: Path) -> tuple[float, float]:
    """Mean loss of all tokens after the first, and of the responses' alone, each sequence by itself."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    everything, responses = [], []
    for record in read_records(folder / "train.jsonl", Rejected()):
        ids, prefix = encode(record, tokenizer, 1000)
        with torch.no_grad():
            loss = cross_entropy(model(torch.tensor([ids[:-1]]))[0].double(), torch.tensor(ids[1:]), reduction="none")
        everything.append(loss)
        responses.append(loss[prefix - 1 :])
    return float(torch.cat(everything).mean()), float(torch.cat(responses).mean())


def test_all_is_the_loss_of_every_next_token_and_the_heldout_loss_stays_the_responses(run_file: Path) -> None:
    """One batch holds all records, so the first step's loss is the corpus's, before any update."""
    trainer = Trainer(read_config(run_file))
    everything, responses = losses_by_logits(trainer.model, run_file.parent)
    assert abs(everything - responses) > 0.01 * everything  # else the two could not be told apart
    assert trainer.evaluate()["heldout_loss"] == pytest.approx(responses, rel=1e-5)
    metrics = trainer._train_step()
    trainer.close()
    assert metrics["loss"] == pytest.approx(everything, rel=1e-5)
    assert metrics["supervised_tokens"] == metrics["tokens"]


def test_response_is_the_default_and_leaves_the_instructions_out(run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace('objective = "all"\n', ""))
    trainer = Trainer(read_config(run_file))
    _, responses = losses_by_logits(trainer.model, run_file.parent)
    metrics = trainer._train_step()
    trainer.close()
    assert metrics["loss"] == pytest.approx(responses, rel=1e-5)
    assert metrics["supervised_tokens"] < 0.7 * metrics["tokens"]


def test_a_causal_model_is_charged_for_causal_pairs(run_file: Path) -> None:
    """Whichever tokens carry loss, a causal token sees itself and those before it."""
    text = run_file.read_text()
    counted = []
    for objective in ("all", "response"):
        run_file.write_text(text.replace('"all"', f'"{objective}"').replace("/out", f"/{objective}"))
        trainer = Trainer(read_config(run_file))
        batch = next(trainer._stream)
        lengths = (batch.offsets[1:] - batch.offsets[:-1])[: len(batch.records)].double()
        counted.append(visible_pairs(batch, prefix_lm=False))
        assert counted[-1] == float((lengths * (lengths + 1) / 2).sum())
        trainer.close()
    assert counted[0] == counted[1]


def test_a_run_keeps_its_objective(run_file: Path) -> None:
    Trainer(read_config(run_file)).run()
    run_file.write_text(run_file.read_text().replace('"all"', '"response"'))
    with pytest.raises(ValueError, match=r"objective changed since .its objective is all, now response"):
        Trainer(read_config(run_file))


def test_all_with_a_prefix_that_sees_ahead_is_refused(run_file: Path) -> None:
    text = run_file.read_text()
    run_file.write_text(text.replace("prefix_lm = false", "prefix_lm = true"))
    with pytest.raises(ValueError, match=r"run\.toml: train config: .*objective 'all'.*set prefix_lm = false"):
        read_config(run_file)
    run_file.write_text(text.replace('"all"', '"most"'))
    with pytest.raises(ValueError, match="objective must be one of"):
        read_config(run_file)
    assert "objective" in explain()
