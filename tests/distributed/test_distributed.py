"""Two gloo processes against one: the same curve, the same states, and they stop together."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.runs import needs_shard_files
from support.two_ranks import ENVIRONMENT, Ranks, check_curve, go_on_from, rows, write_run

from hrmcore.checkpoint.training_state import find_states, load_state, state_path
from hrmcore.data.packing import BatchStream
from hrmcore.model import HRM
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_peak")


def torchrun(run_file: Path) -> None:
    """The command of the README."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "hrmcore", "train", str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_and_each_goes_on_from_the_other(
    tmp_path: Path, tokenizer: Path, ranks: Ranks
) -> None:
    alone = read_config(write_run(tmp_path / "alone", tokenizer, keep_every=30, heldout_files=[]))
    Trainer(alone).run()
    assert rows(alone)[-1]["loss"] < 0.7 * rows(alone)[0]["loss"]

    file = write_run(tmp_path / "two", tokenizer, keep_every=20)
    two = read_config(file)
    torchrun(file)
    check_curve(two, alone)
    assert [step for step, _ in find_states(Path(two.out))] == [50, 40, 20]
    exported = HRM.from_pretrained(Path(two.out) / "checkpoint").state_dict()
    for name, weight in HRM.from_pretrained(Path(alone.out) / "checkpoint").state_dict().items():
        torch.testing.assert_close(exported[name], weight, rtol=2**-7, atol=1e-4)  # bfloat16

    back_alone = read_config(write_run(tmp_path / "back alone", tokenizer))
    go_on_from(two, 20, back_alone)
    Trainer(back_alone).run()
    check_curve(back_alone, alone, first=21)

    file = write_run(tmp_path / "back two", tokenizer)
    back_two = read_config(file)
    go_on_from(alone, 30, back_two)
    assert [status for status, _ in ranks.train(file)] == [0, 0]
    check_curve(back_two, alone, first=31)


