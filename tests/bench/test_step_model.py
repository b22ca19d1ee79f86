"""The decode step's model: ways through a made-up kernel, its arithmetic, and that it explains what was measured."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
from support.emulator import device_with, emulated_cuda
from support.traffic import traffic

from bench.gpu import sass, step_model, step_shapes
from bench.gpu.step_model import Constants, Work
from hrmcore import _C
from hrmcore.config import HRMConfig

ROOT = Path(__file__).parents[2]

# Two loops, one in the other; the inner one has a short way that multiplies nothing. The branch at 0x90 is taken by
# warps that have come apart alone, the call at 0x50 leaves the inner loop as sm_80 does, the last block is unreachable.
MADE_UP = """
    code for sm_80
        Function : made_up
        /*0000*/                   S2R R0, SR_TID.X ;                /* 0x0 */
                                                                     /* 0x1 */
        /*0010*/                   LDS R1, [R0] ;                    /* 0x0 */
        /*0020*/              @!P0 BRA 0x40 ;                        /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P1 CALL.REL.NOINC 0x70 ;
        /*0060*/                   BRA 0x20 ;
        /*0070*/                   MUFU.EX2 R3, R3 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   BRA.DIV UR4, 0xd0 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   I2F.RP R0, R1 ;
"""


# Two switches: 0x20 goes to 0x60 or on to 0x30, 0x50 to 0x60 or back to 0x00.
SWITCHES = """
    code for sm_100
        Function : switches
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/                   LDC R4, c[0x2][R2] ;
        /*0020*/                   BRX R4 -0x30 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0040*/                   LDC R4, c[0x2][R2+0x8] ;
        /*0050*/                   BRX R4 -0x60 ;
        /*0060*/                   EXIT ;
"""
TABLES = """
Fatbin elf code:
arch = sm_100

.nv.constant2.switches
0x00000060 0x00000030 0x00000060 0x00000000

