"""How fast the CPU engine is on one checkpoint: prefill, decode, batches of 1 to 16, contexts up to 4k, time to the
first token, peak memory, and the share of the memory bandwidth. Batches take turns with each other and with plain reads
of the memory, so that ratios and the share are taken within seconds. Checks before it times: two requests beside each
other must give the bits that each gives alone.

    python -m bench.speed.decode CHECKPOINT --dtypes bfloat16,int8,int4 --out bench/decode

Writes OUT.json and OUT.png; the last line printed is the JSON. With --device cuda: bench/speed/decode_cuda.py, which
has no picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hrmcore
from bench.intervals import median_with_interval
from hrmcore import _C
from hrmcore.config import HRMConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtypes", default="bfloat16,int8,int4")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--prefill", type=int, default=256, help="tokens (256)")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--contexts", default="64,1024,4000")
    parser.add_argument("--tokens", type=int, default=8, help="decoded after each context (8)")
    parser.add_argument("--turns", type=int, default=8, help="of the batches, two tokens each (8)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        return on_cuda(args)
    # A process for each dtype: its peak memory is its own.
    context = multiprocessing.get_context("spawn")
    lines = []
    for dtype in args.dtypes.split(","):
        with context.Pool(1) as pool:
            lines.append(pool.apply(measure, (dtype, args)))
        print(row(lines[-1]), flush=True)
    report = {"checkpoint": args.checkpoint.name, "lines": lines}
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        from hrmcore import plots

        plots.decode(report, args.out.with_suffix(".png"))
    print(json.dumps(report))
    return 0


def on_cuda(args: argparse.Namespace) -> int:
    from bench.speed.decode_cuda import report

    batches, contexts = ([int(number) for number in text.split(",")] for text in (args.batches, args.contexts))
    try:
        found = report(
            args.checkpoint,
            args.dtypes.split(","),
            args.device,
            args.prefill,
            batches,
            contexts,
            args.tokens,
            args.turns,
        )
    except ValueError as error:
        print(f"bench.speed.decode: {str(error).removeprefix('bench: ')}", file=sys.stderr)
        return 2
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


def measure(dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one dtype."""
    started = time.perf_counter()
    engine = hrmcore.load(args.checkpoint, dtype=dtype, threads=args.threads)
    loaded = time.perf_counter()
    next(engine.tokens([1] * 16, max_new_tokens=2, ignore_eos=True))
    first_token = time.perf_counter() - loaded
    runner, vocabulary = engine._runner, engine.config.vocab_size
    chance = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [chance.randrange(vocabulary) for _ in range(length)]

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the measurement's own buffers
    check(runner, prompt)
    line: dict[str, Any] = {"dtype": dtype, "threads": runner.core.threads}
    line["load_seconds"], line["first_token_seconds"] = loaded - started, first_token
    line["weight_bytes"] = runner.core.weight_bytes
    line["peak_bytes"] = peak
    line["bytes_a_token"] = bytes_a_token(engine.config, dtype)
    seconds, handle = timed_open(runner, prompt(args.prefill))
    runner.close(handle)
    line["prefill_tokens_a_second"] = args.prefill / seconds
    line |= in_turns(runner, prompt, [int(batch) for batch in args.batches.split(",")], args.turns)
    if "1" in line["batches"]:
        shares = [1 / seconds / read for seconds, read in zip(line["seconds"]["1"], line["reads_gb_s"], strict=True)]
        line["share_of_bandwidth"] = median_with_interval([line["bytes_a_token"] / 1e9 * share for share in shares])
    line["contexts"] = {}
    for length in map(int, args.contexts.split(",")):
        if length + args.tokens < engine.config.max_position_embeddings:
            line["contexts"][length] = 1 / decode(runner, prompt(length), args.tokens)
    return line


