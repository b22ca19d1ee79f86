"""The check of bench/gpu/checklist.py that asks for prefills in buckets, captured as CUDA graphs."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch

from bench.gpu.checks import Here, WrongError
from bench.gpu.models import toy
from bench.gpu.train import Again
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.graphs import CudaGraphs
from hrmcore.model import HRM

ALLOWED = 2e-2  # of the logits' norm, in bfloat16


def captured_prefill(here: Here) -> dict[str, Any]:
    """Prompts run, captured and replayed beside the prefill as it is; on a GPU the milliseconds of a first token."""
    torch.manual_seed(6)
    config, lengths = (toy(), (5, 40)) if here.emulated else (HRMConfig.preset("XL"), (256, 1024))
    model = HRM(config).requires_grad_(False).to(here.device)
    graphs = Again() if here.emulated else CudaGraphs()
    ours = CudaRunner(model, blocks=2 if here.emulated else 0, graphs=graphs)
    plain = TorchRunner(model)  # the same weights: CudaRunner has made them bfloat16
    figures: dict[str, Any] = {}
    for length in lengths:
        prompts = [[(7 * i + j) % config.vocab_size for j in range(length - i)] for i in range(2)]
        worst = 0.0
        for prompt in ([prompts[0]], [prompts[0]], [prompts[0]], prompts, prompts):
            found = [_opened(here, runner, prompt)[0] for runner in (ours, plain)]
            worst = max(worst, float((found[0] - found[1]).norm() / found[1].norm()))
        if not worst <= ALLOWED:
            raise WrongError(f"{length} tokens: logits differ by {worst:.3g} in norm, allowed are {ALLOWED:g}")
        figures[str(length)] = {"error": worst}
        if not here.emulated:
            for name, runner in (("captured", ours), ("as_it_is", plain)):
                taken = [_opened(here, runner, prompts[:1])[1] for _ in range(10)]
                figures[str(length)][f"{name}_ms"] = round(1000 * statistics.median(taken), 2)
    return figures


def _opened(here: Here, runner: TorchRunner, prompts: list[list[int]]) -> tuple[torch.Tensor, float]:
    """The logits after prompts, and the seconds until they were on the host."""
    begun = time.perf_counter()
    with here.kernels() if here.emulated else contextlib.nullcontext():
        handles, rows = runner.open(prompts, [len(prompt) for prompt in prompts])
    seconds = time.perf_counter() - begun
    for handle in handles:
        runner.close(handle)
    return torch.from_numpy(rows), seconds


CHECKS = {"captured_prefill": captured_prefill}
