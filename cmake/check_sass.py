"""Count the decode step's code in what nvcc made of it, beside the budgets of docs/design/cuda_speed.md.

usage: check_sass.py OBJECT TABLE COUNTS [--update]   OBJECT: decode_step.cu's; TABLE, COUNTS: the committed figures

Fails when the figures are not the committed ones; a budget that is missed is marked and is no failure. As with
check_ptxas.py, figures of another compiler are not compared. Skipped, with a line that says so, where there is no
cuobjdump. COUNTS is what bench/gpu/step_model.py predicts times from.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from committed import compare

from bench.gpu.sass import Kernel, cuobjdump, disassembled
from bench.gpu.step_counts import Counts, deepest, new_step, phase_loop
from bench.gpu.step_model import xl
from bench.gpu.step_shapes import PRODUCT_PHASES, kernel_name

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
MODELLED = "sm_90"
CODE_BUDGET, TURN_BUDGET = 32, 24  # KB
ITEM_BUDGETS = {kernel_name(dtype, most): n for dtype, n in (("bfloat16", 12), ("int4", 100)) for most in (1, 8)}
WORK_BUDGET = 0.9  # of the blocks

Row = tuple[str, list[float], float | None]  # what, a figure a target, the most that it may be


def main() -> None:
    binary, path, counts_path = (Path(argument) for argument in sys.argv[1:4])
    tool = cuobjdump()
    if tool is None:
        print("code is not counted: no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
        return
    code = disassembled(tool, binary, TARGETS)
    kernels = {target: deepest(code[target].values()) for target in TARGETS}
    counts = {target: {d: new_step(k, d) for d, k in kernels[target].items()} for target in TARGETS}
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    compiler = "nvcc " + re.findall(r"V([\d.]+)", version)[0]
    found = {path: table(kernels, counts, compiler), counts_path: json.dumps(counts[MODELLED], indent=1) + "\n"}
    compare(found, "make cuda-table")


def table(kernels: dict[str, dict[str, Kernel]], counts: dict[str, dict[str, Counts]], compiler: str) -> str:
    rows = rows_of(kernels, counts)
    width = max(len(what) for what, _, _ in rows)
    lines = [
        f"the decode step's code; {compiler}",
        " " * width + "".join(f"{target:>8}" for target in kernels) + "  budget",
        *(line(row, width) for row in rows),
        "",
        "blocks with work, of 132 at the 1B shape, 1 request; the budget is 90%",
        *blocks_with_work(),
    ]
    return "\n".join(text.rstrip() for text in lines) + "\n"


def rows_of(kernels: dict[str, dict[str, Kernel]], counts: dict[str, dict[str, Counts]]) -> list[Row]:
    def each(name: str, of: Callable[[Kernel, Counts], float]) -> list[float]:
        return [of(kernels[target][name], counts[target][name]) for target in kernels]

    rows: list[Row] = []
    for name in next(iter(kernels.values())):
        item = "512 bytes" if name.startswith("bfloat16") else "an item"
        rows += [
            (
                f"{name}: instructions for {item}",
                each(name, lambda _, c: c["stage"][-1] / len(c["stage"])),
                ITEM_BUDGETS.get(name),
            ),
            (f"{name}: KB of code", each(name, lambda k, _: k.code_bytes / 1024), CODE_BUDGET),
            (f"{name}: KB of the loop over phases", each(name, lambda _, c: c["turn_bytes"] / 1024), TURN_BUDGET),
            (f"{name}: calls in it", each(name, lambda k, _: k.calls(phase_loop(k).blocks)), 0),
            (f"{name}: divisions of integers in it", each(name, lambda k, _: k.divisions(phase_loop(k).blocks)), 0),
        ]
    return rows


def line(row: Row, width: int) -> str:
    what, figures, budget = row
    whole = all(float(figure).is_integer() for figure in figures)
    text = f"{what:<{width}}" + "".join(f"{figure:>8.0f}" if whole else f"{figure:>8.1f}" for figure in figures)
    if budget is None:
        return text
    return f"{text}  {budget:>4}" + ("  missed" if max(figures) > budget else "")


def blocks_with_work() -> list[str]:
    lines = []
    for phase in PRODUCT_PHASES:
        case = xl("bfloat16", 1, 200)
        share = case.blocks_with_work(phase) / case.blocks
        lines.append(
            f"{phase:<10}{case.blocks_with_work(phase):>4}{share:>6.0%}" + ("" if share >= WORK_BUDGET else "  missed")
        )
    attention = ", ".join(
        f"{xl('bfloat16', batch, cached).blocks_with_work('attention')} ({batch} of {cached:,} tokens)"
        for batch, cached in ((1, 200), (1, 1500), (8, 200), (8, 1500))
    )
    return [*lines, f"attention: {attention}; no budget: a split is a whole page of a head"]


if __name__ == "__main__":
    main()
