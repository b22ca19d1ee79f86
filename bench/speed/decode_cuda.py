"""How fast the engine on CUDA is on one checkpoint: what `python -m bench.speed.decode CHECKPOINT --device cuda` runs.

Tokens are drawn and fed back on the device, as `generate` does, and timed by the host's clock from one to the next;
batches take turns with each other and with plain copies of the device's memory. Beside them the decode step alone, by
the device's clock, and transformers on the same checkpoint: eager, and with a static cache compiled.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hrmcore
from bench.intervals import median_with_interval
from bench.speed.decode import bytes_a_token
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.sampling import Sampler, Sampling
from hrmcore.machine import Work, best_times, copy_of, cuda_seconds
from hrmcore.microbench import place_of

COPY_BYTES = 4 << 30

Clock = Callable[[Work], float]


def report(
    checkpoint: Path,
    dtypes: Sequence[str],
    device: str,
    prefill: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    tokens: int,
    turns: int,
) -> dict[str, Any]:
    """All lines. Raises ValueError where there is no such device."""
    place_of(device)
    lines = []
    for dtype in dtypes:
        begun = time.perf_counter()
        engine = hrmcore.load(checkpoint, dtype=dtype, device=device)
        loaded = time.perf_counter() - begun
        runner = engine._runner
        assert isinstance(runner, CudaRunner)
        line: dict[str, Any] = {"engine": f"hrmcore {dtype}", "load_seconds": loaded}
        line |= measure(runner, device, prefill, batches, contexts, tokens, turns)
        lines.append(line)
        print(row(line), flush=True)
        del engine, runner
        torch.cuda.empty_cache()
    for static in (False, True):
        lines.append({"engine": "transformers, " + ("static cache, compiled" if static else "eager")})
        lines[-1] |= of_transformers(checkpoint, device, prefill, tokens, turns, static)
        print(row(lines[-1]), flush=True)
    return {"checkpoint": checkpoint.name, "device": torch.cuda.get_device_name(device), "lines": lines}


def measure(
    runner: CudaRunner,
    device: str,
    prefill: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    tokens: int,
    turns: int,
    timed: Clock = cuda_seconds,
    copy_bytes: int = COPY_BYTES,
) -> dict[str, Any]:
    """What one engine reaches: the first token, tokens a second by batch and by context, and its shares."""
    line: dict[str, Any] = {"prefill": prefill, "first_token_seconds": first_token(runner, prefill)}
    copy = copy_of(copy_bytes, device)
    groups = {batch: Group(runner, batch, prefill) for batch in batches}
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    copies = []
    for turn in range(turns + 1):
        for batch, group in groups.items():
            taken = group.take(tokens)
            if turn:  # the first brings kernels and pages
                seconds[batch].append(taken)
        copies.append(copy_bytes / timed(copy) / 1e9)
    line["copy_gb_s"] = max(copies)
    line["tokens_a_second"] = {str(b): b / statistics.median(taken) for b, taken in seconds.items()}
    size = bytes_a_token(runner.config, runner.dtype) / 1e9
    for batch, group in groups.items():
        cached = group.length * batch * runner.cache_bytes_per_token / 1e9
        shares = [(size + cached) / taken / line["copy_gb_s"] for taken in seconds[batch]]
        line.setdefault("share_of_copy", {})[str(batch)] = median_with_interval(shares)
        alone = group.step_seconds(timed)
        line.setdefault("share_of_step", {})[str(batch)] = alone / statistics.median(seconds[batch])
        group.close()
    line["contexts"] = {}
    for length in contexts:
        if length + 2 * tokens < runner.config.context:
            group = Group(runner, 1, length)
            group.take(tokens)
            line["contexts"][str(length)] = 1 / group.take(tokens)
            group.close()
    return line


class Group:
    """Requests that decode together, greedily."""

    def __init__(self, runner: CudaRunner, batch: int, length: int) -> None:
        self._runner = runner
        chance = random.Random(batch)
        prompts = [[chance.randrange(runner.config.vocab_size) for _ in range(length)] for _ in range(batch)]
        self._handles, _ = runner.open(prompts, [length] * batch)
        self._samplers = [Sampler(Sampling(), []) for _ in prompts]
        self._last = [prompt[0] for prompt in prompts]
        self.length = length

    def take(self, tokens: int) -> float:
        """Seconds of a step of so many; the next one is under way at the end, as it was at the beginning."""
        self._draw()
        begun = time.perf_counter()
        for _ in range(tokens):
            self._draw()
        return (time.perf_counter() - begun) / tokens

    def _draw(self) -> None:
        self._last = self._runner.draw(self._handles, self._last, self._samplers, [1] * len(self._handles))
        self.length += 1

    def step_seconds(self, timed: Clock) -> float:
        """Of the decode step alone, at its best: nothing is drawn."""
        runner = self._runner
        runner.reserve(self._handles, 1)
        device = runner.kv.device
        numbers = [self._last, [runner.length_of(handle) for handle in self._handles]]
        tokens, positions = (torch.tensor(row, dtype=torch.int32, device=device) for row in numbers)
        tables = runner.page_tables(self._handles)
        with torch.inference_mode():
            return best_times([lambda: runner.decode(tokens, positions, tables)], 0.2, timed)[0]

    def close(self) -> None:
        for handle in self._handles:
            self._runner.close(handle)


def first_token(runner: CudaRunner, length: int, repeats: int = 5) -> float:
    """Median seconds from a prompt to its logits on the host, after one that brings kernels and pages."""
    taken = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        handles, _ = runner.open([[1] * length], [length])
        taken.append(time.perf_counter() - begun)
        runner.close(handles[0])
    return statistics.median(taken[1:])


def of_transformers(
    checkpoint: Path, device: str, prefill: int, tokens: int, turns: int, static: bool
) -> dict[str, Any]:
    """transformers' greedy tokens in bfloat16; with a static cache its generate compiles the forward by itself.

    What it does not take is named in the line, under `error`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)
    ids = torch.ones(1, prefill, dtype=torch.int64, device=device)
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            **options,
        )
        return time.perf_counter() - begun

    try:
        first, whole = [], []
        for turn in range(turns + 2):  # two that compile
            pair = seconds(1), seconds(1 + tokens)
            if turn > 1:
                first.append(pair[0])
                whole.append(pair[1])
    except (RuntimeError, ValueError, TypeError) as error:  # the peer's: the other lines stand without it
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    a_token = (statistics.median(whole) - statistics.median(first)) / tokens
    return {"prefill": prefill, "first_token_seconds": statistics.median(first), "tokens_a_second": {"1": 1 / a_token}}


def row(line: dict[str, Any]) -> str:
    """A line of the report, for people."""
    if "error" in line:
        return f"{line['engine']}: {line['error']}"
    speeds = "  ".join(f"x{batch} {speed:.1f}" for batch, speed in line["tokens_a_second"].items())
    text = (
        f"{line['engine']}: first token of {line['prefill']} {1e3 * line['first_token_seconds']:.1f} ms, tok/s {speeds}"
    )
    if "copy_gb_s" not in line:
        return text
    shares = "  ".join(
        f"x{batch} {share['median']:.0%} of the copy, {line['share_of_step'][batch]:.1%} of the step's"
        for batch, share in line["share_of_copy"].items()
    )
    shares += f"  (copy {line['copy_gb_s']:.0f} GB/s)"
    contexts = "  ".join(f"{length} {speed:.1f}" for length, speed in line["contexts"].items())
    return f"{text}\n  {shares}\n  tok/s by context: {contexts}"
