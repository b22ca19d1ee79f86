"""`hrmcore plan`: the command around `hrmcore.planner`, and the measurement of this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from hrmcore.config import BASES, PRESETS, RECOMPUTE, HRMConfig, LoraConfig
from hrmcore.gpus import GPUS, Device
from hrmcore.planner import (
    Budget,
    Horizon,
    Memory,
    Plan,
    Record,
    Stage,
    StagePlan,
    adapter_parameters,
    plan,
)

EXAMPLE = """\
examples:
  hrmcore plan --size XL --tokens 60e9 --gpu H100 --count 16 --utilization 0.38 --price 2
  hrmcore plan checkpoint/ --tokens 1e9 --prompt-tokens 120 --response-tokens 180 --json
  hrmcore plan --size L --stage 20e9:XL --tokens 60e9 --count 8
  hrmcore plan run.toml --measure      with its [[grow]] stages or its [lora], for this machine
  hrmcore plan --size XL --lora 16 --base int8 --tokens 1e6 --batch-tokens 512 --measure
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore plan`."""
    parser.epilog = EXAMPLE
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", nargs="?", help="config.json, checkpoint folder, cached hub id, or a run file (TOML)")
    model.add_argument("--size", choices=PRESETS, help="a published size")
    grow = "after TOKENS the model grows into SIZE, or the model of a config.json or folder; may be repeated"
    parser.add_argument("--stage", action="append", default=[], metavar="TOKENS:SIZE", help=grow)
    run = parser.add_argument_group("the run")
    run.add_argument("--tokens", type=float, metavar="N", help="tokens to train on; needed where no run file is given")
    run.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens of a step on one GPU; memory depends on it (8192)"
    )
    run.add_argument(
        "--recompute", choices=RECOMPUTE, help="what backward computes again; memory depends on it (sublayer)"
    )
    run.add_argument(
        "--prompt-tokens",
        type=float,
        metavar="N",
        help="mean tokens of an instruction; needed to count head and attention",
    )
    run.add_argument(
        "--response-tokens",
        type=float,
        metavar="N",
        help="mean tokens of a response; needed to count head and attention",
    )
    run.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank over frozen weights, on every projection"
    )
    run.add_argument("--base", choices=BASES, help="what the frozen weights are held as (bfloat16); with --lora")
    on = parser.add_argument_group("the hardware")
    where = on.add_mutually_exclusive_group()
    where.add_argument("--gpu", choices=GPUS, help="kind of GPU (H100)")
    where.add_argument("--measure", action="store_true", help="measure this machine and plan for it")
    on.add_argument("--count", type=int, default=1, metavar="N", help="number of GPUs (1)")
    share = "share of the peak that training reaches (0.38, as the published 1B run did)"
    on.add_argument("--utilization", type=float, default=0.38, metavar="U", help=share)
    on.add_argument("--price", type=float, metavar="P", help="dollars a GPU-hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print what the run would cost."""
    stages, settings = _stages(args.size or args.model)
    stages += [_stage(text) for text in args.stage]
    given = {"tokens": args.tokens, "batch_tokens": args.batch_tokens, "recompute": args.recompute}
    settings |= {key: value for key, value in given.items() if value is not None}
    if lora := _lora(args.lora, args.base):
        settings["lora"] = lora
    if "tokens" not in settings:
        raise ValueError("say how many --tokens to train on")
    budget = Budget(
        device=GPUS[args.gpu or "H100"],
        count=args.count,
        utilization=args.utilization,
        price=args.price,
        record=_record(args.prompt_tokens, args.response_tokens),
        **settings,
    )
    if args.measure:
        budget = dataclasses.replace(budget, device=measure(budget.precision))
    planned = plan(stages, budget)
    print(json.dumps(as_dict(planned)) if args.json else table(planned))
    return 0


def _stages(name: str) -> tuple[list[Stage], dict[str, Any]]:
    """A size, a checkpoint or a run file with its [[grow]] tables as stages, and what the file says of the budget."""
    if name in PRESETS:
        return [Stage(0, name, HRMConfig.preset(name))], {}
    if name.endswith(".toml"):
        from hrmcore.growth.stages import growths_of
        from hrmcore.train.run_file import read_config as read_run

        run_file = read_run(name)
        horizon = Horizon(run_file.horizon_first, run_file.horizon_last, run_file.horizon_fraction)
        growths = growths_of(run_file.grow, run_file.model, run_file.seed)
        grown = [
            Stage(table.at_tokens, f"[[grow]] {number}", growth.after)
            for number, (table, growth) in enumerate(zip(run_file.grow, growths, strict=True), 1)
        ]
        return [Stage(0, "[model]", run_file.model), *grown], {
            "tokens": run_file.steps * run_file.accumulate * run_file.batch_tokens,
            "batch_tokens": run_file.batch_tokens,
            "precision": run_file.precision,
            "horizon": horizon,
            "recompute": run_file.recompute,
            "lora": run_file.lora,
        }
    from hrmcore.checkpoint.hrm_text import CONFIG_FILE, read_config, resolve

    path = Path(name)
    return [Stage(0, name, read_config(path.parent if path.name == CONFIG_FILE else resolve(name)))], {}


def _stage(text: str) -> Stage:
    start, _, name = text.partition(":")
    try:
        tokens = float(start)
    except ValueError:
        tokens = math.nan
    if not (name and math.isfinite(tokens)):
        raise ValueError(f"--stage must be TOKENS:SIZE, as in 20e9:XL, got {text!r}")
    return Stage(tokens, name, _stages(name)[0][0].config)


def _lora(rank: int | None, base: str | None) -> LoraConfig | None:
    if rank is None and base is not None:
        raise ValueError("--base goes with --lora: it says what the frozen weights are held as")
    return None if rank is None else LoraConfig(rank=rank, alpha=float(rank), base=base or "bfloat16")


def _record(prompt: float | None, response: float | None) -> Record | None:
    if (prompt is None) != (response is None):
        raise ValueError("--prompt-tokens and --response-tokens go together")
    return None if prompt is None or response is None else Record(prompt, response)


def measure(precision: str, seconds: float = 1.0) -> Device:
    """This machine, or its GPU when torch sees one: the best FLOP/s of a GEMM, and the memory in bytes."""
    import torch

    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if on_gpu else ("cpu", 1024)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    out = torch.empty_like(a)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    if on_gpu:
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        name, memory = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name, 2 * size**3 / best, memory)


def as_dict(planned: Plan) -> dict[str, Any]:
    """The plan as JSON holds it."""
    budget = planned.budget
    return {
        "parameters": planned.stages[-1].parameters,
        "tokens": budget.tokens,
        "flops": planned.flops.total,
        "flops_by_part": dataclasses.asdict(planned.flops) if budget.record else {"stacks": planned.flops.stacks},
        "hours": planned.hours,
        "dollars": planned.dollars,
        "memory_bytes_per_gpu": planned.memory.peak,
        "memory_by_part": _parts(planned.memory),
        "state_bytes_per_gpu": planned.memory.state(),
        "fits": planned.memory.peak <= budget.device.memory,
        "gpu": dataclasses.asdict(budget.device),
        "count": budget.count,
        "utilization": budget.utilization,
        "batch_tokens": budget.batch_tokens,
        "precision": budget.precision,
        "record": None if budget.record is None else dataclasses.asdict(budget.record),
        "horizon": dataclasses.asdict(budget.horizon),
        "recompute": budget.recompute,
        "lora": None if budget.lora is None else dataclasses.asdict(budget.lora),
        "trained_parameters": trained_parameters(planned),
        "stages": [
            {
                "name": stage.name,
                "start": stage.start,
                "tokens": stage.tokens,
                "parameters": stage.parameters,
                "flops": stage.flops.total,
                "hours": budget.hours(stage.flops.total),
            }
            for stage in planned.stages
        ],
        "from_scratch_flops": planned.from_scratch.total,
        "from_scratch_hours": budget.hours(planned.from_scratch.total),
    }


def table(planned: Plan) -> str:
    """The plan as a person reads it."""
    budget, flops, memory = planned.budget, planned.flops, planned.memory
    device = budget.device
    counted = "" if budget.record else "  (without head and attention: --prompt-tokens, --response-tokens add them)"
    trained = f", of adapters {trained_parameters(planned):,}: they alone are trained" if budget.lora else ""
    lines = [
        ("parameters", f"{planned.stages[-1].parameters:,}{trained}"),
        ("tokens", f"{budget.tokens:.3g}"),
        ("FLOPs", f"{flops.total:.3g}, {flops.total / budget.tokens:.3g} a token{counted}"),
    ]
    if budget.record:
        lines += [(f"  {name}", f"{value:.3g}") for name, value in dataclasses.asdict(flops).items()]
    share = f"{budget.utilization:.0%} of {device.peak / 1e12:.3g} TFLOP/s"
    lines.append(("time", f"{_time(planned.hours)} on {budget.count} × {device.name} at {share}"))
    if planned.dollars is not None:
        lines.append(("price", f"${planned.dollars:,.0f} at ${budget.price:g} an hour each"))
    if len(planned.stages) > 1:
        lines += [(f"  {stage.name}", _stage_line(planned, stage)) for stage in planned.stages]
        saved = 1 - flops.total / planned.from_scratch.total
        scratch = f"{planned.from_scratch.total:.3g} FLOPs, {_time(budget.hours(planned.from_scratch.total))}"
        lines.append(("from scratch", f"{scratch}; growing saves {saved:.0%}"))
    verdict = "fits in" if memory.peak <= device.memory else "does not fit in"
    again = "" if budget.recompute == "sublayer" else f", recompute {budget.recompute}"
    step = f"a step of {budget.batch_tokens:,} tokens in {budget.precision}{again}"
    lines.append(("memory each", f"{_bytes(memory.peak)}, {step}; {verdict} {_bytes(device.memory)}; of it at most"))
    lines += [(f"  {name}", _bytes(value)) for name, value in _parts(memory).items() if value]
    lines.append(("a state", f"{_bytes(memory.state())} of main memory each, with an average of the weights"))
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def trained_parameters(planned: Plan) -> int:
    """All parameters of the last stage, or those of its adapters."""
    last, lora = planned.stages[-1], planned.budget.lora
    return last.parameters if lora is None else adapter_parameters(last.config, lora)


def _parts(memory: Memory) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(memory).items() if name != "peak"}


def _stage_line(planned: Plan, stage: StagePlan) -> str:
    hours = _time(planned.budget.hours(stage.flops.total))
    return f"{stage.parameters:,} parameters, {stage.tokens:.3g} tokens, {stage.flops.total:.3g} FLOPs, {hours}"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} minutes" if hours > 1 / 60 else f"{3600 * hours:.3g} seconds"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours:.1f} hours ({hours / 24:.1f} days)"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
