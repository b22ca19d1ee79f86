"""Two gloo processes against one: the same curve, the same states, and they stop together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hrmcore import microbench
from hrmcore.data import BatchStream
from hrmcore.model import HRM
from hrmcore.run_config import TrainConfig, read_config
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train import Trainer
from hrmcore.training_state import find_states, load_state, state_path

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
RECORDS = [
    {"instruction": f"repeat {a} {b}", "response": " ".join([a, b] * (1 + i % 3))}
    for i, a in enumerate(WORDS)
    for b in WORDS
]
STEPS = 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((r["instruction"] for r in RECORDS), folder, vocab_size=330)
    return folder


def write_run(folder: Path, tokenizer: Path, **keys: object) -> Path:
    """A run file in a folder of its own, for a model of 30,000 parameters."""
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    values: dict[str, object] = {
        "train_files": [f"{folder}/train.jsonl"],
        "tokenizer": str(tokenizer),
        "out": f"{folder}/out",
        "steps": STEPS,
        "batch_tokens": 256,
        "accumulate": 2,
        "optimizer": "adamw",
        "warmup_steps": 5,
        "seed": 7,
    } | keys
    model = """
[model]
hidden_size = 32
intermediate_size = 64
num_layers_per_stack = 1
num_attention_heads = 2
head_dim = 16
max_position_embeddings = 64
"""
    path = folder / "run.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) + model)
    return path


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the measurement of the machine's peak, which the MFU alone needs."""
    monkeypatch.setattr(microbench, "peak_flops", lambda precision: 1e12)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def torchrun(run_file: Path) -> None:
    """The command of the README."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "hrmcore", "train", str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


class Ranks:
    """Two processes with the environment that torchrun would give them; they train one run file after another."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT | place | {"RANK": rank},
            )
            for rank in ("0", "1")
        ]

    def train(self, *files: Path, poisoned: int | None = None) -> list[tuple[int, str]]:
        """Status and stderr of each rank; one run file for both, or one for each."""
        self.begin(*files, poisoned=poisoned)
        return self.answers()

    def begin(self, *files: Path, poisoned: int | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        names = [str(files[0]), str(files[-1])]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"files": names, "port": port, "poisoned": poisoned}) + "\n")
            process.stdin.flush()

    def answers(self) -> list[tuple[int, str]]:
        deadline = threading.Timer(120, self.kill)  # two ranks that wait for each other
        deadline.start()
        lines = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        deadline.cancel()
        assert all(lines), "a rank has ended, or did not within two minutes"
        return [(answer["status"], answer["errors"]) for answer in map(json.loads, lines)]

    def interrupt(self, rank: int) -> None:
        self._processes[rank].send_signal(signal.SIGINT)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.communicate()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def rows(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def check_curve(found: TrainConfig, expected: TrainConfig, first: int = 1) -> None:
    """Losses of the steps from `first` on, to 1e-5; the records of each are those of one process."""
    theirs = rows(expected)[first - 1 :]
    ours = rows(found)
    assert [row["step"] for row in ours] == list(range(first, expected.steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["tokens"], a["supervised_tokens"]) == (b["tokens"], b["supervised_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]


def go_on_from(source: TrainConfig, step: int, config: TrainConfig) -> None:
    """Put the state of a step of one run into the folder of another."""
    path = state_path(Path(config.out), step)
    path.parent.mkdir(parents=True)
    shutil.copy(state_path(Path(source.out), step), path)


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


def test_a_nan_of_one_rank_stops_both_and_is_named(tmp_path: Path, tokenizer: Path, ranks: Ranks) -> None:
    file = write_run(tmp_path / "run", tokenizer, save_every=1, accumulate=1)
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
