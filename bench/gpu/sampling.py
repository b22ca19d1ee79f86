"""The checks of bench/gpu/checklist.py that ask for tokens drawn, and fed back, on the device."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.checks import Here, WrongError
from bench.gpu.models import toy
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.cuda_sampling import SamplerSlots
from hrmcore.engine.sampling import Sampler, Sampling, sample
from hrmcore.model import HRM

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with a penalty": {"repetition_penalty": 1.2},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "all": {"temperature": 1.2, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
}
# Of the draws of one kind of options: a weight's error, 2^-17 at most, moves one in so many thousands at the very most.
ALLOWED_SHARE = 1 / 200


def sampling(here: Here) -> dict[str, Any]:
    """Tokens drawn on the device beside the CPU's, and on a GPU the microseconds of a launch for 1 and 32 requests."""
    requests, vocabulary, turns = (2, 300, 2) if here.emulated else (32, 65536, 8)
    figures: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        samplings = [Sampling(seed=seed, **options) for seed in range(requests)]
        prompt = list(range(0, vocabulary, 7))
        ours, theirs = ([Sampler(one, prompt) for one in samplings] for _ in range(2))
        slots = SamplerSlots(vocabulary, torch.device(here.device))
        slots.put(dict(enumerate(ours)))
        order, positions = (torch.arange(requests, dtype=torch.int32, device=here.device) for _ in range(2))
        fed = torch.full_like(order, -1)
        different = 0
        for turn in range(turns):
            rows = np.random.default_rng(turn).normal(scale=3, size=(requests, vocabulary)).astype(np.float32)
            logits = torch.from_numpy(rows).to(here.device)
            with here.kernels():
                drawn = slots.draw(logits, fed, order, positions)
            expected = sample(theirs, rows)
            different += sum(a != b for a, b in zip(drawn.tolist(), expected, strict=True))
            fed = torch.tensor(expected, dtype=torch.int32, device=here.device)
        if different > ALLOWED_SHARE * requests * turns:
            raise WrongError(f"{name}: {different} of {requests * turns} tokens are not the CPU's")
        figures[name] = {"draws": requests * turns, "different": different}
        if not here.emulated:
            for batch in (1, requests):
                operands = logits[:batch], fed[:batch], order[:batch], positions[:batch]
                figures[name][f"us_{batch}"] = _microseconds(slots, *operands)
    return figures


def _microseconds(slots: SamplerSlots, *operands: Tensor, launches: int = 20, times: int = 10) -> float:
    """Of a launch among others in a graph, so that the host's share is none."""
    slots.draw(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            slots.draw(*operands)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) / (times * launches) * 1000, 2)


def every_small_draw(here: Here) -> int:
    """A token for each kind of options, of rows that accesses of 16 bytes fit and of others; how many."""
    count = 0
    for vocabulary in (300, 1021):
        slots = SamplerSlots(vocabulary, torch.device(here.device))
        slots.put({i: Sampler(Sampling(seed=i, **one), [1, 2]) for i, one in enumerate(OPTIONS.values())})
        order = torch.arange(len(OPTIONS), dtype=torch.int32, device=here.device)
        logits = torch.randn(len(OPTIONS), vocabulary, generator=torch.Generator().manual_seed(8)).to(here.device)
        with here.kernels():
            drawn = slots.draw(logits, order, order, order.clone())
        if not bool(((drawn >= 0) & (drawn < vocabulary)).all()):
            raise WrongError(f"tokens outside of a vocabulary of {vocabulary}: {drawn.tolist()}")
        count += len(OPTIONS)
    return count


def fed_back(here: Here) -> dict[str, Any]:
    """Answers whose tokens are drawn and fed back on the device, beside those whose logits go to the host.

    One request leaves half way. On a GPU also the milliseconds of a token, of one request alone, by the host's clock.
    """
    torch.manual_seed(6)
    config, requests, count = (toy(), 3, 4) if here.emulated else (HRMConfig.preset("XL"), 12, 64)
    runner = CudaRunner(HRM(config).requires_grad_(False).to(here.device), blocks=2 if here.emulated else 0)
    device, host = (answers(here, runner, requests, count, way)[0] for way in ("device", "host"))
    different = sum(a != b for a, b in zip(device, host, strict=True))
    if different > requests // 12:  # a draw moved by rounding, 1 in 10,000 at most, changes all that follow it
        raise WrongError(f"{different} of {requests} answers are not those of the host")
    if runner.open_sequences or runner.steps_ahead:
        raise WrongError("something is left of requests that were closed")
    figures: dict[str, Any] = {"answers": requests, "tokens": count, "different": different}
    if not here.emulated:
        for way in ("host", "device"):
            figures[f"{way}_ms"] = round(1000 * answers(here, runner, 1, 256, way)[1], 3)
    return figures


def answers(here: Here, runner: CudaRunner, requests: int, count: int, way: str) -> tuple[list[list[int]], float]:
    """Tokens of each request, drawn on the device or on the host; and seconds a token of the second half."""
    prompts = [[(7 * i + j) % runner.config.vocab_size for j in range(5 + 3 * i)] for i in range(requests)]
    handles, rows = runner.open(prompts, [len(prompt) for prompt in prompts])
    options = list(OPTIONS.values())
    samplers = [Sampler(Sampling(seed=i, **options[i % len(options)]), prompt) for i, prompt in enumerate(prompts)]
    tokens = sample(samplers, rows)
    found, begun = [[token] for token in tokens], 0.0
    for left in reversed(range(count)):
        if left == count // 2:
            begun = time.perf_counter()
            if len(handles) > 1:
                runner.close(handles.pop())
        fed, beside = tokens[: len(handles)], samplers[: len(handles)]
        with here.kernels() if here.emulated else contextlib.nullcontext():
            if way == "host":
                tokens = sample(beside, runner.step(handles, fed))
            else:
                tokens = runner.draw(handles, fed, beside, [left] * len(handles))
        for answer, token in zip(found[: len(handles)], tokens, strict=True):
            answer.append(token)
    seconds = (time.perf_counter() - begun) / (count // 2 + 1)
    for handle in handles:
        runner.close(handle)
    return found, seconds


CHECKS = {"sampling": sampling, "fed_back": fed_back}
