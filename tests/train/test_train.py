"""The training loop: it learns, it resumes bit for bit, its schedules are the designed ones, bad input is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rounding import reordering
from support.runs import repetitions, write_run

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.checkpoint.training_state import find_states, load_state, save_state, state_path
from hrmcore.cli import main
from hrmcore.commands.plot import read_metrics
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch, pack
from hrmcore.engine.engine import load
from hrmcore.growth.stages import GrowStage
from hrmcore.model import HRM
from hrmcore.optim import Sophia
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train import curvature, interruption
from hrmcore.train.heartbeat import Heartbeat
from hrmcore.train.run_file import (
    GROUPS,
    OPTIMIZERS,
    RANGES,
    TrainConfig,
    ema_decay,
    explain,
    horizon,
    learning_rate,
    read_config,
)
from hrmcore.train.throughput import visible_pairs
from hrmcore.train.trainer import Trainer

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of 12 steps of about 256 tokens."""
    records = repetitions(WORDS)
    train_tokenizer((record["instruction"] for record in records), tmp_path / "tokenizer", vocab_size=330)
    return write_run(
        tmp_path,
        records,
        tmp_path / "tokenizer",
        heldout_files=[f"{tmp_path}/train.jsonl"],
        steps=12,
        batch_tokens=256,
        learning_rate=0.003,
        warmup_steps=2,
        eval_every=6,
        save_every=4,
        seed=7,
    )


