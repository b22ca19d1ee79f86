"""The fused decode step on a GPU: whether it is right, how fast it is, and beside that what step_model.py predicted.

    bench/gpu/speed.sh --out speed.json           # on a machine with a GPU; at most six minutes
    python -m bench.gpu.speed --emulated          # its own logic, with toy sizes in the emulator; nothing is timed

Logits beside the model in torch, in float32, for each dtype of the weights; both forms must give the same bits. Then
milliseconds of a token for dtypes, requests and lengths of the cache, between CUDA events, and microseconds of each
phase in the graph form, from the timestamps of the profiler (no event fits between the launches of one call). The
share is that of a copy's bandwidth, measured in the same run. What does not fit in the time is left out by name.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import step_model
from bench.gpu.checks import Here, seconds_of
from bench.gpu.models import toy
from bench.gpu.report import figure, finish, table
from bench.gpu.step_model import PHASES, Constants
from bench.gpu.step_shapes import Case
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_cache import Int8Page, from_int8, store_int8
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.mma_layout import GROUP, MMA_DTYPES, quantised
from hrmcore.engine.runner import PAGE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

LIMIT = 300.0  # seconds, of the six minutes that speed.sh gives
ALLOWED = 2e-2  # of the logits' norm
COPY_BYTES = 4 << 30
PROMPTS = (63, 200, 1)  # tokens; the first request's page is full
REPEATS, REPLAYS = 20, 10
MOST_CACHED = 16_000  # tokens of all requests: the caches of both forms take 25 GB at the 1B shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked here: a GPU gets the 1B shape, the emulator a toy."""

    here: Here
    config: HRMConfig
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    blocks: int  # of the grid; 0 is the device's own

    def cases(self) -> list[Case]:
        grid = self.blocks or torch.cuda.get_device_properties(0).multi_processor_count
        shapes = [(b, n) for b in self.batches for n in self.lengths if b * n <= MOST_CACHED]
        kinds = [(d, "bfloat16") for d in MMA_DTYPES] + [("bfloat16", "int8")]  # of the weights, of the cache
        return [Case(self.config, d, b, n, grid, kv) for d, kv in kinds for b, n in shapes]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="toy sizes in the emulator: shows that this works")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    options = parser.parse_args(argv)
    if not options.emulated and not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device; --emulated tries this without one", file=sys.stderr)
        return 2
    here = Here(options.emulated, Path())
    plan = (
        Plan(here, toy(), (1, 2), (70,), 2)
        if here.emulated
        else Plan(here, HRMConfig.preset("XL"), (1, 8, 32), (200, 1500), 0)
    )
    report = run(plan, time.monotonic() + LIMIT)
    return finish(report, options.out, show)


def run(plan: Plan, deadline: float) -> dict[str, Any]:
    constants = Constants()
    bandwidth = None if plan.here.emulated else copy_bandwidth()
    if bandwidth is not None:
        constants = dataclasses.replace(constants, bandwidth=bandwidth)
    model = random_model(plan)
    errors = {dtype: error_of(plan, model, dtype) for dtype in MMA_DTYPES}
    errors["bfloat16, int8 cache"] = error_of(plan, model, "bfloat16", "int8")
    counts = step_model.load_counts("new")
    cases, left_out = [], []
    for case in plan.cases():
        if time.monotonic() > deadline:
            left_out.append(step_model.name_of((case.dtype, case.batch, case.cached), case.kv_dtype))
            continue
        cases.append(step_model.predict(case, counts, constants) | {"measured": measured(plan, model, case)})
    return {
        "device": "emulated" if plan.here.emulated else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "copy_tb_s": bandwidth,
        "errors": errors,
        "right": all(error <= ALLOWED for error in errors.values()) and all(c["measured"]["same_bits"] for c in cases),
        "cases": cases,
        "left_out": left_out,
    }


