"""Two processes that train, and how their runs are compared: for tests/test_distributed.py and test_sharding.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import runs

from hrmcore.checkpoint.training_state import state_path
from hrmcore.train.run_file import TrainConfig

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
RECORDS = [
    {"instruction": f"repeat {a} {b}", "response": " ".join([a, b] * (1 + i % 3))}
    for i, a in enumerate(WORDS)
    for b in WORDS
]
STEPS = 50


def write_run(folder: Path, tokenizer: Path, **keys: object) -> Path:
    """A run file in a folder of its own, for a model of 30,000 parameters."""
    usual = {"steps": STEPS, "batch_tokens": 256, "accumulate": 2, "optimizer": "adamw", "warmup_steps": 5, "seed": 7}
    return runs.write_run(folder, RECORDS, tokenizer, **usual | keys)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


class Ranks:
    """Two processes with the environment that torchrun would give them; they train one run file after another.

    `held` are the bytes of model and optimizer that each of them held when its last run ended.
    """

    held: list[int]

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

    def train(self, *files: Path, **options: int) -> list[tuple[int, str]]:
        """Status and stderr of each rank; one run file for both, or one for each."""
        self.begin(*files, **options)
        return self.answers()

    def begin(self, *files: Path, poisoned: int | None = None, dies: int | None = None) -> None:
        """With the loss of a record being NaN; with rank 0 killed when it is about to name its n-th state."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        names = [str(files[0]), str(files[-1])]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"files": names, "port": port, "poisoned": poisoned, "dies": dies}) + "\n")
            process.stdin.flush()

    def answers(self) -> list[tuple[int, str]]:
        answers = [self._answer(process) for process in self._processes]
        self.held = [answer["held"] for answer in answers]
        return [(answer["status"], answer["errors"]) for answer in answers]

    def answer_of(self, rank: int) -> tuple[int, str]:
        """Of one rank, the other one being dead."""
        answer = self._answer(self._processes[rank])
        return answer["status"], answer["errors"]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        deadline = threading.Timer(300, self.kill)  # two ranks that wait for each other
        deadline.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        deadline.cancel()
        assert line, "a rank has ended, or did not within five minutes"
        return json.loads(line)

    def interrupt(self, rank: int) -> None:
        self._processes[rank].send_signal(signal.SIGINT)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.communicate()


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
    """Put the state of a step of one run, a file or a folder, into the folder of another."""
    found = state_path(Path(source.out), step, sharded=source.parallel == "sharded")
    path = Path(config.out) / "states" / found.name
    path.parent.mkdir(parents=True)
    if found.is_dir():
        shutil.copytree(found, path)
    else:
        shutil.copy(found, path)
