"""What a step costs that verifies several tokens of a request, beside a step of one: the price of a wrong guess.

    python -m bench.speed.verify            # the embedded model, int8
    python -m bench.speed.verify 100M 1B    # random weights of those shapes

Steps of different sizes take turns; a line is the median of each and its ratio to the first. `hrmcore.engine.scheduler`
guesses at most as many tokens as cost little here.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from hrmcore import _C
from hrmcore.checkpoint.hrm_text import key_table
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import EMBEDDED_MODEL
from hrmcore.machine import processor

SHAPES = {
    "100M": HRMConfig(8192, 768, 2048, 6, 12, 64, max_position_embeddings=1024),
    "1B": HRMConfig(65536, 1536, 4096, 16, 12, 128, max_position_embeddings=1024),
}
ROWS = (1, 2, 3, 4, 6, 8, 12)
PROMPT = 100
SECONDS = 5.0  # a model and number of requests


def runner_of(shape: str) -> CpuRunner:
    """The embedded model, or random weights."""
    if shape == "embedded":
        return CpuRunner.from_checkpoint(EMBEDDED_MODEL, "int8", None, None, 1 << 28)
    config = SHAPES[shape]
    runner = CpuRunner(config, "int8", None, None, 1 << 29)
    runner.core.allocate_weights()
    values = np.random.default_rng(0).normal(scale=0.02, size=1 << 20).astype(np.float32)
    for key in key_table(config):
        runner.core.set_weight(key.name, np.resize(values, key.shape))
    return runner


def measure(runner: CpuRunner, requests: int) -> dict[int, float]:
    """Seconds of a step in which each request advances by so many rows."""
    prompts = [[7] * PROMPT] * requests
    handles, _ = runner.open(prompts, [PROMPT] * requests)
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or not times[ROWS[-1]]:
        for rows, taken in times.items():
            started = time.perf_counter()
            runner.verify(handles, [[5] * rows] * requests)
            taken.append(time.perf_counter() - started)
            for handle in handles:
                runner.rewind(handle, PROMPT)
    for handle in handles:
        runner.close(handle)
    return {rows: float(np.median(taken)) for rows, taken in times.items()}


def main() -> None:
    """Print a line for each model and number of requests."""
    print(f"{processor()}, {_C.num_threads()} threads, int8")
    for shape in sys.argv[1:] or ["embedded"]:
        runner = runner_of(shape)
        for requests in (1, 2, 4):
            found = measure(runner, requests)
            cells = [f"{rows}: {1e3 * seconds:.2f} ms ({seconds / found[1]:.2f}x)" for rows, seconds in found.items()]
            print(f"{shape}, {requests} requests, rows of each: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
