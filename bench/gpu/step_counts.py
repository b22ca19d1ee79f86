"""Instructions of the fused decode step, counted in the compiled code (sass.py); step_model.py makes times of them.

    python -m bench.gpu.step_counts hrmcore/_C_cuda.so > bench/gpu/step_counts.json
    python -m bench.gpu.step_counts --step old OLD.cubin > bench/gpu/step_counts_old.json

A warp's instructions: once round each loop by way of its whole work, and once through each phase. `--step old` reads
the step that was measured on 2026-11-27 (csrc/decode at commit 8d63661, nvcc -O3 -arch=sm_90 -cubin): another code, so
other loops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu.sass import Kernel, Loop, cuobjdump, disassembled
from bench.gpu.step_shapes import COLUMNS, STAGE_ITEMS, Matrix, kernel_name, window
from hrmcore.engine.mma_layout import ITEMS

DTYPES = {"1": "bfloat16", "2": "int8", "3": "int4"}  # enum Packing, in a mangled name
ROWS = 2  # pieces of a single request's row that a lane brings at once
PRODUCTS = {"bfloat16": 1, "int8": 2, "int4": 4}  # of the tensor cores, an item
KERNEL = re.compile(r"decodeILN\w*7PackingE(\d)ELi(\d+)ENS\w*?(Single|Plain)ParamsE*?(?:ELi(\d))?E*vN")
REQUESTS = (1, 8, 16, 32)  # at most, of the kernels with the deepest rings

Counts = dict[str, Any]
Asked = dict[str | int, int]  # work of a way: kinds of instructions, numbers of blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path, help="a library, object or cubin with the decode step's kernels")
    parser.add_argument("--step", choices=("new", "old"), default="new")
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    tool = cuobjdump()
    if tool is None:
        print("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm", file=sys.stderr)
        return 2
    kernels = deepest(disassembled(tool, options.binary, [options.target])[options.target].values())
    print(json.dumps({d: counted(k, d, options.step) for d, k in kernels.items()}, indent=1))
    return 0


def deepest(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    """The decode step's kernels with the deepest rings, those for a card with much shared memory, by kernel_name."""
    found: dict[str, tuple[int, Kernel]] = {}
    for kernel in kernels:
        if match := KERNEL.search(kernel.name):
            if match[3] == "Plain" and not match[4]:
                continue  # of cards with little shared memory
            most = 1 if match[3] == "Single" else COLUMNS * int(match[4])
            kv_dtype = "int8" if "Int8Cache" in match[0] else "bfloat16"
            name, stages = kernel_name(DTYPES[match[1]], most, kv_dtype), int(match[2])
            if name not in found or found[name][0] < stages:
                found[name] = stages, kernel
    kinds = itertools.product(("bfloat16", "int8"), REQUESTS, DTYPES.values())
    names = [kernel_name(dtype, most, kv_dtype) for kv_dtype, most, dtype in kinds]
    return {name: found[name][1] for name in names if name in found}


def counted(kernel: Kernel, name: str, step: str) -> Counts:
    return (old_step if step == "old" else new_step)(kernel, name)


class UnknownCodeError(Exception):
    """The code is not shaped as the counts expect it."""


def phase_loop(kernel: Kernel) -> Loop:
    """The loop over the phases: the largest with a product in it."""
    return max((loop for loop in kernel.loops if kernel.count(loop.blocks, "HMMA")), key=lambda loop: len(loop.blocks))


def outside(kernel: Kernel, loop: Loop) -> Loop:
    around = kernel.around(loop)
    if around is None:
        raise UnknownCodeError(f"no loop around that at block {loop.head} of {kernel.name}")
    return around


def sure(count: int | None, what: str) -> int:
    if count is None:
        raise UnknownCodeError(f"no way through the code with the work of {what}")
    return count


# The step of csrc/decode