def rewrite(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def trainer(run_file: Path) -> Iterator[Trainer]:
    """A trainer before its first step."""
    trainer = Trainer(read_config(run_file))
    yield trainer
    trainer.close()


def final_state(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_state(state_path(out, step))[0]


RATES = {"adamatan2": 3e-3, "adamw": 3e-3, "sophia-g": 1e-3, "sophia-h": 1e-3}


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


@pytest.mark.parametrize(
    ("optimizer", "precision"), [*((name, "float32") for name in OPTIMIZERS), ("sophia-g", "bfloat16")]
)
def test_a_stopped_run_resumes_bit_for_bit(run_file: Path, tmp_path: Path, optimizer: str, precision: str) -> None:
    rewrite(run_file, "steps = 12", f'steps = 12\noptimizer = "{optimizer}"\naccumulate = 2\nkeep = 1')
    rewrite(run_file, "seed = 7", f'seed = 7\nprecision = "{precision}"')
    if optimizer.startswith("sophia"):
        rewrite(run_file, "keep = 1", "keep = 1\ncurvature_every = 3")
    whole = read_config(run_file)
    Trainer(whole).run()

    stopped = read_config(rewrite(run_file, f"{tmp_path}/out", f"{tmp_path}/stopped"))
    first = Trainer(stopped)
    for _ in range(5):
        first._metrics.record(first._train_step())
    first.save()
    first._metrics.record(first._train_step())  # lost: it comes after the state
    first.close()
    second = Trainer(stopped)
    assert second.step == 5
    second.run()
    expected, found = final_state(Path(whole.out), 12), final_state(Path(stopped.out), 12)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert [row["step"] for row in metrics(Path(stopped.out))] == list(range(1, 13))
    losses = [[row["loss"] for row in metrics(Path(config.out))] for config in (whole, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_step_and_keeps_a_state(
    run_file: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "LONG_STEP", math.inf)
    config = read_config(run_file)
    trainer = Trainer(config)
    handler = signal.getsignal(number)
    backward = trainer._backward

    def interrupted(batches: list[PackedBatch], k: int) -> tuple[float, float]:
        if trainer.step == 5:
            os.kill(os.getpid(), number)
        return backward(batches, k)

    trainer._backward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert find_states(Path(config.out))[0][0] == metrics(Path(config.out))[-1]["step"] == 6
    assert not (Path(config.out) / "checkpoint").exists()
    assert signal.getsignal(number) == handler


def interrupted_inside_step(trainer: Trainer, step: int) -> None:
    """Send SIGINT in the middle of a step's forward pass."""
    states = trainer.model.states

    def interrupted(*args: Any, **options: Any) -> Iterator[Any]:
        for count, state in enumerate(states(*args, **options)):
            if trainer.step == step and count == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield state

    trainer.model.states = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_a_long_step_is_abandoned_at_once_and_done_again(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interruption, "LONG_STEP", 0.0)
    whole = read_config(run_file)
    Trainer(whole).run()
    stopped = read_config(rewrite(run_file, f"{tmp_path}/out", f"{tmp_path}/stopped"))
    interrupted_inside_step(Trainer(stopped), 5)
    assert "\nending now, before this step\n" in capfd.readouterr().err
    assert find_states(tmp_path / "stopped")[0][0] == metrics(tmp_path / "stopped")[-1]["step"] == 5
    Trainer(stopped).run()
    for name, tensor in final_state(tmp_path / "out", 12).items():
        assert torch.equal(tensor, final_state(tmp_path / "stopped", 12)[name]), name


def test_a_first_step_that_is_abandoned_leaves_no_state(run_file: Path) -> None:
    trainer = Trainer(read_config(run_file))
    interrupted_inside_step(trainer, 0)
    assert find_states(trainer.out) == []


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
    loss, _ = trainer._backward(batches, 5)
    accumulated = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad()
    whole = pack(trainer.corpus, [record for batch in batches for record in batch.records])
    expected, _ = trainer._backward([whole], 5)
    assert loss == pytest.approx(expected, rel=reordering(trainer.config.model))
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert len(gradients) == len(accumulated) > 5
    for ours, theirs in zip(accumulated, gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    trainer.close()


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


def poison(trainer: Trainer) -> list[int]:
    """Let the embedding of the last word be NaN; returns the records in which it occurs."""
    corpus = trainer.corpus
    [token] = trainer.tokenizer.encode(" theta")[-1:]
    with torch.no_grad():
        trainer.model.embed_tokens.weight[token] = float("nan")
    return [r for r in range(len(corpus)) if token in corpus.tokens[corpus.offsets[r] : corpus.offsets[r + 1] - 1]]


def test_a_loss_that_is_not_finite_stops_with_the_records_and_leaves_no_state(trainer: Trainer, tmp_path: Path) -> None:
    guilty = poison(trainer)
    assert 0 < len(guilty) < len(trainer.corpus) / 2
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is not finite; it comes from the records") as error:
        trainer._train_step()
    named = [int(n) for n in re.findall(rf"(\d+) \({tmp_path}/train.jsonl:\d+\)", str(error.value))]
    assert named
    assert set(named) <= set(guilty)
    lines = [int(n) for n in re.findall(r"train.jsonl:(\d+)", str(error.value))]
    assert lines == [record + 1 for record in named]
    trainer.save()
    with pytest.raises(FloatingPointError, match=r"not written, because model\.embed_tokens\.weight is not finite"):
        trainer._writer.finish()
    assert not find_states(trainer.out)


def test_a_step_that_is_not_finite_can_be_skipped(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "steps = 12", 'steps = 12\non_nonfinite = "skip"')))
    poison(trainer)
    before = {name: tensor.clone() for name, tensor in trainer._tensors().items()}
    found = trainer._train_step()
    assert found["skipped"] == trainer.step == 1
    assert all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in trainer._tensors().items()
    )
    trainer.close()


def test_a_learning_rate_that_is_too_high_is_not_the_records_fault(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "learning_rate = 0.003", "learning_rate = 1e6")))
    with pytest.raises(FloatingPointError, match="is not finite") as error:
        trainer.run()
    said = str(error.value)
    assert re.search(
        r"; (all \d+ records have it|no record has it by itself), so look at the rate and the weights", said
    )
    assert re.search(
        r": learning_rate is 1e\+06, (the largest weight is \d[\d.]*e\+\d+|a weight is not finite); ", said
    )
    assert "mend" not in said


def test_the_records_are_named_and_the_weights_as_the_other_cause(trainer: Trainer) -> None:
    poison(trainer)
    sound = r"it comes from the records .*; if they are sound, .*: learning_rate is 0\.003, a weight is not finite; "
    with pytest.raises(FloatingPointError, match=sound):
        trainer._train_step()


