"""The check of bench/gpu/checklist.py that asks for two GPUs: what a toy computes on the second, the first in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.checks import Here, NotRunError, WrongError
from bench.gpu.models import random_batch, toy
from bench.gpu.train import Again
from hrmcore import optim
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.mma_layout import MMA_DTYPES
from hrmcore.engine.sampling import Sampler, Sampling
from hrmcore.model import HRM


def second_device(here: Here) -> dict[str, Any]:
    """Every launch goes to the device of its tensors: the bits are the first GPU's, which holds nothing of it."""
    if not here.emulated and (count := torch.cuda.device_count()) < 2:
        raise NotRunError(f"needs two GPUs, this machine has {count}")
    names = ("cpu", "cpu") if here.emulated else ("cuda:1", "cuda:0")
    results = []
    with here.kernels():
        for name in names:
            results.append({what: found.cpu() for what, found in computed_on(torch.device(name), here)})
            if not here.emulated and torch.cuda.current_device() != 0:
                raise WrongError(f"work on {name} has left cuda:{torch.cuda.current_device()} in use")
            if name == "cuda:1" and (held := torch.cuda.memory_allocated(0)):
                raise WrongError(f"work on cuda:1 has taken {held:,} bytes of cuda:0")
    different = [what for what, found in results[0].items() if not torch.equal(found, results[1][what])]
    if different:
        raise WrongError(f"{names[0]} and {names[1]} have other bits: {', '.join(different)}")
    return {"results": len(results[0]), "bits": "the same"}


def computed_on(device: torch.device, here: Here) -> Iterator[tuple[str, Tensor]]:
    """What a toy's prefills (run, captured, replayed), decode steps in both forms, draws and training steps give."""
    graphs = Again() if here.emulated else None
    for dtype in MMA_DTYPES[:1] if here.emulated else MMA_DTYPES:
        torch.manual_seed(6)
        model = HRM(toy()).requires_grad_(False).to(device)
        runner = CudaRunner(model, dtype, "graph", blocks=2 if here.emulated else 0, graphs=graphs)
        for turn in ("run", "captured", "replayed"):
            handles, logits = runner.open([[5, 6, 7, 8]], [3])
            yield f"{dtype}, a prefill {turn}", torch.from_numpy(logits)
            yield f"{dtype}, a step after a prefill {turn}", torch.from_numpy(runner.step(handles, [9]))
            drawn = runner.draw(handles, [3], [Sampler(Sampling(temperature=1.0, seed=1), [5])], [1])
            yield f"{dtype}, a draw after a prefill {turn}", torch.tensor(drawn)
            runner.close(handles[0])
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(6)
        model = HRM(toy()).to(device)
        optimizer = optim.AdamAtan2(model.parameters(), ema=0.9)
        batch, _ = random_batch([12, 5], toy().vocab_size)
        for _ in range(2):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                model.loss(batch.to(device), horizon=3).backward()
            optimizer.step()
        yield f"two training steps, {dtype}", torch.cat([p.detach().flatten() for p in model.parameters()])


CHECKS = {"second_device": second_device}
