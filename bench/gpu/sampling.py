"""The checks of bench/gpu/checklist.py that ask for tokens drawn on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.checks import Here, WrongError
from hrmcore.engine.cuda_sampling import SamplerSlots
from hrmcore.engine.sampling import Sampler, Sampling, sample

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


CHECKS = {"sampling": sampling}
