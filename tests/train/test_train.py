"""The training loop: it learns, it resumes bit for bit, its schedules are the designed ones, bad input is named."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
from support.rounding import reordering
from support.runs import WORDS, metrics, repetitions, rewrite, write_run

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.checkpoint.training_state import state_path
from hrmcore.cli import main
from hrmcore.data.packing import pack
from hrmcore.engine.engine import load
from hrmcore.model import HRM
from hrmcore.optim import Sophia
from hrmcore.train import curvature
from hrmcore.train.heartbeat import Heartbeat
from hrmcore.train.run_file import (
    OPTIMIZERS,
    ema_decay,
    horizon,
    learning_rate,
    read_config,
)
from hrmcore.train.throughput import visible_pairs
from hrmcore.train.trainer import Trainer

RATES = {"adamatan2": 3e-3, "adamatan2-paper": 3e-3, "adamw": 3e-3, "sophia-g": 1e-3, "sophia-h": 1e-3}


@pytest.mark.parametrize(
    ("optimizer", "precision"), [*((name, "float32") for name in OPTIMIZERS), ("sophia-g", "bfloat16")]
)
def test_a_run_learns_and_exports(run_file: Path, optimizer: str, precision: str) -> None:
    rewrite(run_file, "learning_rate = 0.003", f"learning_rate = {RATES[optimizer]}")
    config = read_config(
        rewrite(run_file, "steps = 12", f'steps = 60\noptimizer = "{optimizer}"\nprecision = "{precision}"')
    )
    Trainer(config).run()
    rows = metrics(Path(config.out))
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["heldout_loss"] < rows[5]["heldout_loss"]
    assert rows[-1]["tokens_seen"] == sum(row["tokens"] for row in rows)
    assert all(0 < row["mfu"] < 1 and row["memory"] > 1e7 for row in rows)
    assert ("clipped_fraction" in rows[0]) == optimizer.startswith("sophia")
    exported = HRM.from_pretrained(Path(config.out) / "checkpoint")
    assert exported.config.vocab_size == config.model.vocab_size
    assert (Path(config.out) / "checkpoint" / "tokenizer.model").is_file()


def test_sophia_clips_all_of_its_first_step_and_less_once_it_knows_the_curvature(run_file: Path) -> None:
    config = read_config(rewrite(run_file, "steps = 12", 'steps = 40\noptimizer = "sophia-g"\ncurvature_every = 2'))
    Trainer(config).run()
    clipped = [row["clipped_fraction"] for row in metrics(Path(config.out))]
    assert clipped[0] > 0.9
    assert 0 < min(clipped[20:]) < 0.9


def test_the_export_and_the_heldout_loss_are_the_averages(run_file: Path) -> None:
    """Against an average of the weights kept beside, in float64."""
    config = read_config(run_file)
    trainer = Trainer(config)
    weight = trainer.model.lm_head.weight
    average = weight.detach().double()
    decays = []
    for step in range(12):
        trainer._train_step()
        decays.append(min(0.9999, (1 + step) / (10 + step)))
        average = decays[-1] * average + (1 - decays[-1]) * weight.detach().double()
    assert [ema_decay(config, step) for step in range(12)] == decays
    plain = trainer.model.loss
    seen: list[torch.Tensor] = []
    trainer.model.loss = lambda *args, **options: (seen.append(weight.detach().clone()), plain(*args, **options))[1]
    before = weight.detach().clone()
    trainer.evaluate()
    trainer.export()
    trainer.close()
    assert torch.equal(weight, before)
    torch.testing.assert_close(seen[0].double(), average, rtol=1e-5, atol=1e-7)
    exported = HRM.from_pretrained(Path(config.out) / "checkpoint").lm_head.weight
    assert torch.equal(exported, seen[0].bfloat16().float())
    assert not torch.equal(exported, before.bfloat16().float())


def test_what_takes_long_is_said_more_and_more_rarely() -> None:
    said: list[str] = []
    with Heartbeat(said.append, first=0.05) as heart:
        heart.at("sleeping")
        deadline = time.monotonic() + 60
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        heart.rest()
        time.sleep(0.2)
        count = len(said)
        time.sleep(0.3)
    assert len(said) == count >= 3
    assert said[0] == "sleeping: 0 s so far"


def test_a_run_that_takes_long_says_what_it_is_at(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(read_config(run_file))
    doing: list[str] = []
    monkeypatch.setattr(trainer._heart, "at", doing.append)
    trainer.run()
    assert doing[:2] == ["step 1 of 12", "step 2 of 12"]
    assert {"validation after step 6", "writing a state", "writing the checkpoint"} <= set(doing)


def test_accumulated_batches_have_the_gradient_of_one_batch(run_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(read_config(run_file))
    batches = [next(trainer._stream) for _ in range(3)]
    assert len({len(batch.targets) for batch in batches}) > 1  # a mean of means would differ
    loss, *_ = trainer._backward(batches, 5)
    accumulated = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad()
    whole = pack(trainer.corpus, [record for batch in batches for record in batch.records])
    expected, *_ = trainer._backward([whole], 5)
    assert loss == pytest.approx(expected, rel=reordering(trainer.config.model))
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert len(gradients) == len(accumulated) > 5
    for ours, theirs in zip(accumulated, gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    trainer.close()


@pytest.mark.parametrize("recompute", ["none", "visit"])
def test_a_run_is_the_same_whatever_backward_computes_again(recompute: str, run_file: Path, tmp_path: Path) -> None:
    found = []
    for changes in ((), (f"recompute={recompute}", f"out={tmp_path}/other")):
        trainer = Trainer(read_config(run_file, changes))
        trainer.step = 6  # K is 5 there
        metrics = trainer._train_step()
        found.append([metrics["loss"], metrics["grad_norm"], *(p.detach().clone() for p in trainer.model.parameters())])
        trainer.close()
    assert metrics["horizon"] == 5
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2:], found[1][2:], strict=True))


def test_a_model_of_fewer_positions_than_a_batch_is_filled_up_by_trains(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, repetitions(WORDS), model={"max_position_embeddings": 32}, steps=2)
    records = Path(read_config(run_file).train_files[0])
    records.write_text(records.read_text().splitlines()[0] + "\n")
    trainer = Trainer(read_config(run_file))
    (record,) = trainer.corpus.lengths
    assert 64 - record > 32
    trainer.run()
    assert [row["step"] for row in metrics(trainer.out)] == [1, 2]


def test_loss_is_the_mean_over_response_tokens(trainer: Trainer) -> None:
    """Against logits of single, unpacked sequences and torch's cross-entropy."""
    batch = next(trainer._stream)
    expected = 0.0
    for s in range(len(batch.records)):
        start, stop = int(batch.offsets[s]), int(batch.offsets[s + 1])
        prefix = int(batch.prefix[s])
        logits = trainer.model(batch.ids[start:stop][None], prefix_length=prefix)[0, prefix - 1 :]
        record = batch.records[s]
        sequence = trainer.corpus.tokens[trainer.corpus.offsets[record] : trainer.corpus.offsets[record + 1]]
        targets = torch.from_numpy(sequence[prefix:]).long()
        expected += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert trainer.model.loss(batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_short_horizon_leaves_the_embedding_alone(trainer: Trainer) -> None:
    before = trainer.model.embed_tokens.weight.detach().clone()
    moved = trainer.model.lm_head.weight.detach().clone()
    assert horizon(trainer.config, 0) == 2
    trainer._train_step()
    assert torch.equal(trainer.model.embed_tokens.weight, before)  # no gradient, so no weight decay either
    assert not torch.equal(trainer.model.lm_head.weight, moved)


def test_schedules(run_file: Path) -> None:
    rewrite(run_file, "steps = 12", "steps = 100")
    config = read_config(rewrite(run_file, "warmup_steps = 2", "warmup_steps = 10"))
    assert learning_rate(config, 0) == pytest.approx(3e-4)
    assert learning_rate(config, 9) == pytest.approx(3e-3)
    assert learning_rate(config, 55) == pytest.approx(1.5e-3)
    assert learning_rate(config, 99) < 3e-6
    assert [horizon(config, step) for step in (0, 6, 7, 13, 14, 19, 20, 99)] == [2, 2, 3, 3, 4, 4, 5, 5]


def test_fine_tuning_starts_from_a_checkpoint_or_a_state(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(run_file)
    Trainer(config).run()
    text = run_file.read_text()
    checkpoint = Path(config.out) / "checkpoint"
    weights = HRM.from_pretrained(checkpoint).state_dict()
    for source in (checkpoint, state_path(Path(config.out), 12)):
        tuned = text[: text.index("[model]")].replace('/out"', f'/tuned-{source.suffix[1:]}"')
        tuned = tuned.replace("seed = 7", f'init_from = "{source}"')
        if source == checkpoint:
            tuned = re.sub("tokenizer = .*", "", tuned)
        run_file.write_text(tuned)
        tuned_config = read_config(run_file)
        assert tuned_config.model.replace(eos_token_id=None) == config.model.replace(eos_token_id=None)
        trainer = Trainer(tuned_config)
        assert "M parameters; about " in capsys.readouterr().err
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor.bfloat16().float(), weights[name]), name
        trainer.close()
    run_file.write_text(run_file.read_text() + "[model]\nhidden_size = 32\n")
    with pytest.raises(ValueError, match=r"brings the model's shape; remove \[model\]"):
        read_config(run_file)


def test_the_command_fails_with_one_line_when_training_diverges(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_backward", lambda *_: (float("nan"), 1.0, torch.ones(1)))
    assert main(["train", str(run_file)]) == 1
    assert re.search(r"^hrmcore train: step 0: the loss is not finite; .* intact$", capsys.readouterr().err, re.M)


def test_the_command_trains_and_names_mistakes(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file)]) == 0
    out = Path(read_config(run_file).out)
    assert len(metrics(out)) == 12
    *_, model, following = capsys.readouterr().err.splitlines()
    assert model.startswith(f"{out}/checkpoint: the model")
    assert following == f"next: hrmcore repl {out}/checkpoint"
    assert main(["train", str(run_file)]) == 0
    assert f"going on after step 12 of 12, where {state_path(out, 12)} stands" in capsys.readouterr().err
    assert main(["train", str(rewrite(run_file, "steps = 12", "steps = 0"))]) == 2
    assert capsys.readouterr().err == f"hrmcore train: {run_file}: train config: steps must be at least 1, got 0\n"
    assert main(["train", str(run_file.with_name("missing.toml"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_checked_answers_are_those_that_greedy_decoding_gets_right(run_file: Path, one_thread: None) -> None:
    """Against the engine, which decodes token by token; half-trained, so that some answers are right and some not."""
    config = read_config(rewrite(run_file, "steps = 12", "steps = 150\ncheck_records = 64\nema = 0"))
    trainer = Trainer(dataclasses.replace(config, eval_every=1000, save_every=1000))
    for _ in range(150):
        trainer._train_step()
        if trainer.step % 10 == 0 and 0.1 < trainer.evaluate()["heldout_exact"] < 0.9:
            break
    found = trainer.evaluate()["heldout_exact"]
    save_model(trainer.model, trainer.out / "now", tokenizer_folder=config.tokenizer)
    engine = load(trainer.out / "now")
    records = [json.loads(line) for line in Path(config.heldout_files[0]).read_text().splitlines()]
    answers = engine.generate([record["instruction"] for record in records], max_new_tokens=20)
    right = [answer == record["response"] for answer, record in zip(answers, records, strict=True)]
    assert 0 < sum(right) < len(right)
    assert found == sum(right) / len(right)
    trainer.config = dataclasses.replace(trainer.config, sample_answers=len(records))
    trainer._show_answers()
    trainer.close()
    samples = [json.loads(line) for line in (trainer.out / "samples.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples] == answers
    assert [sample["expected"] for sample in samples] == [record["response"] for record in records]
    assert [sample["instruction"] for sample in samples] == [record["instruction"] for record in records]


def test_answers_are_shown_and_kept_at_each_validation(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(rewrite(run_file, "seed = 7", "seed = 7\nsample_answers = 3"))
    Trainer(config).run()
    file = Path(config.out) / "samples.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [6] * 3 + [12] * 3
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("step 6: ")]) == 3
    file.write_text(file.read_text() + '{"step": 14}\n')  # of a run that was killed after its last state
    Trainer(dataclasses.replace(config, steps=13, sample_answers=0)).run()
    assert len(file.read_text().splitlines()) == 6


def test_the_pairs_that_attention_sees_are_counted(trainer: Trainer) -> None:
    batch = next(trainer._stream)
    seen = 0
    for start, stop, prefix in zip(batch.offsets, batch.offsets[1:], batch.prefix, strict=False):
        for query in range(int(stop - start)):
            seen += sum(key < max(int(prefix), query + 1) for key in range(int(stop - start)))
    fill = int(batch.offsets[-1] - batch.offsets[len(batch.records)])
    assert visible_pairs(batch, prefix_lm=True) == seen - fill * (fill + 1) // 2


def test_sophia_g_takes_b_times_the_squared_mean_gradient_whatever_the_batches(trainer: Trainer) -> None:
    """h after one sample is (1 − b2)·B·ĝ², ĝ the gradient of the mean loss, for one batch and for three."""
    batches = [next(trainer._stream) for _ in range(3)]
    labels = sum(len(batch.targets) for batch in batches)
    sophia = Sophia(trainer.model.parameters())
    curvature.gauss_newton_bartlett(trainer.model, batches, labels, 5, curvature.generator_of(7, 3))
    sophia.update_hessian()
    weight = trainer.model.lm_head.weight
    found = sophia.state[weight]["hessian"].clone()
    sophia.zero_grad()
    generator = curvature.generator_of(7, 3)
    (sum(trainer.model.loss(batch, 5, generator) for batch in batches) / labels).backward()
    assert weight.grad is not None
    expected = 0.01 * labels * weight.grad**2
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    other = [trainer.model.loss(batches[0], 5, curvature.generator_of(*key)).item() for key in ((7, 3), (7, 4), (8, 3))]
    assert len(set(other)) == 3