def copy_bandwidth() -> float:
    """TB/s of a copy in device memory, read and written together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(partial(target.copy_, source)) / 1e12


# Right


def random_model(plan: Plan) -> HRM:
    """Weights that are numbers of bfloat16, held in float32."""
    torch.manual_seed(0)
    model = HRM(plan.config).requires_grad_(False).eval().to(plan.here.device)
    for tensor in (*model.parameters(), model.z_L_init):
        tensor.copy_(tensor.bfloat16())
    return model


def error_of(plan: Plan, model: HRM, dtype: str, kv_dtype: str = "bfloat16") -> float:
    """The step's logits after prompts, beside the model in torch with the same rounded weights; in norm.

    Over an int8 cache the model reads what was rounded, in float32; its new token's row alone is exact.
    """
    exact = as_quantised(model, dtype) if dtype != "bfloat16" else model
    device = plan.here.device
    torch.manual_seed(1)
    prompts = [torch.randint(0, plan.config.vocab_size, (n,)).tolist() for n in PROMPTS]
    runner = TorchRunner(exact)
    handles, _ = runner.open(prompts, [n // 2 for n in PROMPTS])
    runner.reserve(handles, 1)
    tables = runner.page_tables(handles)
    kv = in_int8(runner.kv) if kv_dtype == "int8" else runner.kv.bfloat16()
    tokens = list(range(3, 3 + len(PROMPTS)))
    step = packed(model, "persistent", plan.blocks, dtype, kv_dtype)
    ids, positions = (torch.tensor(x, dtype=torch.int32, device=device) for x in (tokens, PROMPTS))
    with plan.here.kernels():
        ours = step(ids, positions, tables, kv).cpu()
    theirs = torch.from_numpy(runner.step(handles, tokens))
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()  # as the runner that has made it
def in_int8(kv: Tensor) -> Tensor:
    """A cache (slots, 2, rows, H, d) in int8. The numbers of the first are rounded alike, in place."""
    slots, _, rows, heads, head_dim = kv.shape
    pages = torch.zeros(slots, rows // PAGE, heads, Int8Page(head_dim).bytes, dtype=torch.uint8, device=kv.device)
    every = torch.arange(rows, device=kv.device)
    for exact, rounded in zip(kv, pages, strict=True):
        store_int8(rounded, every, exact[0], exact[1])
        exact.copy_(torch.stack(from_int8(rounded, every, head_dim)))
    return pages


def as_quantised(model: HRM, dtype: str) -> HRM:
    """A copy whose matrices are what int8 or int4 makes of them; the head of int4 is int8."""
    rounded = copy.deepcopy(model)
    for name, tensor in rounded.named_parameters():
        if "embed" in name:
            continue
        padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % GROUP))
        whole, scales = quantised(padded, "int8" if name == "lm_head.weight" else dtype)
        dense = (whole.view(len(whole), -1, GROUP) * scales.float()[..., None]).view_as(padded)
        tensor.copy_(dense[:, : tensor.shape[1]])
    return rounded


# How fast


def measured(plan: Plan, model: HRM, case: Case) -> dict[str, Any]:
    """Milliseconds of a token in both forms and microseconds of the phases; on the emulator only whether bits agree."""
    forms: tuple[Form, Form] = ("persistent", "graph")
    calls = [step_of(plan, model, case, form) for form in forms]
    with plan.here.kernels():
        logits = [call() for call in calls]
    found: dict[str, Any] = {"same_bits": torch.equal(*logits), "ms": None, "graph_ms": None, "phases": None}
    if plan.here.emulated:
        return found
    found["ms"], found["graph_ms"] = (1e3 * seconds_of(call, REPEATS) for call in calls)
    spans = [span for _ in range(REPLAYS) for span in profiled(calls[1])]
    found["phases"] = phase_times(spans, list(step_model.order(case)))
    return found


@functools.cache
def packed(model: HRM, form: Form, blocks: int, dtype: str, kv_dtype: str = "bfloat16") -> CudaStep:
    """Packing the weights takes longer than all that is timed."""
    return CudaStep(model, form, blocks, dtype, kv_dtype)


def step_of(plan: Plan, model: HRM, case: Case, form: Form) -> Callable[[], Tensor]:
    """A call of the step whose requests have so many tokens in a cache of random numbers."""
    device, config = plan.here.device, case.config
    generator = torch.Generator(device).manual_seed(7)
    shape = (config.cache_slots, 2, PAGE * case.batch * case.pages, config.num_attention_heads, config.head_dim)
    kv = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    if case.int8_cache:
        kv = in_int8(kv)
    tables = torch.arange(case.batch * case.pages, dtype=torch.int32, device=device).view(case.batch, -1)
    positions = torch.full((case.batch,), case.cached, dtype=torch.int32, device=device)
    tokens = torch.arange(1, 1 + case.batch, dtype=torch.int32, device=device)
    return partial(packed(model, form, plan.blocks, case.dtype, case.kv_dtype), tokens, positions, tables, kv)


Span = tuple[float, float]  # of a kernel: its begin and end, microseconds


def profiled(call: Callable[[], object]) -> list[Span]:
    """The decode step's kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = (event for event in profile.events() or () if "decode<" in event.name)
    return sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)


def phase_times(spans: list[Span], order: list[str]) -> dict[str, float] | str:
    """The median microseconds of each phase: from one launch's begin to the next one's, the last one's to its end.

    Where the profiler has not seen every launch, a line that says so.
    """
    if not spans or len(spans) % len(order):
        return f"the profiler saw {len(spans)} launches where a token has {len(order)}"
    times: dict[str, list[float]] = {phase: [] for phase in order}
    for i, (begin, end) in enumerate(spans):
        phase = order[i % len(order)]
        last = (i + 1) % len(order) == 0
        times[phase].append((end if last else spans[i + 1][0]) - begin)
    return {phase: statistics.median(found) for phase, found in times.items()}


# What is printed


def show(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}, copy {figure(report['copy_tb_s'])} TB/s")
    print("error of the logits: " + ", ".join(f"{dtype} {error:.1e}" for dtype, error in report["errors"].items()))
    rows, phase_rows = [], []
    for case in report["cases"]:
        key, found = (case["dtype"], case["batch"], case["cached"]), case["measured"]
        name = step_model.name_of(key, case["kv_dtype"])
        share = found["ms"] and case["limit_ms"] / found["ms"]
        rows.append(
            [
                name,
                *(f"{figure(found[key])} / {case[key]:.2f}" for key in ("ms", "graph_ms")),
                f"{figure(share)} / {case['share']:.2f}",
                "yes" if found["same_bits"] else "NO",
            ]
        )
        phases = found["phases"] if isinstance(found["phases"], dict) else {}
        predicted = {phase: times["graph_us"] for phase, times in case["phases"].items()}
        phase_rows.append([name, *(f"{figure(phases.get(p))} / {figure(predicted.get(p))}" for p in PHASES)])
    print("\nmilliseconds of a token and share of the copy's bandwidth, measured / predicted\n")
    print(table(["", "persistent", "graph", "share", "same bits"], rows))
    print("\nmicroseconds of a phase in the graph form, measured / predicted\n")
    print(table(["", *PHASES], phase_rows))
    for case in report["cases"]:
        if isinstance(case["measured"]["phases"], str):
            print(case["measured"]["phases"])


if __name__ == "__main__":
    sys.exit(main())