def new_step(kernel: Kernel, name: str) -> Counts:
    dtype, *rest = name.split(", ")
    int8_cache = "int8 cache" in rest
    most = int(rest[0].split()[0])
    groups = max(1, most // COLUMNS)
    phases = phase_loop(kernel)
    halves = kernel.innermost("HMMA", "LDSM")[0]  # of a page: keys, and then values; of an int8 cache, the page
    products = [loop for loop in kernel.innermost("HMMA") if loop != halves]
    inside = [loop for loop in products if loop.blocks < phases.blocks]
    after_all = [loop for loop in products if not loop.blocks & phases.blocks]
    streams = most > 1  # beside the products of a first tile, in a loop of its own
    if len(inside) != 1 + streams or len(after_all) != 1 + streams:
        raise UnknownCodeError("other loops of products than expected in the loop over the phases and after it")
    head_dtype = "int8" if dtype == "int4" else dtype
    pages = halves if int8_cache else outside(kernel, halves)
    first = next((loop for loop in inside if kernel.count(loop.blocks, "LDG")), inside[0])
    done: Asked = {first.head: 1, "BAR": 3}
    skipped = sure(kernel.once_round(first, {}), "a stage")
    begun = window(dtype, groups) * groups if streams else 0  # reads
    single = int(most == 1)  # its sums of two rows are exchanged between two lanes
    normed: Asked = {"SHFL": 2 * groups + single, "MUFU.RSQ": 1}
    kinds: dict[str, Asked] = {
        "gqkv": {"STG": 2, "LDG": begun + 2, **normed},
        "o": {"STG": 5, "SHFL": 3 + single, "LDG": begun + 2},
        "gate_up": {"MUFU.EX2": 1, "STG": 1, "LDG": begun + 2 * (not streams), **normed},
        "down": {"STG": 5, "SHFL": 3 + single, "LDG": begun + 2},
    }
    keys: Asked = {"HMMA": 8, "SHFL": 2, "MUFU": 2, "LDGSTS": 4}  # of 128 channels
    values: Asked = {"HMMA": 8, "LDSM": 4, "LDGSTS": 4}
    found: Counts = {
        "code_bytes": kernel.code_bytes,
        "turn_bytes": 16 * kernel.size(phases.blocks),
        "turn": {
            phase: sure(kernel.once_round(phases, {**done, **work}, pages.blocks), phase) - skipped
            for phase, work in kinds.items()
        },
    }
    if int8_cache:
        keys = {"HMMA": 16, "SHFL": 4, "MUFU": 2, "LDSM": 2, "LDGSTS": 5}
        copies = [b for b in pages.blocks if kernel.count([b], "LDGSTS") == 4]  # a page's; or a stage's of bf16
        if len(copies) == 1:
            keys[copies[0]] = 1
        found["page"] = page = sure(kernel.once_round(pages, keys), "a page")
        own: Asked = {**keys, "LDG": 13, "SHFL": 10, "STG": 4}  # with the new token's row
        found["task"] = sure(kernel.once_round(pages, own), "a task") - page
    else:
        found["keys"] = sure(kernel.once_round(halves, keys), "keys")
        found["values"] = sure(kernel.once_round(halves, values), "values")
        page = sure(kernel.once_round(pages, keys), "a page")
        found["page"] = page - found["keys"]
        found["task"] = sure(kernel.once_round(pages, {**keys, "LDG": 9}), "a task") - page
    found["split"] = sure(kernel.once_round(pages, {**keys, "BAR": 1, "STG": 1, "MUFU": 13}), "a split") - page
    attending: Asked = {**keys, pages.head: 1, "BAR": 2}
    without = outside(kernel, _tile(kernel, inside)).blocks
    found["turn"]["attention"] = sure(kernel.once_round(phases, attending, without), "attention") - page
    for which, loops, of in (("", inside, dtype), ("head_", after_all, head_dtype)):
        tile = _tile(kernel, loops)
        found |= {which + what: figures for what, figures in _products(kernel, loops, tile, of, groups).items()}
    found |= _bringing(kernel, phases, frozenset().union(*(loop.blocks for loop in inside), pages.blocks), groups)
    after = without.union(*(loop.blocks for loop in kernel.loops if kernel.count(loop.blocks, "HMMA")))
    starts = [loop for loop in kernel.innermost("LDGSTS", "LDGDEPBAR") if not loop.blocks & after]
    copies = stage_work(dtype, STAGE_ITEMS[dtype])["LDGSTS"]
    found["fill"] = min(sure(kernel.once_round(loop, {"LDGSTS": copies}), "a ring's start") for loop in starts)
    return found


def _tile(kernel: Kernel, loops: list[Loop]) -> Loop:
    """The loop over tiles, around those of their stages; where splits are joined in parts another loop lies between."""
    return max((outside(kernel, loop) for loop in loops), key=lambda loop: len(loop.blocks))


def _products(kernel: Kernel, loops: list[Loop], tile: Loop, dtype: str, groups: int) -> Counts:
    """Stages whose activations lie in shared memory, by the number of their items; a tile; tiles between two barriers.
    And whole stages beside which activations stream by."""
    kept = next(x for x in loops if not kernel.count(x.blocks, "LDG"))
    others = frozenset[int]().union(*(loop.blocks for loop in loops if loop != kept))
    stages = [stage_work(dtype, items, groups) for items in range(1, STAGE_ITEMS[dtype] + 1)]
    found: Counts = {"stage": [sure(kernel.once_round(kept, work), "a stage") for work in stages]}
    for streamed in loops:
        if kernel.count(streamed.blocks, "LDG"):
            unrolled = max(1, 16 * window(dtype, groups) // (STAGE_ITEMS[dtype] * ITEMS[dtype]))
            whole = {kind: unrolled * n for kind, n in stages[-1].items()}
            work: Asked = {**whole, "LDG": whole["HMMA"]}
            found["streamed"] = sure(kernel.once_round(streamed, work), "a stage beside a stream") / unrolled
    group = outside(kernel, tile)
    one, put = found["stage"][0], {"STS": 2 * groups}
    round_tile = sure(kernel.once_round(tile, {**stages[0], **put}, others), "a tile")
    round_group = sure(kernel.once_round(group, {**stages[0], **put, "BAR": 2, "STG": 2}, others), "tiles together")
    return found | {"tile": round_tile - one, "group": round_group - round_tile}


def stage_work(dtype: str, items: int, groups: int = 1) -> Asked:
    """Of a stage that reads so many items, multiplies them with so many groups of 8 requests and loads as many."""
    pieces = items * Matrix(16, 1, dtype).item_bytes // 16
    return {"HMMA": items * PRODUCTS[dtype] * groups, "LDGSTS": -(-pieces // 32), "LDS.128": items}


def _bringing(kernel: Kernel, phases: Loop, others: frozenset[int], groups: int) -> Counts:
    """Loops that bring activations; a turn of each."""
    found: Counts = {}
    for loop in kernel.loops:
        if not loop.blocks < phases.blocks or loop.blocks & others:
            continue
        has = {kind: kernel.count(loop.blocks, kind) for kind in ("LDG", "STS", "STG", "MUFU.EX2")}
        whole: Asked = {kind: n for kind, n in has.items() if n}
        rows = kernel.count(loop.blocks, "LDG.E.128")
        if has["MUFU.EX2"] and has["STS"]:
            found["join_half"] = sure(kernel.once_round(loop, {"LDG": 5, "MUFU.EX2": 4, "STS": 1}), "four splits")
            found["join"] = sure(kernel.once_round(loop, whole), "all splits")
        elif has["STG"]:
            entered = sure(kernel.once_round(loop, whole), "entering a visit")
            found["write_entered"] = min(
                entered, found.get("write_entered", entered)
            )  # the loop over 8 requests holds it
        elif rows == kernel.count(loop.blocks, "STS.128") == ROWS:  # the loop over the squares may lie inside
            work = ({"LDG.E.128": n, "STS.128": n} for n in range(1, rows + 1))
            found["rows"] = [sure(kernel.once_round(loop, of_rows), "rows") for of_rows in work]
        elif has["LDG"] in (4, 4 * groups) and not has["STS"]:  # of 8 requests where a visit is entered
            kinds = ["squares"] * (has["LDG"] == 4 * groups) + ["enter_squares"] * (has["LDG"] == 4)
            found |= dict.fromkeys(kinds, sure(kernel.once_round(loop, whole), "squares"))
        elif has["LDG"] > 4 and has["STS"] and "enter" not in found:
            found["enter"] = sure(kernel.once_round(loop, whole), "entering a visit")
    return found


# The step before: commit 8d63661


def old_step(kernel: Kernel, dtype: str) -> Counts:
    products = kernel.innermost("HMMA")
    tiles = [outside(kernel, loop) for loop in products]
    pages = kernel.innermost("LDG", "SHFL", "MUFU.EX2")[0]
    tasks = outside(kernel, pages)
    found: Counts = {
        "page": sure(kernel.once_round(pages, {"LDG": 8, "MUFU": 5}), "a page"),
        "task": sure(kernel.once_round(tasks, {"LDG": 10, "BAR": 3, "STG": 1, "MUFU": 9}), "a task"),
        "phases": {},
    }
    found["task"] -= found["page"]
    for loop, tile, phase in zip(products, tiles, _old_phases(kernel, tiles), strict=True):
        per_item = PRODUCTS["int8" if phase == "head" and dtype == "int4" else dtype]
        unrolled = kernel.count(loop.blocks, "HMMA") // per_item
        whole = sure(kernel.once_round(loop, {"HMMA": unrolled * per_item, "LDGSTS": unrolled}), "items")
        one = sure(kernel.once_round(loop, {"HMMA": per_item, "LDGSTS": 1}), "an item")
        round_tile = sure(kernel.once_round(tile, {"HMMA": per_item, "BAR": 1, "STG": 1, "LDGSTS": 1}), "a tile")
        without = tasks.blocks.union(*(other.blocks for other in tiles if other is not tile))
        work: Asked = {"HMMA": per_item, "LDGSTS": 16, "BAR": 2, "STG": 1, "LDG": 3}
        through = sure(kernel.through(work, without), phase)
        found["phases"][phase] = {"fixed": through - one, "item": whole / unrolled, "tile": round_tile - one}
    loads = {loop.head: loop for loop in kernel.innermost("LDG", "STS")}
    joins = next(x for x in loads.values() if kernel.count(x.blocks, "MUFU.EX2") and not kernel.count(x.blocks, "HMMA"))
    found["join_one"] = sure(kernel.once_round(outside(kernel, joins), {"LDG": 1, "STS": 1}), "one split")
    found["join"] = sure(kernel.once_round(joins, {"LDG": 8, "STS": 1, "MUFU": 9}), "all splits")
    others = [x for x in loads.values() if not kernel.count(x.blocks, "HMMA") and not kernel.count(x.blocks, "BAR")]
    entering = next(x for x in others if kernel.count(x.blocks, "STG"))
    found["enter"] = sure(kernel.once_round(outside(kernel, entering), {"LDG": 1, "STS": 1, "SHFL": 5}), "entering")
    normed = [
        outside(kernel, x)
        for x in loads.values()
        if kernel.count(x.blocks, "LDG") == 2 and kernel.count(x.blocks, "STS") == 2
    ]
    found["normed_row"] = max(
        sure(kernel.once_round(x, {"LDG": 1, "STS": 2, "SHFL": 5}), "a row")
        for x in normed
        if kernel.count(x.blocks, "SHFL")
    )
    found["row"] = max(
        sure(kernel.once_round(x, {"LDG": 1, "STS": 1}), "a row") for x in normed if not kernel.count(x.blocks, "SHFL")
    )
    return found


def _old_phases(kernel: Kernel, tiles: list[Loop]) -> list[str]:
    """Each loop of tiles by what it writes: o and down write the same, and o comes last in the code."""
    names = []
    for tile in tiles:
        stores, inside = kernel.count(tile.blocks, "STG"), kernel.around(tile) is not None
        gated = kernel.count(tile.blocks, "MUFU.EX2") > 0
        names.append("head" if not inside else "gate_up" if gated else "gqkv" if stores > 4 else "down")
    if names.count("down") != 2:
        raise UnknownCodeError(f"phases {names}")
    names[len(names) - 1 - names[::-1].index("down")] = "o"
    return names


if __name__ == "__main__":
    sys.exit(main())
