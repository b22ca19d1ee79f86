"""A run that is stopped, interrupted, killed or damaged goes on where it stood."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import final_state, metrics, rewrite

from hrmcore.checkpoint.training_state import find_states, load_state, save_state, state_path
from hrmcore.cli import main
from hrmcore.data.packing import PackedBatch
from hrmcore.train import interruption
from hrmcore.train.run_file import (
    OPTIMIZERS,
    read_config,
)
from hrmcore.train.trainer import Trainer


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