.nv.constant2.another
0x00000010
"""


@pytest.fixture
def kernel() -> sass.Kernel:
    return sass.parse(MADE_UP)["sm_80"]["made_up"]


def test_loops_and_shortest_ways(kernel: sass.Kernel) -> None:
    inner, outer = kernel.loops
    assert inner.blocks < outer.blocks
    assert kernel.around(inner) == outer
    assert kernel.around(outer) is None
    assert kernel.innermost("HMMA") == [inner]
    assert kernel.code_bytes == 14 * 16
    assert kernel.size(inner.blocks) == 5
    assert kernel.once_round(inner, {}) == 4
    assert kernel.once_round(inner, {"HMMA": 1}) == 5
    assert kernel.once_round(inner, {"HMMA": 2}) == 10
    assert kernel.once_round(inner, {"BAR": 1}) is None
    assert kernel.through({}) == 11
    assert kernel.through({"HMMA": 1, "MUFU.EX2": 1}) == 12
    assert kernel.through({"HMMA": 1, "MUFU": 2}) == 20
    assert kernel.through({"I2F": 1}) is None
    assert kernel.through({"HMMA": 1}, without=inner.blocks) is None
    assert kernel.divisions(range(len(kernel.blocks))) == 1
    assert kernel.divisions(kernel.reachable) == 0


def test_jumps_by_a_table_go_where_it_says() -> None:
    kernel = sass.parse(SWITCHES, TABLES)["sm_100"]["switches"]
    assert [block.after for block in kernel.blocks] == [[1, 2], [0, 2], []]
    assert kernel.once_round(kernel.loops[0], {"HMMA": 1}) == 6
    assert kernel.through({}) == 4


def test_a_budget_that_is_missed_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "cmake")
    check_sass = importlib.import_module("check_sass")
    assert check_sass.line(("code", [12.0, 12.5], 12), 6).split() == ["code", "12.0", "12.5", "12", "missed"]
    assert check_sass.line(("code", [3, 12], 12), 6).split() == ["code", "3", "12", "12"]
    assert check_sass.line(("code", [3, 12], None), 6).split() == ["code", "3", "12"]
    found = {line.split()[0]: line.split()[1:] for line in check_sass.blocks_with_work()}
    assert found["gate_up"] == ["132", "100%"]
    assert found["down"] == ["96", "73%", "missed"]


MADE_UP_CONSTANTS = Constants(
    clock=1000, bandwidth=2, grid_barrier=1, memory_latency=0.5, launch=3, cycles=2, wait=10, read=0.25, page=1
)


def test_a_phase_takes_the_longer_of_memory_and_chain() -> None:
    c = MADE_UP_CONSTANTS
    work = Work(instructions=500, stages=4, stage_instructions=45, stage_waits=1, reads=2, pages=1, bytes=2_000_000)
    assert work.chain(c) == pytest.approx(1 + 0.5 + 1 + 4 * 0.1)
    assert work.memory(c) == pytest.approx(1)
    assert step_model.alone(work, c) == pytest.approx(3 + 2.9)
    heavy = dataclasses.replace(work, bytes=20_000_000)
    assert step_model.alone(heavy, c) == pytest.approx(3 + 0.5 + 10)


def test_weights_run_ahead_over_the_ends_of_phases_as_far_as_the_ring_reaches() -> None:
    c = MADE_UP_CONSTANTS
    chain, product = Work(instructions=2000), Work(stages=4, stage_instructions=50, bytes=8_000_000)
    both = [chain, product] * 10
    deep = step_model.together(both, 100, c)
    assert sum(t.total for t in deep) == pytest.approx(10 * (1 + 4 + 1 + 0.4), rel=0.02)  # memory alone takes 40
    assert sum(t.waited for t in deep) == pytest.approx(0)
    shallow = step_model.together(both, 1, c)
    assert sum(t.total for t in shallow) > 90
    assert sum(t.waited for t in shallow) > 25
    bound = step_model.together([Work(stages=4, stage_instructions=50, bytes=20_000_000)] * 50, 8, c)
    assert sum(t.total for t in bound) == pytest.approx(500, rel=0.01)


def test_the_committed_counts_explain_what_was_measured() -> None:
    cells = step_model.explained(step_model.load_counts("old"), Constants())
    assert len(cells) == 35
    assert max(abs(modelled / measured - 1) for _, _, measured, modelled in cells) <= 0.2


def test_it_explains_tokens_and_a_variant_that_it_is_not_fitted_to() -> None:
    """From below, by at most 14%."""
    tokens = step_model.explained_tokens(step_model.load_counts("old"), Constants())
    assert len(tokens) == 13
    for _, _, measured, modelled in tokens:
        assert 0.86 < modelled / measured < 1


def test_the_constants_fit_the_table_best() -> None:
    fitted = step_model.fit(step_model.load_counts("old"), Constants())
    for name in step_model.FITTED:
        assert getattr(fitted, name) == pytest.approx(getattr(Constants(), name), rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_next_step_is_predicted(dtype: str) -> None:
    case = step_model.xl(dtype, 8, 1500)
    found = step_model.predict(case, step_model.load_counts("new"), Constants())
    assert set(found["phases"]) == set(step_model.PHASES)
    assert found["limit_ms"] < found["ms"] < found["graph_ms"]
    assert sum(step_model.repeated(case).values()) == len(list(step_model.order(case))) == 641
    expected = traffic(HRMConfig.preset("XL"), [1500] * 8, 132, dtype)
    assert case.bytes == pytest.approx(expected.floor, rel=1e-3)  # less the new tokens' own keys and values
    assert not case.splits_apart  # joining would cost 8 requests more than it saves
    assert step_model.xl(dtype, 1, 1500).splits_apart


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_more_than_8_requests_are_predicted_with_kernels_of_their_own(dtype: str) -> None:
    """32 requests in one pass take longer than 8, and less than four passes; no less than memory takes."""
    counts, c = step_model.load_counts("new"), Constants()
    eight, many, most = (step_model.predict(step_model.xl(dtype, batch, 200), counts, c) for batch in (8, 16, 32))
    assert [step_model.xl(dtype, batch, 200).kernel for batch in (1, 9, 16, 17, 32)] == [
        f"{dtype}, 1 request",
        *[f"{dtype}, 16 requests"] * 2,
        *[f"{dtype}, 32 requests"] * 2,
    ]
    assert eight["ms"] < many["ms"] < most["ms"] < 4 * eight["ms"]
    for found in (eight, many, most):
        assert found["limit_ms"] < found["ms"]
    assert step_model.xl(dtype, 32, 200).streams("down")
    assert not step_model.xl(dtype, 1, 200).streams("down")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_an_int8_cache_takes_half_the_bytes_and_spares_many_long_requests_time(dtype: str) -> None:
    counts, c = step_model.load_counts("new"), Constants()
    cases = [step_model.xl(dtype, 32, 1500, kv_dtype) for kv_dtype in ("bfloat16", "int8")]
    assert cases[1].kernel == f"{cases[0].kernel}, int8 cache"
    expected = traffic(HRMConfig.preset("XL"), [1500] * 32, 132, dtype, kv_dtype="int8")
    assert cases[1].bytes == pytest.approx(expected.floor, rel=3e-3)  # less the new tokens' own keys and values
    assert cases[1].cache_bytes == cases[0].cache_bytes * 272 // 512
    wide, narrow = (step_model.predict(case, counts, c) for case in cases)
    assert narrow["limit_ms"] < narrow["ms"] < wide["ms"]


def test_activations_take_as_long_as_the_second_level_cache_needs_for_them() -> None:
    c = MADE_UP_CONSTANTS
    assert Work(reads=2, asked=1e6).before(c) == pytest.approx(2 * c.read)
    assert Work(reads=2, asked=11e6).before(c) == pytest.approx(11e6 / c.cache_bandwidth / 1e6)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_as_many_requests_fit_as_the_core_says(
    dtype: str, kv_dtype: str, shared_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_shapes, "SHARED_BYTES", shared_kib << 10)
    with device_with(shared_kib), emulated_cuda():
        most = _C.cuda_step_most_requests(
            **{"width": 1536, "ffn": 4096, "heads": 12, "head_dim": 128, "xpos": False, "window": 0},
            **{"table_length": 24, "dtype": dtype, "blocks": 132, "int8_cache": kv_dtype == "int8"},
        )
    step_model.xl(dtype, most, 1500, kv_dtype).ring_stages()
    for more in range(most + 1, 33):
        with pytest.raises(ValueError, match="do not fit"):
            step_model.xl(dtype, more, 1500, kv_dtype).ring_stages()


def test_what_streams_by_takes_the_longer_of_products_cache_and_reads() -> None:
    """Of the first tile's stages, two of four; the reads that begin it come before."""
    c = MADE_UP_CONSTANTS
    work = Work(stages=4, stage_instructions=45, stage_waits=1, reads=1, streamed=2, streamed_instructions=95)
    assert work.chain(c) == pytest.approx(c.read + 2 * 0.2 + 2 * 0.1)
    slow = dataclasses.replace(work, streamed_asked=5.5e6)
    assert slow.chain(c) == pytest.approx(c.read + 1 + 2 * 0.1)
    late = dataclasses.replace(work, streamed_reads=8)
    assert late.chain(c) == pytest.approx(c.read + 8 * c.read + 2 * 0.1)


