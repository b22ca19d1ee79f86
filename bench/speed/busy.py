"""Decoding and training beside busy processes: what share of a fair share is left. With k processes that never rest
beside it, a program on all of n processors is due n / (n + k) of what it does alone; threads that wait for each other
by spinning, or in fixed halves, get much less.

    python -m bench.speed.busy CHECKPOINT --gguf q8_0=model-q8_0.gguf --train --out bench/busy

Each program lives in a process of its own and has its turns: alone, beside one busy process, beside two. In a round
each program takes every turn, in an order that alternates; shares are taken within a round. Needs the extra `bench`;
--train, which sets our training step beside that of transformers, needs `demo`, too. The last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.intervals import median_with_interval
from bench.speed.peers import open_hrmcore, open_llama, open_transformers
from hrmcore import _C, machine

OPENERS = {"hrmcore": open_hrmcore, "transformers": open_transformers, "llama.cpp": open_llama}
ROOM = 4096  # tokens of a cache; a sequence begins anew before it is full
PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--gguf", action="append", default=[], metavar="NAME=FILE", help="for llama.cpp: bf16, q8_0 or q4_0; repeated"
    )
    parser.add_argument("--dtypes", default="int8", help="of hrmcore (int8); empty leaves it out")
    parser.add_argument("--transformers", default="", help="its dtypes; default: none")
    parser.add_argument("--train", action="store_true", help="training steps, too")
    parser.add_argument("--threads", type=int, default=_C.num_threads(), help="default: all")
    parser.add_argument("--busy", default="1,2", help="processes beside it (1,2)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (2)")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args()
    jobs = [("hrmcore", dtype, str(args.checkpoint)) for dtype in args.dtypes.split(",") if dtype]
    jobs += [("transformers", dtype, str(args.checkpoint)) for dtype in args.transformers.split(",") if dtype]
    jobs += [("llama.cpp", *entry.split("=", 1)) for entry in args.gguf]
    jobs += [("train", side, "") for side in ("hrmcore", "transformers") if args.train]
    counts = [0, *map(int, args.busy.split(","))]
    programs = [Program(*job, args.threads) for job in jobs]
    turns = rounds(programs, counts, args)
    report = {
        "processor": machine.processor(),
        "threads": args.threads,
        "fair": {k: args.threads / (args.threads + k) for k in counts},
        "programs": {program.title: summary(turns[program.title], counts, args.threads) for program in programs},
    }
    print_table(report)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


class Program:
    """One program in a process of its own, which works when it is asked to."""

    def __init__(self, name: str, kind: str, path: str, threads: int) -> None:
        self.title = f"{name} {kind}"
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, kind, path, threads, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.rate(0.5)  # warm: pages touched, kernels chosen

    def rate(self, seconds: float) -> float:
        self.connection.send(seconds)
        return float(self.connection.recv())


def serve(name: str, kind: str, path: str, threads: int, connection: Connection) -> None:
    """Answers each number of seconds with the steps a second that were done in them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _C.set_num_threads(threads)
    step = training(kind, threads) if name == "train" else decoding(name, kind, path, threads)
    while True:
        try:
            seconds = connection.recv()
        except EOFError:
            return
        began, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds or done == 0:
            step()
            done += 1
        connection.send(done / passed)


def decoding(name: str, dtype: str, path: str, threads: int) -> Callable[[], None]:
    engine = OPENERS[name](dtype, path, threads, ROOM)
    chance = random.Random(0)
    held = ROOM

    def step() -> None:
        nonlocal held
        if held + 1 >= ROOM:
            engine.start([chance.randrange(60) for _ in range(PROMPT)])
            held = PROMPT
        engine.step()
        held += 1

    return step


def training(side: str, threads: int) -> Callable[[], None]:
    import tempfile

    from bench import mix
    from bench.speed import train

    train.use_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        mix.write(Path(folder), records=300, heldout=1)
        corpus, vocabulary = train.corpus_of("mix", Path(folder))
    batches = train.batches_of(corpus, 2048)
    models = train.models_of("1M", vocabulary, 5, int(corpus.lengths.max()))
    padded = [train.pad(corpus, batch.records) for batch in batches]
    one = train.steps_of(models, batches, padded, 5)[side]
    order = iter(range(10**9))
    return lambda: one(next(order) % len(batches))


def rest() -> None:
    while True:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that never rest, for as long."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=rest, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(0.5 if processes else 0)  # they have begun
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()


def rounds(programs: list[Program], counts: list[int], args: argparse.Namespace) -> dict[str, list[dict[int, float]]]:
    turns: dict[str, list[dict[int, float]]] = {program.title: [{} for _ in range(args.rounds)] for program in programs}
    for number in range(args.rounds):
        forwards = number % 2 == 0
        for count in counts if forwards else reversed(counts):
            with busy(count):
                for program in programs if forwards else reversed(programs):
                    turns[program.title][number][count] = program.rate(args.seconds)
        for program in programs:
            print(f"{program.title}: {json.dumps(turns[program.title][number])}", flush=True)
    return turns


def summary(turns: list[dict[int, float]], counts: list[int], threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"alone_a_second": median_with_interval([turn[0] for turn in turns])}
    for count in counts[1:]:
        fair = threads / (threads + count)
        found[f"of_fair_beside_{count}"] = median_with_interval([turn[count] / turn[0] / fair for turn in turns])
    return found


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['processor']}, {report['threads']} threads; share of a fair share, its 95% interval")
    for title, found in report["programs"].items():
        for key, value in found.items():
            print(f"  {title:24} {key:20} {value['median']:8.3f}   {value['low']:.3f} to {value['high']:.3f}")


if __name__ == "__main__":
    main()
