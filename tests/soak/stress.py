"""Batches of 16 mixed requests, cancelled at random: every token must be the one that its request gets alone.

    python tests/soak/stress.py 1000 2

runs a thousand batches on each of two engines, which have two threads each and are shared by two callers; beside them,
answers are dropped half-way, for the garbage collector to close. Prints JSON: tokens, cancelled requests, and by how
many KiB the process grew in the second half. tests/engine/test_stress.py runs fewer, `make tsan` under ThreadSanitizer,
for which this file stays clear of torch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import resource
import sys
import threading
from pathlib import Path

import numpy as np

from hrmcore import _C
from hrmcore.checkpoint.hrm_text import key_table
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import Engine
from hrmcore.engine.streams import Request

CONFIG = HRMConfig(97, 40, 56, 1, 2, 16, H_cycles=2, L_cycles=2, max_position_embeddings=128, eos_token_id=7)
CALLERS = 2
BATCH = 16


def make_runner(dtype: str, kv_dtype: str, threads: int) -> CpuRunner:
    """A model of random weights."""
    runner = CpuRunner(CONFIG, dtype, kv_dtype, threads, cache_bytes=1 << 26)
    runner.verifies = True  # guess, although the model is small
    runner.core.allocate_weights()
    chance = np.random.default_rng(0)
    for key in key_table(CONFIG):
        runner.core.set_weight(key.name, chance.normal(scale=0.2, size=key.shape).astype(np.float32))
    return runner


def make_requests(count: int) -> list[dict]:
    """The arguments of Engine.tokens: every length, prefix and way of sampling."""
    chance = random.Random(1)
    requests = []
    for seed in range(count):
        ids = [chance.randrange(CONFIG.vocab_size) for _ in range(chance.randint(1, 70))]
        sampling = chance.choice(
            [
                {},
                {"repetition_penalty": 1.3},
                {"temperature": 1.0, "top_p": 0.9},
                {"temperature": 2.0, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
            ]
        )
        requests.append(
            {
                "ids": ids,
                "prefix_length": chance.choice([0, len(ids), chance.randint(0, len(ids))]),
                "max_new_tokens": chance.randint(1, 12),
                "ignore_eos": chance.random() < 0.5,
                "seed": seed,
                **sampling,
            }
        )
    return requests


class Stress:
    """One engine under several callers."""

    def __init__(self, runner: CpuRunner) -> None:
        self.runner = runner
        self.engine = Engine(runner, None, Path("nowhere"))
        self.requests = make_requests(48)
        self._fill_cache()
        self.alone = [list(self.engine.tokens(**request)) for request in self.requests]
        self.tokens = self.cancelled = 0
        self.failures: list[BaseException] = []

    def _fill_cache(self) -> None:
        """Write to every page: else memory grows by what the busiest moment needs, which is a matter of luck."""
        ids, handles = [1] * CONFIG.max_position_embeddings, []
        with contextlib.suppress(MemoryError):
            while True:
                handles += self.runner.open([ids], [0])[0]
        for handle in handles:
            self.runner.close(handle)

    def run(self, batches: int, seed: int) -> None:
        """That many batches, shared by the callers. Raises what went wrong first."""
        threads = [
            threading.Thread(target=self._call, args=(batches // CALLERS, random.Random(seed + caller)))
            for caller in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        gc.collect()
        assert self.engine.reused_prefills > 0
        self.engine._prefills.shrink(0)
        held = (self.engine.open_requests, self.runner.core.cache_pages_used)
        assert held == (0, 0), "something was not released"

    def _call(self, batches: int, chance: random.Random) -> None:
        try:
            for _ in range(batches):
                self._batch(chance)
        except BaseException as failure:
            self.failures.append(failure)

    def _batch(self, chance: random.Random) -> None:
        picked = [chance.randrange(len(self.requests)) for _ in range(BATCH)]
        running = [self.engine.tokens(**self.requests[index]).request for index in picked]
        received: list[list[int]] = [[] for _ in picked]
        leaving = chance.randrange(300) if chance.random() < 0.1 else -1
        decoding = self.engine._decode(running)
        for count, (place, token) in enumerate(decoding):
            received[place].append(token)
            if chance.random() < 0.05:
                cancel(chance.choice(running))
            if chance.random() < 0.02:
                self._forget(chance)
            if count == leaving:  # the whole batch
                decoding.close()
                break
        else:
            leaving = -1
        for index, request, tokens in zip(picked, running, received, strict=True):
            full = self.alone[index]
            whole = leaving < 0 and request.finish != "closed"
            if tokens != (full if whole else full[: len(tokens)]):
                raise AssertionError(f"request {index} gave {tokens}, alone {full}")
            self.tokens += len(tokens)
            self.cancelled += not whole

    def _forget(self, chance: random.Random) -> None:
        """Drop an answer that has begun, so that the collector closes it some time later, perhaps inside a step."""
        cycle, tokens = forgotten(), self.engine.tokens(**self.requests[chance.randrange(len(self.requests))])
        cycle.append(tokens)
        next(tokens, None)


def forgotten() -> list[object]:
    """Reference cycles: what only the garbage collector frees, in whatever thread it runs."""
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


def cancel(request: Request) -> None:
    """As Tokens.close does, from the outside."""
    request.finish = request.finish or "closed"


def resident_kib() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def held_kib(stresses: list[Stress]) -> int:
    """The same without the engines' working memory, which is as large as the prefill that used it last."""
    return resident_kib() - sum(stress.runner.core.workspace_bytes for stress in stresses) // 1024


def main() -> None:
    batches, threads = map(int, sys.argv[1:])
    stresses = [Stress(make_runner(dtype, dtype, threads)) for dtype in ("float32", "int8")]
    grown = 0
    for seed in (1, 100):
        before = held_kib(stresses)
        for stress in stresses:
            stress.run(batches // 2, seed)
        grown = held_kib(stresses) - before
    report = {
        "isa": _C.isa(),
        "batches": batches * len(stresses),
        "threads": threads,
        "tokens": sum(stress.tokens for stress in stresses),
        "cancelled": sum(stress.cancelled for stress in stresses),
        "grown_kib": grown,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
