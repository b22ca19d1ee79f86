"""The checks of bench/gpu/checklist.py that ask for prefills: in buckets, and from packed weights."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from typing import Any

import torch

from bench.gpu.checks import Here, WrongError
from bench.gpu.models import toy
from bench.gpu.speed import as_quantised
from bench.gpu.train import Again
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.mma_layout import in_fragments, quantised
from hrmcore.engine.packed_model import PackedMatrix
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

ALLOWED = 2e-2  # of the logits' norm, in bfloat16


def captured_prefill(here: Here) -> dict[str, Any]:
    """Prompts run, captured and replayed beside the prefill as it is; on a GPU the milliseconds of a first token."""
    torch.manual_seed(6)
    config, lengths = (toy(), (5, 40)) if here.emulated else (HRMConfig.preset("XL"), (256, 1024))
    model = HRM(config).requires_grad_(False).to(here.device)
    graphs = Again() if here.emulated else None
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


def packed_prefill(here: Here) -> dict[str, Any]:
    """Prefills from int8 and int4 weights beside the model that has those numbers; on a GPU, milliseconds and bytes."""
    config, lengths = (toy(), (5, 40)) if here.emulated else (HRMConfig.preset("XL"), (256, 1024))
    figures: dict[str, Any] = {}
    for dtype in ("int8", "int4"):
        figures[dtype] = {"bits": _the_same_bits(here, dtype)}
        torch.manual_seed(6)
        model = HRM(config).requires_grad_(False).to(here.device).bfloat16()
        plain = TorchRunner(as_quantised(copy.deepcopy(model).float(), dtype))
        ours = CudaRunner(model, dtype, blocks=2 if here.emulated else 0, graphs=Again() if here.emulated else None)
        del model
        for length in lengths:
            prompt = [[(7 * j) % config.vocab_size for j in range(length)]]
            found = [_opened(here, runner, prompt)[0] for runner in (ours, plain)]
            error = float((found[0] - found[1]).norm() / found[1].norm())
            if not error <= ALLOWED:
                raise WrongError(f"{dtype}, {length} tokens: logits differ by {error:.3g}, allowed are {ALLOWED:g}")
            figures[dtype][str(length)] = {"error": error}
            if not here.emulated:
                taken = [_opened(here, ours, prompt)[1] for _ in range(10)]
                figures[dtype][str(length)]["ms"] = round(1000 * statistics.median(taken), 2)
        if not here.emulated:
            del plain
            torch.cuda.empty_cache()
            figures[dtype]["gigabytes"] = torch.cuda.memory_allocated() / 1e9
    return figures


def _the_same_bits(here: Here, dtype: str) -> str:
    """A product in blocks of every shape, and of one row alone; and its distance from float64."""
    rows, columns, tokens = 250, 80, 250
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator).bfloat16().to(here.device)
    matrix = PackedMatrix(in_fragments(weight, dtype).flatten().to(here.device), rows, 0, dtype)
    with here.kernels():
        found = [matrix.multiply(x, dtype=torch.float32, processors=n).cpu() for n in (1, 4, 8, 1000)]
        alone = matrix.multiply(x[7:8], dtype=torch.float32).cpu()
    if not all(torch.equal(found[0], other) for other in found[1:]) or not torch.equal(found[0][7:8], alone):
        raise WrongError(f"{dtype}: the bits of a product depend on its blocks or its other rows")
    whole, scales = quantised(torch.nn.functional.pad(weight, (0, -columns % 64)), dtype)
    dense = (whole.view(rows, -1, 32) * scales.float()[..., None]).view(rows, -1)[:, :columns].bfloat16().double()
    exact = x.cpu().double() @ dense.T
    # a float32 sum of 80 terms, each addition cut off rather than rounded
    allowed = columns * 2.0**-23 * (x.cpu().double().abs() @ dense.abs().T)
    if bool(((found[0].double() - exact).abs() > allowed).any()):
        raise WrongError(f"{dtype}: a product is farther from float64 than {columns} roundings")
    return "the same"


CHECKS = {"captured_prefill": captured_prefill, "packed_prefill": packed_prefill}
