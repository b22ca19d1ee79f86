"""How long each phase of the fused decode step takes, predicted without a GPU.

    python -m bench.gpu.step_model             the table measured on an H200 beside the model, and the next one
    python -m bench.gpu.step_model --json      the prediction
    python -m bench.gpu.step_model --fit       the constants anew, from that table

A phase takes max(memory, chain). Memory is its bytes over the bandwidth of a copy. The chain is what a warp of the
busiest block does one after the other: its instructions, counted in the compiled code (step_counts.py), and what it
waits for, by count (step_shapes.py): reads of what other blocks have written, weights on their way from shared memory
through the tensor cores, pages of keys, barriers. Reads take as long as the second-level cache needs for what all
blocks ask it for, if that is longer; activations that stream by come while a block multiplies its first tile. In the
persistent form weights run ahead of the chain as far as the rings reach, over the ends of phases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.card import H200
from bench.gpu.report import table
from bench.gpu.step_shapes import MOST_SPLITS, STAGE_ITEMS, Case, Matrix, SpreadCase, window
from hrmcore.config import HRMConfig

PHASES = ("gqkv", "attention", "o", "gate_up", "down", "first gqkv", "head")
HERE = Path(__file__).parent
Counts = dict[str, Any]

# Microseconds of a phase, median, graph form, on one H200 on 2026-11-27: (dtype, requests, tokens in the cache).
MEASURED: dict[tuple[str, int, int], tuple[float, ...]] = {
    ("bfloat16", 1, 200): (9.0, 12.0, 4.9, 9.4, 7.4, 9.8, 51),
    ("int4", 1, 200): (6.9, 12.0, 4.2, 7.7, 5.9, 7.6, 42),
    ("bfloat16", 8, 200): (11.7, 32.9, 8.0, 12.8, 11.9, 18.5, 56),
    ("int4", 8, 200): (9.5, 32.7, 6.7, 10.3, 10.2, 16.4, 44),
    ("bfloat16", 1, 1500): (9.0, 17.3, 6.4, 10.2, 8.0, 9.8, 53),
}
# Milliseconds of a token, persistent form, the same day. Nothing is fitted to these.
MEASURED_TOKEN: dict[tuple[str, int, int], float] = {
    ("bfloat16", 1, 200): 5.05,
    ("int8", 1, 200): 4.99,
    ("int4", 1, 200): 4.32,
    ("bfloat16", 8, 200): 9.39,
    ("int8", 8, 200): 9.27,
    ("int4", 8, 200): 8.66,
    ("bfloat16", 1, 1500): 5.78,
    ("int4", 1, 1500): 5.09,
}
# The same with the attention spread over the grid (SpreadCase), tried on that day.
MEASURED_SPREAD: dict[tuple[str, int, int], float] = {
    ("bfloat16", 1, 200): 4.30,
    ("int4", 1, 200): 3.64,
    ("bfloat16", 8, 200): 8.10,
    ("int4", 8, 200): 7.34,
    ("bfloat16", 1, 1500): 5.87,
}
PREDICTED = [
    (dtype, batch, cached)
    for dtype in ("bfloat16", "int8", "int4")
    for batch in (1, 8, 16, 32)
    for cached in (200, 1500)
]
PREDICTED_INT8 = [  # over an int8 cache
    (dtype, batch, cached) for dtype in ("bfloat16", "int8", "int4") for batch in (1, 8, 32) for cached in (200, 1500)
]


@dataclass(frozen=True)
class Constants:
    """Of an H200. The last five are fitted to MEASURED, all cells together."""

    clock: float = 1980.0  # MHz, the data sheet's boost clock
    bandwidth: float = H200.copy / 1e12  # TB/s, measured: a copy
    grid_barrier: float = 0.94  # us, measured under no load
    memory_latency: float = 0.9  # us, assumed
    cache_bandwidth: float = H200.second_level / 1e12  # TB/s, of the second-level cache, assumed
    second_product: float = 33.0  # cycles until a product may add to the one before, assumed
    launch: float = 1e6 * H200.launch  # us, of the graph
    cycles: float = 2.5  # of an instruction, of a warp among 8
    wait: float = 137.0  # cycles: weights landed, read from shared memory, multiplied
    read: float = 0.28  # us, of what another block has written
    page: float = 1.31  # us, of keys and values from memory, where no ring brings them


FITTED = ("launch", "cycles", "wait", "read", "page")


@dataclass(frozen=True)
class Work:
    """A phase of the busiest block: what comes before its first weights, its stages, what comes after the last."""

    instructions: float = 0  # before and after the stages
    stages: int = 0
    stage_instructions: float = 0
    stage_waits: float = 0  # of a stage, in units of Constants.wait
    stage_cycles: float = 0  # of a stage, beside these
    reads: int = 0
    pages: int = 0
    asked: float = 0  # bytes of activations that all blocks ask the second-level cache for, before the first product
    # Stages beside which activations come: how many, an instruction count of each, their bytes, reads in a row.
    streamed: int = 0
    streamed_instructions: float = 0
    streamed_asked: float = 0
    streamed_reads: float = 0
    bytes: int = 0  # of all blocks, from memory
    own_ring: bool = False  # nothing is on its way before the phase begins, save during the barrier

    def before(self, c: Constants) -> float:
        cached = max(c.read * self.reads, self.asked / c.cache_bandwidth / 1e6)
        return c.cycles * self.instructions / c.clock + cached + c.page * self.pages

    def stage(self, c: Constants, number: int = -1) -> float:
        """A stage: by its number, as the first of them are those beside which activations come."""
        if 0 <= number < self.streamed:
            cycles = c.cycles * self.streamed_instructions + c.wait * self.stage_waits + self.stage_cycles
            coming = max(c.read * self.streamed_reads, self.streamed_asked / c.cache_bandwidth / 1e6) / self.streamed
            return max(cycles / c.clock, coming)
        cycles = c.cycles * self.stage_instructions + c.wait * self.stage_waits + self.stage_cycles
        return cycles / c.clock

    def chain(self, c: Constants) -> float:
        """Microseconds."""
        return self.before(c) + sum(self.stage(c, number) for number in range(self.stages))

    def memory(self, c: Constants) -> float:
        """Microseconds."""
        return self.bytes / c.bandwidth / 1e6


def alone(work: Work, c: Constants) -> float:
    """A phase as a launch of its own, microseconds."""
    return c.launch + max(work.chain(c), c.memory_latency + work.memory(c))


@dataclass
class Timed:
    """A phase in the persistent form: microseconds, and those of them that its warps waited for memory."""

    total: float
    waited: float


def together(works: list[Work], ring: int, c: Constants) -> list[Timed]:
    """Phases one after the other in one launch, weights running ahead by `ring` stages of each warp."""
    now = served = 0.0
    consumed: list[float] = []  # when each stage was
    found = []
    for work in works:
        begun, waited = now, 0.0
        now += c.grid_barrier + work.before(c)
        if work.own_ring:
            served, first = begun, len(consumed)
        else:
            first = 0
        for number in range(work.stages):
            room = len(consumed) - ring
            asked = consumed[room] if room >= first and room >= 0 else 0.0
            served = max(served, asked) + work.memory(c) / work.stages
            here = max(served, asked + c.memory_latency)
            waited += max(0.0, here - now)
            now = max(now, here) + work.stage(c, number)
            consumed.append(now)
        found.append(Timed(now - begun, waited))
    return found


# The step of csrc/decode


def new_work(case: Case, counts: Counts, phase: str, graph: bool = False) -> Work:
    """One phase. As a launch of its own a phase first reads where its requests stand and begins its rings."""
    c = counts[case.kernel]
    fixed, reads = (0, 0)
    if graph:
        fixed, reads = c["fill"] * (case.ring_stages() - 1), 3
    if phase == "attention":
        return _new_attention(case, c, fixed, reads)
    matrix = case.matrix("gqkv" if phase == "first gqkv" else phase)
    tiles = -(-matrix.tiles // case.blocks)
    head = "head_" if phase == "head" else ""
    together = -(-tiles // case.tiles_together())
    whole, rest = divmod(matrix.warp_items, STAGE_ITEMS[matrix.dtype])
    of_tile = whole * c[f"{head}stage"][-1] + (c[f"{head}stage"][rest - 1] if rest else 0)
    bringing, more_reads = _bringing(case, c, phase, matrix)
    turn = c["turn"]["gqkv" if phase in ("first gqkv", "head") else phase]
    work = Work(
        instructions=fixed + turn + bringing + tiles * c[f"{head}tile"] + (together - 1) * c[f"{head}group"],
        stages=tiles * matrix.stages,
        stage_instructions=of_tile / matrix.stages,
        stage_waits=1,
        stage_cycles=Constants.second_product,
        reads=reads + more_reads,
        bytes=matrix.bytes,
        own_ring=phase == "head",
    )
    if phase == "first gqkv":
        return dataclasses.replace(work, asked=case.blocks * 8 * case.batch * matrix.columns)
    blocks, times = min(case.blocks, matrix.tiles), case.times_brought(phase)
    asked = 2.0 * blocks * case.rows * matrix.columns * times
    if phase == "o" and case.splits_apart:
        asked *= case.batch / case.rows * max(MOST_SPLITS // 2, min(case.pages, MOST_SPLITS))
    if not case.streams(phase):
        return dataclasses.replace(work, asked=asked)
    # The first window is a read before the stages; the others follow as their registers become free.
    windows = -(-case.sixteens(phase) // window(matrix.dtype, case.column_groups))
    return dataclasses.replace(
        work,
        streamed=times * matrix.stages,
        streamed_instructions=c[f"{head}streamed"] * of_tile / matrix.stages / c[f"{head}stage"][-1],
        streamed_asked=asked,
        streamed_reads=times * windows - 1,
    )


def _bringing(case: Case, c: Counts, phase: str, matrix: Matrix) -> tuple[float, int]:
    """Instructions of a warp before its products, for their activations, and reads one after the other."""
    groups, sixteens = case.column_groups, case.sixteens("gqkv" if phase == "first gqkv" else phase)
    if phase == "first gqkv":
        # All of the row's squares; 4 lanes of each request take 2 pieces at once. 8 requests after 8.
        squares, entering = -(-matrix.columns // 256), -(-2 * sixteens // 8)
        of_eight = squares * c["enter_squares"] + entering * c["enter"] + c["write_entered"]
        return groups * of_eight, groups * (squares + entering + 1)
    instructions, reads = 0.0, 1
    if not case.streams(phase):
        instructions, reads = _in_parts(case, c, phase)
    if phase in ("o", "down"):
        return instructions, reads
    squares = -(-sixteens // 16)  # each request has 4 lanes, which take 4 tiles at once
    return instructions + squares * c["squares"], reads + squares - 1  # the first of both are under way together


def _in_parts(case: Case, c: Counts, phase: str) -> tuple[float, int]:
    """The same of what is brought to shared memory: turns of a loop, a read each."""
    instructions, reads = 0.0, 0
    for part in case.parts(phase):
        if phase == "o" and case.splits_apart:
            turns = -(-2 * part * case.batch // 32)  # of 16 bytes a lane
            instructions += turns * c["join_half" if case.pages <= MOST_SPLITS // 2 else "join"]
        else:
            turns = -(-2 * part * case.rows // (32 * len(c["rows"])))
            instructions += turns * c["rows"][-1]
        reads += turns
    times = case.times_brought(phase)
    return times * instructions, times * reads


def _new_attention(case: Case, c: Counts, fixed: float, reads: int) -> Work:
    pages = case.pages_of_block(case.splits_apart)
    tasks = case.tasks_of_block
    splits = tasks * (1 if case.splits_apart else min(case.pages, 8))
    if case.int8_cache:  # keys and values lie in one stage, and are multiplied one after the other all the same
        return Work(
            instructions=fixed + c["turn"]["attention"] + tasks * c["task"] + splits * c["split"],
            stages=pages,
            stage_instructions=c["page"],
            stage_waits=2,
            reads=reads + tasks,
            bytes=case.cache_bytes,
        )
    return Work(
        instructions=fixed + c["turn"]["attention"] + tasks * c["task"] + splits * c["split"],
        stages=2 * pages,
        stage_instructions=(c["keys"] + c["values"] + c["page"]) / 2,
        stage_waits=1,
        reads=reads + tasks,
        bytes=case.cache_bytes,
    )


# The step that was measured


def old_work(case: Case, counts: Counts, phase: str, graph: bool = True) -> Work:
    """One phase at commit 8d63661. `graph` false: where the requests stand is known, the first weights have come."""
    c = counts[case.dtype]
    reads = 2 if graph else 0
    if phase == "attention":
        splits, tasks = case.old_splits(), case.old_tasks_of_block()
        pages = tasks * -(-case.pages // splits)
        shuffles, lanes_of_groups = 60, 260  # inner loops' other turns: 4 keys in 4 steps; 16 groups are joined
        instructions = 150 + tasks * (c["task"] + lanes_of_groups) + pages * (c["page"] + shuffles)
        return Work(instructions=instructions, reads=reads + 3 * tasks, pages=pages, bytes=case.cache_bytes)
    name = "gqkv" if phase == "first gqkv" else phase
    matrix, of_phase = case.matrix(name), c["phases"][name]
    tiles = -(-matrix.tiles // case.blocks)
    split = phase == "o" and case.old_splits() > 1
    row, row_reads = {
        "first gqkv": (c["enter"] + c["normed_row"], 2),
        "down": (2 * c["row"], 2),
        "o": (c["join"] if split else c["join_one"], 2 if split else 1),
    }.get(phase, (c["normed_row"], 1))
    once = c["normed_row"] if phase != "down" else c["row"]  # is in `fixed`
    epilogue = {"gqkv": tiles, "first gqkv": tiles, "o": 1, "down": 1}.get(phase, 0)
    return Work(
        instructions=of_phase["fixed"] + case.batch * row - once + (tiles - 1) * of_phase["tile"],
        stages=tiles * matrix.warp_items,
        stage_instructions=of_phase["item"],
        stage_waits=1,
        reads=reads + case.batch * row_reads + epilogue,
        bytes=matrix.bytes,
    )


def old_token(case: Case, counts: Counts, c: Constants) -> float:
    """Milliseconds of a token in the persistent form: weights of the next phase were asked for before the barrier."""
    total = 0.0
    for phase, times in repeated(case).items():
        work = old_work(case, counts, phase, graph=False)
        total += times * max(c.grid_barrier + work.chain(c), work.memory(c))
    return total / 1e3


def repeated(case: Case) -> dict[str, int]:
    """How often a token goes through each phase. Stacks are taken to be of one depth."""
    slots, visits = case.config.cache_slots, case.config.visits
    counts = dict.fromkeys(PHASES[:5], slots)
    return {**counts, "gqkv": slots - visits, "first gqkv": visits, "head": 1}


def order(case: Case) -> Iterator[str]:
    layers = case.config.cache_slots // case.config.visits
    for _ in range(case.config.visits):
        for layer in range(layers):
            yield from ("first gqkv" if layer == 0 else "gqkv", "attention", "o", "gate_up", "down")
    yield "head"


# What is printed


def xl(dtype: str, batch: int, cached: int, kv_dtype: str = "bfloat16") -> Case:
    return Case(HRMConfig.preset("XL"), dtype, batch, cached, kv_dtype=kv_dtype)


def load_counts(step: str) -> Counts:
    name = {"new": "step_counts.json", "old": "step_counts_old.json"}[step]
    counts: Counts = json.loads((HERE / name).read_text())
    return counts


def explained(counts: Counts, c: Constants) -> list[tuple[tuple[str, int, int], str, float, float]]:
    """Every cell of MEASURED: case, phase, measured, modelled."""
    return [
        (key, phase, measured, alone(old_work(xl(*key), counts, phase), c))
        for key, row in MEASURED.items()
        for phase, measured in zip(PHASES, row, strict=True)
    ]


def explained_tokens(counts: Counts, c: Constants) -> list[tuple[str, tuple[str, int, int], float, float]]:
    """Every figure of MEASURED_TOKEN and MEASURED_SPREAD: a remark, case, measured, modelled."""
    asked = [("", key, measured, xl(*key)) for key, measured in MEASURED_TOKEN.items()]
    for key, measured in MEASURED_SPREAD.items():
        case = xl(*key)
        spread = SpreadCase(case.config, case.dtype, case.batch, case.cached)
        asked.append((", attention spread", key, measured, spread))
    return [(what, key, measured, old_token(case, counts, c)) for what, key, measured, case in asked]


def predict(case: Case, counts: Counts, c: Constants) -> dict[str, Any]:
    """A token of the persistent form, and of each phase its mean, its limits, and as a launch of its own."""
    works = {phase: new_work(case, counts, phase) for phase, times in repeated(case).items() if times}
    sequence = list(order(case))
    times = together([works[phase] for phase in sequence], case.ring_stages() - 1, c)
    total = sum(timed.total for timed in times) / 1e3
    phases: dict[str, dict[str, Any]] = {}
    for phase, work in works.items():
        mine = [timed for name, timed in zip(sequence, times, strict=True) if name == phase]
        mean = sum(timed.total for timed in mine) / len(mine)
        chain = c.grid_barrier + work.chain(c)
        phases[phase] = {
            "us": mean,
            "memory_us": work.memory(c),
            "chain_us": chain,
            "binds": "memory" if work.memory(c) > chain else "chain",
            "graph_us": alone(new_work(case, counts, phase, graph=True), c),
        }
    limit = case.bytes / c.bandwidth / 1e9
    graph = sum(repeated(case)[phase] * found["graph_us"] for phase, found in phases.items()) / 1e3
    return {
        "dtype": case.dtype,
        "kv_dtype": case.kv_dtype,
        "batch": case.batch,
        "cached": case.cached,
        "ms": total,
        "limit_ms": limit,
        "share": limit / total,
        "graph_ms": graph,
        "ring_stages": case.ring_stages(),
        "waited_for_memory": sum(timed.waited for timed in times) / 1e3 / total,
        "phases": phases,
    }


def fit(counts: Counts, c: Constants) -> Constants:
    """The constants of FITTED with the least sum of squared relative errors, by steps along one or two of them."""

    def cost(x: Constants) -> float:
        return sum((modelled / measured - 1) ** 2 for _, _, measured, modelled in explained(counts, x))

    best, step = cost(c), 0.2
    while step > 1e-3:
        tries = [
            {a: getattr(c, a) * (1 + i * step), b: getattr(c, b) * (1 + j * step)}
            for a in FITTED
            for b in FITTED
            if a != b
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        found = min((cost(new), i) for i, new in enumerate(dataclasses.replace(c, **t) for t in tries))
        if found[0] < best * (1 - 1e-6):
            best, c = found[0], dataclasses.replace(c, **tries[found[1]])
        else:
            step /= 2
    return c


def name_of(key: tuple[str, int, int], kv_dtype: str = "bfloat16") -> str:
    dtype, batch, cached = key
    cache = " in int8" if kv_dtype == "int8" else ""
    return f"{dtype}, {batch} request{'s' if batch > 1 else ''}, {cached:,} tokens{cache}"


def print_explained(c: Constants, show: Callable[[str], None] = print) -> float:
    """Returns the largest error of a cell."""
    counts = load_counts("old")
    cells = explained(counts, c)
    rows = []
    for key in MEASURED:
        mine = [f"{m:g} / {x:.1f} ({x / m - 1:+.0%})" for k, _, m, x in cells if k == key]
        rows.append([name_of(key), *mine])
    show("The old step, microseconds of a phase in the graph form: measured / modelled (error)\n")
    show(table(["", *PHASES], rows))
    worst = max(cells, key=lambda cell: abs(cell[3] / cell[2] - 1))
    missed = [f"{name_of(k)}: {phase}" for k, phase, m, x in cells if abs(x / m - 1) > 0.2]
    show(
        f"\nworst cell: {name_of(worst[0])}, {worst[1]}, {worst[3] / worst[2] - 1:+.0%}; "
        f"over 20%: {', '.join(missed) or 'none'}"
    )
    show("\nIts token in the persistent form, milliseconds; nothing is fitted to these\n")
    rows = [
        [f"{name_of(key)}{what}", f"{m:.2f}", f"{x:.2f}", f"{x / m - 1:+.0%}"]
        for what, key, m, x in explained_tokens(counts, c)
    ]
    show(table(["", "measured", "modelled", "error"], rows))
    return abs(worst[3] / worst[2] - 1)


def print_predicted(
    found: list[dict[str, Any]], slow: list[dict[str, Any]], show: Callable[[str], None] = print
) -> None:
    show("\nThe step of csrc/decode, predicted: milliseconds of a token\n")
    rows = [
        [
            name_of((p["dtype"], p["batch"], p["cached"]), p["kv_dtype"]),
            f"{p['ms']:.2f}",
            f"{s['ms']:.2f}",
            f"{p['limit_ms']:.2f}",
            f"{p['share']:.0%}",
            f"{p['graph_ms']:.2f}",
            f"{p['waited_for_memory']:.0%}",
        ]
        for p, s in zip(found, slow, strict=True)
    ]
    show(
        table(
            [
                "",
                "persistent",
                f"with {SLOW_READ} us a read",
                "limit",
                "share of the bandwidth",
                "graph",
                "waits for memory",
            ],
            rows,
        )
    )
    show("\nMicroseconds of a phase, persistent: all (memory alone / chain alone, what binds)\n")
    rows = [
        [
            name_of((p["dtype"], p["batch"], p["cached"]), p["kv_dtype"]),
            *(
                f"{q['us']:.1f} ({q['memory_us']:.1f} / {q['chain_us']:.1f}, {q['binds']})"
                for q in p["phases"].values()
            ),
        ]
        for p in found
    ]
    show(table(["", *PHASES], rows))


SLOW_READ = 0.7  # us, what a read was believed to take on the day of the measurement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the prediction as JSON")
    parser.add_argument("--fit", action="store_true", help="print the constants that fit the measured table best")
    options = parser.parse_args()
    c = Constants()
    if options.fit:
        print(fit(load_counts("old"), c))
        return 0
    counts = load_counts("new")
    cases = [xl(*key) for key in PREDICTED] + [xl(*key, kv_dtype="int8") for key in PREDICTED_INT8]
    found = [predict(case, counts, c) for case in cases]
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print_explained(c)
    print_predicted(found, [predict(case, counts, dataclasses.replace(c, read=SLOW_READ)) for case in cases])
    return 0


if __name__ == "__main__":
    sys.exit(main())