@pytest.mark.parametrize("variant", ["g", "h"])
def test_a_curvature_sample_that_is_not_finite_is_skipped_or_stops(
    variant: str, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step samples; one sample in the run has an Inf."""
    keys = f'on_nonfinite = "skip"\noptimizer = "sophia-{variant}"\ncurvature_every = 2'
    trainer = Trainer(read_config(rewrite(run_file, "steps = 12", f"steps = 12\n{keys}")))
    usual = Sophia._refuse_nonfinite

    def spoil(self: Sophia, samples: Any) -> None:
        samples[0].hvps[0].view(-1)[3] = torch.inf
        usual(self, samples)

    trainer._train_step()
    hessians = {name: t.clone() for name, t in trainer._tensors().items() if ".hessian." in name}
    assert hessians
    with monkeypatch.context() as patched:
        patched.setattr(Sophia, "_refuse_nonfinite", spoil)
        trainer._train_step()
        assert trainer._train_step()["skipped"] == 1
    after = trainer._tensors()
    assert all(torch.equal(after[name], hessian) for name, hessian in hessians.items())
    assert trainer._train_step()["skipped"] == 1
    assert trainer._train_step()["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in trainer._tensors().values())
    trainer.config = dataclasses.replace(trainer.config, on_nonfinite="stop")
    monkeypatch.setattr(Sophia, "_refuse_nonfinite", spoil)
    trainer._train_step()
    with pytest.raises(FloatingPointError, match=r"step 6: the curvature sample is not finite in parameter 0; "):
        trainer._train_step()
    trainer.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 12", "steps = 0", "steps must be at least 1, got 0"),
        ("steps = 12", "stepz = 12", "unknown key 'stepz'"),
        ("steps = 12", "", "missing key 'steps'"),
        ("steps = 12", 'steps = "many"', "steps must be of type int, got 'many'"),
        ("steps = 12", "steps = ", "not TOML"),
        ("learning_rate = 0.003", "learning_rate = -1", "learning_rate must be above 0"),
        ("seed = 7", 'schedule = "triangle"', "schedule must be one of"),
        ("seed = 7", 'optimizer = "sgd"', "optimizer must be one of"),
        ("seed = 7", 'optimizer = "adamw"\nrho = 0.1', "rho means nothing to adamw; remove it"),
        ("seed = 7", "betas = [0.9]", r"betas must be of type tuple\[float, float\]"),
        ("seed = 7", "ema = 1.0", "ema must be at least 0 and below 1"),
        ("seed = 7", "accumulate = 0", "accumulate must be at least 1"),
        ("seed = 7", 'on_nonfinite = "hope"', "on_nonfinite must be one of"),
        ("seed = 7", "horizon_first = 1", "horizon_first must be at least 2"),
        ("seed = 7", "horizon_first = 9", "horizons must satisfy horizon_first <= horizon_last, got 9 and 5"),
        (
            "seed = 7",
            f"check_records = {1 << 63}",
            "check_records must be at most 2147483647 .*, got 9",
        ),
        ("seed = 7", "seed = -1", "seed must be at least 0, got -1"),
        ("seed = 7", f"accumulate = {1 << 62}", "accumulate must be at most 1048576"),
        ("seed = 7", "betas = [0.9, nan]", "betas must be at most .*, got nan"),
        ("seed = 7", "betas = [1.0, 0.9]", "betas must be at most"),
        ("seed = 7", "weight_decay = nan", "weight_decay must be at most"),
        ("learning_rate = 0.003", f"learning_rate = {10**400}", "learning_rate must be at most 1000000.0 .*, got inf"),
        ("learning_rate = 0.003", "learning_rate = nan", "learning_rate must be at most"),
        ("seed = 7", f"keep = {'[' * 5000}", "not TOML"),
        (
            "hidden_size = 32",
            "hidden_size = 32\nvocab_size = 7",
            "model: vocab_size is 7, but .* has 330",
        ),
        ("hidden_size = 32", f"hidden_size = 32\nH_cycles = {1 << 61}", "config: H_cycles must be at most 65536"),
        ("hidden_size = 32", "hidden_sise = 32", "unknown key 'hidden_sise'"),
        ("head_dim = 16", "head_dim = 13", "head_dim must be a multiple of 8"),
    ],
)
def test_a_bad_run_file_names_file_and_key(run_file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{run_file}: .*{message}"):
        read_config(rewrite(run_file, old, new))


def test_every_number_of_a_run_file_has_a_range() -> None:
    kinds = ("int", "float", "tuple[float, float]")
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if str(f.type).removesuffix(" | None") in kinds}
    assert numbers == set(RANGES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("intermediate_size = 64", "intermediate_size = 128", "the state is of another model or optimizer: model"),
        ("seed = 7", "seed = 8", r"seed changed since \(its seed is 7, now 8\)"),
        ("batch_tokens = 256", "batch_tokens = 512", "batch_tokens changed since"),
        ("seed = 7", 'seed = 7\noptimizer = "adamw"', "was trained with adamatan2, not with adamw"),
        ("seed = 7", "seed = 7\nema = 0", r"optimizer\.ema\.[\w.]+ does not fit the run file"),
        ("repeat alpha beta", "repeat beta alpha", r"the training data changed since \(its sha256 is"),
    ],
)
def test_a_state_of_another_run_is_refused(trainer: Trainer, run_file: Path, old: str, new: str, message: str) -> None:
    trainer.save()
    trainer.close()
    changed = run_file if old in run_file.read_text() else run_file.with_name("train.jsonl")
    rewrite(changed, old, new)
    with pytest.raises(ValueError, match=rf"step-00000000\.safetensors: .*{message}"):
        Trainer(read_config(run_file))


def test_a_damaged_newest_state_is_said_aloud_and_the_one_before_is_taken(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(run_file)
    Trainer(config).run()
    out = Path(config.out)
    states = find_states(out)
    assert [step for step, _ in states] == [12, 8]
    expected = final_state(out, 12)
    data = bytearray(states[0][1].read_bytes())
    data[-100] ^= 1
    states[0][1].write_bytes(data)
    capsys.readouterr()
    Trainer(config).run()
    said = capsys.readouterr().err
    assert "step-00000012.safetensors: damaged" in said
    assert "falling back from step 12 to the state before" in said
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_state(out, 12).items())
    for _, path in find_states(out):
        path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no state is whole; remove the folder to train from the start"):
        Trainer(config)


def test_a_state_without_the_usual_loss_resumes(trainer: Trainer) -> None:
    trainer._train_step()
    trainer.save()
    trainer.close()
    path = state_path(trainer.out, 1)
    tensors, metadata = load_state(path)
    assert json.loads(metadata.pop("typical_loss")) == trainer.typical_loss
    save_state(path, tensors, metadata)
    resumed = Trainer(trainer.config)
    assert (resumed.step, resumed.typical_loss) == (1, None)
    resumed.close()


def test_old_states_go_and_kept_ones_stay(run_file: Path) -> None:
    config = read_config(rewrite(run_file, "save_every = 4", "save_every = 1\nkeep = 3\nkeep_every = 5"))
    Trainer(config).run()
    assert [step for step, _ in find_states(Path(config.out))] == [12, 11, 10, 5]


def test_two_trainers_on_one_folder(trainer: Trainer) -> None:
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} is training in this folder"):
        Trainer(trainer.config)
    trainer.close()
    Trainer(trainer.config).close()


def test_a_run_folder_that_takes_no_files_is_one_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run_file, f"{run_file.parent}/out", "/proc/self/run")
    assert main(["train", str(run_file)]) == 2
    assert re.fullmatch(r"hrmcore train: /proc/self/run: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("limit", [300, 20_000])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_written(
    run_file: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    """A limit on the size of files stands for the disk: at 300 bytes metrics.jsonl fails, at 20,000 the state does."""
    rewrite(run_file, "save_every = 4", "save_every = 1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer(read_config(run_file))
    trainer._metrics.record(trainer._train_step())
    trainer.save()
    trainer.close()
    expected = find_states(trainer.out)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert main(["train", str(run_file)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large); the states" in capsys.readouterr().err
    assert find_states(trainer.out) == expected
    Trainer(trainer.config).run()
    assert [row["step"] for row in metrics(trainer.out)] == list(range(1, 13))


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


def test_explain_says_what_every_key_means() -> None:
    lines = explain().splitlines()
    assert max(map(len, lines)) <= 120
    model, grow = (next(i for i, line in enumerate(lines) if line.startswith(head)) for head in ("[model]", "[[grow]]"))
    tables = (TrainConfig, lines[:model]), (HRMConfig, lines[model:grow]), (GrowStage, lines[grow:])
    for table, told in tables:
        for f in dataclasses.fields(table):
            if f.name not in ("model", "vocab_size", "eos_token_id", "pad_token_id"):
                first = next(number for number, line in enumerate(told) if line.startswith(f"  {f.name} "))
                key, kind, *rest = " ".join(line.strip() for line in told[first : first + 4]).split()
                assert key == f.name
                assert kind in ("string", "integer", "number", "true", "[string,", "[number,", "tables"), f.name
                assert " ".join(f.metadata["explain"].split()) in " ".join(rest), f.name
                if f.default is dataclasses.MISSING:
                    assert " required " in told[first], f.name


def test_explain_groups_the_keys_and_begins_with_those_that_must_be_there() -> None:
    headings = [line for line in explain().splitlines() if line in GROUPS]
    assert headings == list(GROUPS)
    for f in dataclasses.fields(TrainConfig):
        if f.name != "model":
            assert (f.metadata["group"] == "required") == (f.default is dataclasses.MISSING), f.name
            assert f.metadata["group"] in GROUPS


def test_the_command_fails_with_one_line_when_training_diverges(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_backward", lambda *_: (float("nan"), 1.0))
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


def killed(run_file: Path, kills: int, *mutation: str) -> dict[str, int]:
    rewrite(run_file, "steps = 12", 'steps = 16\naccumulate = 2\noptimizer = "sophia-g"\ncurvature_every = 3')
    rewrite(run_file, "save_every = 4", "save_every = 1")
    rewrite(run_file, "head_dim = 16", "head_dim = 16\nH_cycles = 1\nL_cycles = 1")
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "soak" / "killing.py"),
        str(run_file),
        str(kills),
        *mutation,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_ends_with_the_bits_of_an_undisturbed_one(run_file: Path) -> None:
    report = killed(run_file, 100)
    assert report["kills"] >= 100
    assert report["while_writing"] >= 10
    assert report["runs"] >= 2
    assert report["different"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["forgets its data position", "forgets its averages"])
def test_the_killing_notices_a_trainer_that_forgets(run_file: Path, mutation: str) -> None:
    report = killed(run_file, 8, mutation)
    assert report["different"] > 0


def test_a_spike_is_skipped_or_stops(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "seed = 7", 'seed = 7\nspike_factor = 2.0\non_nonfinite = "skip"')))
    assert trainer._train_step()["skipped"] == 0
    usual = trainer.typical_loss
    assert usual is not None
    with torch.no_grad():
        trainer.model.lm_head.weight *= 10  # confidently wrong
    before = trainer.model.lm_head.weight.detach().clone()
    assert trainer._train_step()["skipped"] == 1
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert trainer.typical_loss == usual
    trainer.config = dataclasses.replace(trainer.config, on_nonfinite="stop")
    with pytest.raises(FloatingPointError, match=r"the loss [\d.]+ is more than 2 times the usual [\d.]+; "):
        trainer._train_step()
    trainer.close()


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


def test_set_stands_for_what_the_run_file_says(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["learning_rate = 2e-3", "betas=[0.8, 0.9]", "optimizer=adamw", "model.rope_theta=500.0", "steps=2"]
    config = read_config(run_file, changes)
    assert (config.learning_rate, config.betas, config.optimizer) == (2e-3, (0.8, 0.9), "adamw")
    assert config.model.rope_theta == 500.0
    given = [word for change in [*changes, f"out={tmp_path / 'other'}"] for word in ("--set", change)]
    assert main(["train", str(run_file), *given]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "other" / "metrics.jsonl")] == [1, 2]
    capsys.readouterr()
    for change, message in {
        "steps": "--set must be KEY=VALUE, got 'steps'",
        "stepz=3": f"{run_file}: unknown key 'stepz'",
        "steps=many": f"{run_file}: steps must be of type int, got 'many'",
        "model=3": "--set model: name one key, as learning_rate or model.head_dim",
    }.items():
        assert main(["train", str(run_file), "--set", change]) == 2
        assert message in capsys.readouterr().err


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
