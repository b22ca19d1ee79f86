"""The fused decode step for `hrmcore bench`: a token's time beside the model in torch, and its share of a copy.

Shapes: B requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_decode import CudaStep
from hrmcore.engine.mma_layout import MMA_DTYPES
from hrmcore.engine.runner import PAGE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.machine import Work, best_times, copy_of
from hrmcore.model import HRM

CACHED = 200  # tokens in the cache of each request
BATCHES = (1, 8)
BITS = {"bfloat16": 16.0, "int8": 8.5, "int4": 4.5}  # of a weight, its share of a scale included
HEAD_BITS = BITS | {"int4": BITS["int8"]}


def step_bytes(config: HRMConfig, dtype: str, batch: int) -> int:
    """Bytes that a step must read: the weights of every visit and the head once, and each request's keys and values."""
    layer = config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)
    weights = config.cache_slots * layer * BITS[dtype] + config.vocab_size * config.hidden_size * HEAD_BITS[dtype]
    return int(weights / 8) + batch * (CACHED + 1) * 4 * config.cache_slots * config.attention_width


def decode_step_lines(
    device: str,
    timed: Callable[[Work], float],
    seconds: float,
    config: HRMConfig | None = None,
    kernels: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    blocks: int = 0,
) -> Iterator[dict[str, Any]]:
    """A line for each dtype and batch, of random weights in the 1B shape unless another is given.

    torch's token is that of the engine's reference runner in bfloat16, launched from the host. `kernels` is entered
    around ours.
    """
    config = config or HRMConfig.preset("XL")
    with torch.inference_mode():
        torch.manual_seed(0)
        with torch.device(device):
            model = HRM(config).requires_grad_(False).to(torch.bfloat16)
        model.reset_positions(len(model.rope_table))
        for dtype in MMA_DTYPES:
            step = CudaStep(model, blocks=blocks, dtype=dtype)
            for batch in BATCHES:
                runner = TorchRunner(model)
                handles, _ = runner.open([[1] * CACHED] * batch, [CACHED] * batch)
                runner.reserve(handles, PAGE)
                tokens, positions = (torch.full((batch,), n, dtype=torch.int32, device=device) for n in (1, CACHED))
                tables, kv = runner.page_tables(handles), runner.kv

                def ours(step: CudaStep = step, operands: tuple[Any, ...] = (tokens, positions, tables, kv)) -> None:
                    with kernels():
                        step(*operands)

                def theirs(runner: TorchRunner = runner, handles: list[int] = handles) -> None:
                    runner.step(handles, [1] * len(handles))
                    for handle in handles:
                        runner._sequences[handle].length -= 1

                size = step_bytes(config, dtype, batch)
                copy = copy_of(size, device)
                taken, copying, peer = best_times([ours, copy, theirs], seconds, timed)
                yield {
                    "op": "decode_step",
                    "direction": "forward",
                    "dtype": dtype,
                    "shape": f"{batch}x{CACHED}",
                    "seconds": taken,
                    "peer": "torch",
                    "peer_seconds": peer,
                    "gbs": size / taken / 1e9,
                    "gflops": 0.0,
                    "bound": "memory",
                    "share_of_limit": copying / taken,
                    "times_torch": peer / taken,
                }
