"""Kills a trainer at random moments and compares what it ends with to a run that nobody disturbed.

    python tests/soak/killing.py RUN.toml KILLS [MUTATION]

RUN.toml's `out` names the undisturbed run; the others lie beside it. Trainers are forked from this process, which has
torch loaded already. Prints one JSON object. MUTATION breaks the trainer on purpose, to show that it would be noticed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it late: here it is done once, before the forks

from hrmcore import _C, machine
from hrmcore.checkpoint import training_state
from hrmcore.checkpoint.training_state import find_newest, find_states, load_state
from hrmcore.data.packing import BatchStream
from hrmcore.train import resume
from hrmcore.train.run_file import TrainConfig, read_config
from hrmcore.train.trainer import Trainer

# Calls of os in the middle of writing a state; the n-th call of it in a process is its last.
POINTS = [(name, count) for name in ("fsync", "replace") for count in (1, 2, 3, 4)]


def fork(work: Callable[[], object]) -> int:
    """A process that does this and ends with status 0, or 1 if it failed."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def train(config: TrainConfig, last: tuple[str, int] | None = None) -> Callable[[], object]:
    """Train to the end, or up to the n-th call of a function of os."""

    def work() -> None:
        if last is not None:
            name, count = last
            plain, calls = getattr(os, name), itertools.count(1)

            def killing(*args: object) -> object:
                if next(calls) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args)

            setattr(os, name, killing)
        Trainer(config).run()

    return work


def kill_until_done(config: TrainConfig, longest: float, chance: random.Random) -> Iterator[bool]:
    """Start the run again and again, killing it; yields, for each kill, whether a state was being written."""
    while True:
        name = ".writing" if config.parallel == "sharded" else ".writing.tmp"
        started, temporary = time.time(), Path(config.out) / "states" / name
        at_a_point = chance.random() < 0.2
        pid = fork(train(config, chance.choice(POINTS) if at_a_point else None))
        if not at_a_point:
            time.sleep(chance.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                raise RuntimeError("a trainer failed: see above")
            return
        yield temporary.exists() and temporary.stat().st_mtime > started  # not one that an earlier kill left


def mutate(name: str) -> None:
    """Break what a resumed run depends on."""
    if name == "forgets its data position":
        plain = BatchStream.__init__
        BatchStream.__init__ = lambda self, *args: plain(self, *args[:3])  # type: ignore[method-assign]
    elif name == "forgets its averages":
        restore = training_state.restore

        def forgetful(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            restore(path, tensors)
            for key, tensor in tensors.items():
                if ".ema." in key:
                    tensor.zero_()

        resume.restore = forgetful  # type: ignore[assignment]
    else:
        raise ValueError(f"no mutation {name!r}")


def main(run_file: str, kills: int, mutation: str | None = None) -> None:
    torch.set_num_threads(1)
    machine.peak_flops = lambda *_, **__: (
        1e12
    )  # a tenth of a second in every trainer's life, for a figure not needed here
    _C.set_num_threads(1)
    config = read_config(run_file)
    start = time.perf_counter()
    pid = fork(train(config))
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit("the undisturbed run failed")
    longest = 0.5 * (time.perf_counter() - start)
    expected, _ = load_state(find_states(Path(config.out))[0][1])
    if mutation:
        mutate(mutation)
    chance = random.Random(1)
    done = writing = runs = different = 0
    while done < kills:
        runs += 1
        disturbed = dataclasses.replace(config, out=f"{config.out}-{runs}")
        for was_writing in kill_until_done(disturbed, longest, chance):
            done += 1
            writing += was_writing
        newest = find_newest(Path(disturbed.out), print)
        assert newest is not None
        found, _ = load_state(newest[0])
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        different += not same
    print(json.dumps({"kills": done, "while_writing": writing, "runs": runs, "different": different}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