def test_shapes_follow_the_schedule() -> None:
    short = step_model.xl("bfloat16", 1, 200)
    assert [short.tiles_of_block(phase) for phase in ("gqkv", "o", "gate_up", "down", "head")] == [3, 1, 4, 1, 32]
    assert short.ring_stages() == 11
    assert [step_model.xl(dtype, 1, 200).ring_stages() for dtype in ("int8", "int4")] == [7, 12]
    assert short.blocks_with_work("attention") == 48
    assert not step_model.xl("bfloat16", 8, 200).splits_apart
    assert short.parts("down") == [32]  # sixteens of columns of a warp
    few = [step_model.xl(dtype, 8, 200) for dtype in ("bfloat16", "int8", "int4")]
    assert [(case.ring_stages(), case.streams("down"), case.rows) for case in few] == [
        (n, True, 8) for n in (11, 7, 11)
    ]
    assert [case.kernel for case in few] == [f"{case.dtype}, 8 requests" for case in few]
    assert [step_model.xl(dtype, 32, 200).ring_stages() for dtype in ("bfloat16", "int8", "int4")] == [6, 4, 6]


def test_the_counts_are_those_of_the_committed_table() -> None:
    """make cuda-table writes both."""
    table = (ROOT / "csrc" / "sass.txt").read_text()
    targets = table.splitlines()[1].split()
    for name, counts in step_model.load_counts("new").items():
        figures = next(line for line in table.splitlines() if line.startswith(f"{name}: instructions for"))
        shown = figures.split("bytes" if name.startswith("bfloat16") else "item")[1].split()[targets.index("sm_90")]
        assert float(shown) == pytest.approx(counts["stage"][-1] / len(counts["stage"]), abs=0.06)
