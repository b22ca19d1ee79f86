"""How fast the CPU engine is on one checkpoint: prefill, decode, batches of 1 to 16, contexts up to 4k, time to the
first token, peak memory, and the share of the memory bandwidth measured in the same run. Checks before it times: two
requests beside each other must give the bits that each gives alone.

    python bench/decode.py CHECKPOINT --dtypes bfloat16,int8,int4 --out bench/decode

Writes OUT.json and OUT.png; the last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import hrmcore
from hrmcore import _C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtypes", default="bfloat16,int8,int4")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--prefill", type=int, default=256, help="tokens (256)")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--contexts", default="64,1024,4000")
    parser.add_argument("--tokens", type=int, default=8, help="decoded for each figure (8)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
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
    line["bytes_a_token"] = bytes_a_token(engine)
    seconds, handle = timed_open(runner, prompt(args.prefill))
    runner.close(handle)
    line["prefill_tokens_a_second"] = args.prefill / seconds
    line["batches"], line["contexts"] = {}, {}
    bandwidths = [stream_gb_s()]
    for batch in map(int, args.batches.split(",")):
        line["batches"][batch] = batch / decode(runner, [prompt(32) for _ in range(batch)], args.tokens)
        bandwidths.append(stream_gb_s())
    for length in map(int, args.contexts.split(",")):
        if length + args.tokens < engine.config.max_position_embeddings:
            line["contexts"][length] = 1 / decode(runner, [prompt(length)], args.tokens)
    line["stream_gb_s"] = statistics.median(bandwidths)
    if 1 in line["batches"]:
        line["share_of_bandwidth"] = line["batches"][1] * line["bytes_a_token"] / line["stream_gb_s"] / 1e9
    return line


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


BITS = {"float32": 32, "bfloat16": 16, "int8": 8.5, "int4": 4.5}  # a weight in a layer, its share of a scale included
HEAD_BITS = BITS | {"int4": BITS["int8"]}


def bytes_a_token(engine: Any) -> float:
    """Bytes of weights that one decoded token must read: every visit of every layer, and the head."""
    config, dtype = engine.config, engine._runner.dtype
    layer = config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    return (config.cache_slots * layer * BITS[dtype] + head * HEAD_BITS[dtype]) / 8


def stream_gb_s() -> float:
    """Reading 1 GiB on all threads, the median of five; no cache holds it."""
    source = np.ones(1 << 28, np.float32)
    sums = np.empty(len(source) // _C.stream_block, np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        _C.stream_read(source, sums)
        times.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(times) / 1e9


def timed_open(runner: Any, ids: list[int]) -> tuple[float, int]:
    started = time.perf_counter()
    (handle,), _ = runner.open([ids], [len(ids)])
    return time.perf_counter() - started, handle


def decode(runner: Any, prompts: list[list[int]], tokens: int) -> float:
    """Median seconds of a step that advances all prompts by one token."""
    handles = [timed_open(runner, ids)[1] for ids in prompts]
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        runner.step(handles, [1] * len(handles))
        times.append(time.perf_counter() - started)
    for handle in handles:
        runner.close(handle)
    return statistics.median(times)


def row(line: dict[str, Any]) -> str:
    batches = "  ".join(f"x{batch} {speed:.2f}" for batch, speed in line["batches"].items())
    contexts = "  ".join(f"{length} {speed:.2f}" for length, speed in line["contexts"].items())
    return (
        f"{line['dtype']:9} load {line['load_seconds']:.2f} s, first token {line['first_token_seconds']:.2f} s, "
        f"prefill {line['prefill_tokens_a_second']:.1f} tok/s\n  decode tok/s by batch: {batches}\n"
        f"  decode tok/s by context: {contexts}\n"
        f"  {line.get('share_of_bandwidth', 0):.0%} of {line['stream_gb_s']:.1f} GB/s, "
        f"peak {line['peak_bytes'] / 1e9:.2f} GB for {line['weight_bytes'] / 1e9:.2f} GB of weights"
    )


if __name__ == "__main__":
    main()