def test_a_rank_without_a_record_takes_part(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    """Batches of so few tokens that some hold a single record."""
    keys = {"steps": 8, "accumulate": 1, "batch_tokens": 16}
    alone = read_config(write_run(tmp_path / "alone", tokenizer, **keys))
    trainer = Trainer(alone)
    stream = BatchStream(trainer.corpus, alone.batch_tokens, alone.seed)
    assert 1 in [len(next(stream).records) for _ in range(alone.steps)]
    trainer.run()
    file = write_run(tmp_path / "two", tokenizer, **keys)
    assert [status for status, _ in ranks.train(file)] == [0, 0]
    check_curve(read_config(file), alone)


def test_both_ranks_grow(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    files = [write_run(tmp_path / name, tokenizer, steps=8) for name in ("alone", "two")]
    for file in files:
        with file.open("a") as text:
            text.write("[[grow]]\nat_tokens = 1500\nhidden_size = 64\nnum_layers_per_stack = 2\n")
    alone, two = (read_config(file) for file in files)
    Trainer(alone).run()
    assert [status for status, _ in ranks.train(files[1])] == [0, 0]
    check_curve(two, alone)
    assert ["growth_loss_after" in row for row in rows(two)].count(True) == 1


@pytest.mark.parametrize("parallel", ["data", pytest.param("sharded", marks=needs_shard_files)])
def test_a_nan_of_one_rank_stops_both_is_named_and_reaches_no_state(
    tmp_path: Path, tokenizer: Path, ranks: Ranks, parallel: str
) -> None:
    file = write_run(tmp_path / "run", tokenizer, parallel=parallel, save_every=1, accumulate=1)
    config = read_config(file)
    trainer = Trainer(config)
    stream = BatchStream(trainer.corpus, config.batch_tokens, config.seed)
    trainer.close()
    record = [next(stream) for _ in range(3)][2].records[0]
    for status, errors in ranks.train(file, poisoned=record):
        assert status == 1
        assert f"step 2: the loss is not finite; it comes from the records {record} (" in errors
    states = find_states(Path(config.out))
    assert [step for step, _ in states] == [2, 1]
    assert all(tensor.isfinite().all() for tensor in load_state(states[0][1])[0].values())


def test_sophia_sums_its_curvature_over_the_ranks(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    """H is that of one process; G draws other labels in each rank, so its mean is compared."""
    means = []
    for variant in ("g", "h"):
        keys = {"optimizer": f"sophia-{variant}", "learning_rate": 1e-3, "curvature_every": 2, "steps": 6}
        alone = read_config(write_run(tmp_path / f"alone-{variant}", tokenizer, **keys))
        Trainer(alone).run()
        file = write_run(tmp_path / f"two-{variant}", tokenizer, **keys)
        two = read_config(file)
        assert [status for status, _ in ranks.train(file)] == [0, 0]
        if variant == "h":
            check_curve(two, alone)
        for config in (two, alone):
            tensors = load_state(state_path(Path(config.out), 6))[0]
            means.append(sum(float(t.abs().sum()) for name, t in tensors.items() if ".hessian." in name))
    assert 0.8 < means[0] / means[1] < 1.25  # a mean over the ranks instead of a sum would be 1/4 of it
    assert math.isclose(means[2], means[3], rel_tol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_rank_stops_both_after_the_same_step(
    tmp_path: Path, tokenizer: Path, ranks: Ranks, rank: int
) -> None:
    file = write_run(tmp_path / "run", tokenizer, steps=100_000)
    config = read_config(file)
    ranks.begin(file)
    recorded, end = Path(config.out) / "metrics.jsonl", time.monotonic() + 60
    while not (recorded.exists() and recorded.read_text().count("\n") >= 3) and time.monotonic() < end:
        time.sleep(0.01)
    ranks.interrupt(rank)
    assert [status for status, _ in ranks.answers()] == [130, 130]
    assert [step for step, _ in find_states(Path(config.out))] == [len(rows(config))]
    assert not (Path(config.out) / "checkpoint").exists()


def test_ranks_of_different_runs_do_not_start(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    files = [write_run(tmp_path / name, tokenizer, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    for rank, (status, errors) in enumerate(ranks.train(*files)):
        assert status == 2
        assert f"rank {rank} of 2: the ranks differ in their run file, data or newest state" in errors


def test_one_process_needs_no_group(tmp_path: Path, tokenizer: Path) -> None:
    trainer = Trainer(dataclasses.replace(read_config(write_run(tmp_path / "run", tokenizer)), steps=1))
    assert (trainer.world.rank, trainer.world.ranks, trainer.world.sum(0.1)) == (0, 1, 0.1)
    assert not torch.distributed.is_initialized()
    trainer.close()


@pytest.mark.parametrize("parallel", ["data", pytest.param("sharded", marks=needs_shard_files)])
def test_both_ranks_end_early_and_the_best_is_exported(
    tmp_path: Path, tokenizer: Path, ranks: Ranks, parallel: str
) -> None:
    """A rate at which no weight moves: the second validation is no better than the first, which is the best."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "steps": 8, "keep": 1, "parallel": parallel}
    often = {"patience": 1, "eval_every": 1, "check_records": 0, "sample_answers": 0}
    heldout = [str(tmp_path / "two" / "train.jsonl")]
    file = write_run(tmp_path / "two", tokenizer, heldout_files=heldout, **still, **often)
    answers = ranks.train(file)
    assert [status for status, _ in answers] == [0, 0], answers
    out = Path(read_config(file).out)
    assert [row["step"] for row in rows(read_config(file))] == [1, 2]
    assert [step for step, _ in find_states(out)] == [2, 1]
    assert f"{out}/checkpoint: of step 1, the best validation" in answers[0][1]
    exported = HRM.from_pretrained(out / "checkpoint").state_dict()
    for name, tensor in load_state(find_states(out)[-1][1])[0].items():
        if name.startswith("optimizer.ema."):
            assert torch.equal(exported[name.removeprefix("optimizer.ema.")], tensor.bfloat16().float()), name