def in_turns(runner: Any, prompt: Callable[[int], list[int]], batches: list[int], turns: int) -> dict[str, Any]:
    """Tokens a second of each batch, over those of the first, and the plain memory's GB/s around its steps."""
    stream = StreamRead(runner.core.threads)
    handles = {str(b): [timed_open(runner, prompt(32))[1] for _ in range(b)] for b in batches}
    seconds: dict[str, list[float]] = {name: [] for name in handles}
    reads = []
    for _ in range(turns):
        before = stream.gb_s()
        for name, group in handles.items():
            started = time.perf_counter()
            for _ in range(2):
                runner.step(group, [1] * len(group))
            seconds[name].append((time.perf_counter() - started) / 2)
            if name == str(batches[0]):
                reads.append((before + stream.gb_s()) / 2)
    for handle in [handle for group in handles.values() for handle in group]:
        runner.close(handle)
    first = seconds[str(batches[0])]
    times = {
        name: median_with_interval([int(name) / batches[0] * a / b for a, b in zip(first, taken, strict=True)])
        for name, taken in seconds.items()
    }
    speeds = {name: int(name) / statistics.median(taken) for name, taken in seconds.items()}
    return {"batches": speeds, "times_the_first": times, "seconds": seconds, "reads_gb_s": reads}


def check(runner: Any, prompt: Any) -> None:
    """Raises SystemExit when company changes a bit."""
    prompts = [prompt(9), prompt(5)]
    rows = []
    for ids in (*[[ids] for ids in prompts], prompts):
        handles, logits = runner.open(ids, [len(tokens) for tokens in ids])
        rows += list(logits)
        for handle in handles:
            runner.close(handle)
    if not all(bool((a == b).all()) for a, b in zip(rows[:2], rows[2:], strict=True)):
        raise SystemExit("two requests together differ from each alone: not timed")


# Bits of a weight in a layer, its share of a scale included, here and in llama.cpp.
BITS = {"float32": 32, "bfloat16": 16, "bf16": 16, "int8": 8.5, "q8_0": 8.5, "int4": 4.5, "q4_0": 4.5}
HEAD_BITS = BITS | {"int4": BITS["int8"]}


def bytes_a_token(config: HRMConfig, dtype: str) -> float:
    """Bytes of weights that one decoded token must read: every visit of every layer, and the head."""
    layer = config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    return (config.cache_slots * layer * BITS[dtype] + head * HEAD_BITS[dtype]) / 8


class StreamRead:
    """Reads 1 GiB on all threads; no cache holds it."""

    def __init__(self, threads: int) -> None:
        _C.set_num_threads(threads)
        self._source = np.ones(1 << 28, np.float32)
        self._sums = np.empty(len(self._source) // _C.stream_block, np.float32)

    def gb_s(self) -> float:
        """The median of three."""
        times = []
        for _ in range(3):
            started = time.perf_counter()
            _C.stream_read(self._source, self._sums)
            times.append(time.perf_counter() - started)
        return self._source.nbytes / statistics.median(times) / 1e9


def timed_open(runner: Any, ids: list[int]) -> tuple[float, int]:
    started = time.perf_counter()
    (handle,), _ = runner.open([ids], [len(ids)])
    return time.perf_counter() - started, handle


def decode(runner: Any, prompt: list[int], tokens: int) -> float:
    """Median seconds of a token after the prompt."""
    _, handle = timed_open(runner, prompt)
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        runner.step([handle], [1])
        times.append(time.perf_counter() - started)
    runner.close(handle)
    return statistics.median(times)


def row(line: dict[str, Any]) -> str:
    times = line["times_the_first"]
    batches = "  ".join(
        f"x{batch} {speed:.2f} ({times[batch]['median']:.2f}x, {times[batch]['low']:.2f} to {times[batch]['high']:.2f})"
        for batch, speed in line["batches"].items()
    )
    contexts = "  ".join(f"{length} {speed:.2f}" for length, speed in line["contexts"].items())
    share = line.get("share_of_bandwidth")
    of_bandwidth = f"{share['median']:.0%} ({share['low']:.0%} to {share['high']:.0%})" if share else "(no batch of 1)"
    return (
        f"{line['dtype']:9} load {line['load_seconds']:.2f} s, first token {line['first_token_seconds']:.2f} s, "
        f"prefill {line['prefill_tokens_a_second']:.1f} tok/s\n"
        f"  decode tok/s by batch (over the first, 95%): {batches}\n"
        f"  decode tok/s by context: {contexts}\n"
        f"  {of_bandwidth} of {statistics.median(line['reads_gb_s']):.1f} GB/s, "
        f"peak {line['peak_bytes'] / 1e9:.2f} GB for {line['weight_bytes'] / 1e9:.2f} GB of weights"
    )


if __name__ == "__main__":
    sys.exit(main())
