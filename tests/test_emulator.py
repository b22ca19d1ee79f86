"""The emulator of CUDA catches every fault planted in csrc/emulator/faults.cpp, and runs what is right.

Source of the fragment layouts below: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
"""

from __future__ import annotations

import ctypes
import math
import re

import numpy as np
import pytest
from support.emulator import counters, library, seeded

pytestmark = pytest.mark.emulated

FAULTS = {
    "shared_out_of_bounds": r"thread 63 of block \d at faults.cpp:\d+: shared memory out of bounds: byte 256 of 256",
    "shared_misaligned": r"misaligned access to shared memory, at byte \d+",
    "missing_barrier": r"race: (reads|writes) byte \d+ of shared memory, which thread \d+ of block \d (wrote|read)",
    "missing_second_barrier": r"race: (reads|writes) byte \d+ of shared memory, which thread \d+ of block \d ",
    "missing_warp_barrier": r"race: (reads|writes) byte \d+ of shared memory",
    "warp_barrier_for_a_block": r"race: (reads|writes) byte \d+ of shared memory",
    "shuffle_is_no_barrier": r"race: reads byte \d+ of shared memory",
    "blocks_write_one_place": r"race: writes global memory, which thread 0 of block \d wrote",
    "block_reads_its_neighbour": r"race: (reads|writes) global memory, which thread 0 of block \d (wrote|read)",
    "skipped_barrier": r"(a thread of its block left without reaching|left the kernel, and others wait for it)",
    "divergent_barrier": r"divergent barrier: others of its block wait at faults.cpp:\d+",
    "deadlock": r"deadlock: .*block \d threads 0-15: waits in __syncthreads at faults.cpp:\d+; "
    r"block \d threads 16-31: waits in __syncwarp at faults.cpp",
    "divergent_shuffle": r"divergent warp: __shfl_xor_sync here, while .* wait in __shfl_xor_sync at faults.cpp:\d+",
    "shuffle_without_the_caller": r"__shfl_xor_sync with a mask that leaves out the calling lane",
    "shuffle_from_outside_the_mask": r"a shuffle reads a lane that is not in its mask",
    "shuffle_with_a_lane_that_left": r"(a mask of lanes that have left|left the kernel, and lanes of its warp wait)",
    "grid_barrier_without_cooperation": r"a grid barrier in a launch that is not cooperative",
    "grid_barrier_skipped": r"grid barrier",
    "write_after_arriving": r"race: (reads|writes) global memory, which thread 0 of block \d (wrote|read)",
    "read_before_waiting": r"race: (reads|writes) global memory, which thread 0 of block \d (wrote|read)",
    "state_read_after_arriving": r"reads the state of a grid barrier that it has arrived at",
    "waits_without_arriving": r"waits at a grid barrier that its block has not arrived at",
    "arrives_twice": r"arrives at a grid barrier twice without having waited",
    "leaves_while_others_wait": r"grid barrier",
    "copy_nobody_awaits": r"thread 0 of block \d .*cp.async copies that it never waited for",
    "copy_read_by_another": r"race: (reads|writes) byte \d+ of shared memory",
    "too_much_stack": r"more than the emulator's 64 KiB of stack",
}
COOPERATIVE = {
    *("passed_through_the_grid", "works_between_arriving_and_waiting", "grid_barrier_skipped", "write_after_arriving"),
    *("read_before_waiting", "state_read_after_arriving", "waits_without_arriving", "arrives_twice"),
    "leaves_while_others_wait",
}
SEVERAL_BLOCKS = {
    *("blocks_write_one_place", "block_reads_its_neighbour", "grid_barrier_skipped", "write_after_arriving"),
    *("read_before_waiting", "state_read_after_arriving", "arrives_twice", "leaves_while_others_wait"),
}
SEEDS = range(5)


def run(name: str, blocks: int = 1) -> tuple[str | None, np.ndarray]:
    """Launch a kernel of faults.cpp; returns what the emulator says and the kernel's thousand numbers."""
    numbers, count = np.zeros(1000, np.float32), np.zeros(1, np.uint64)
    error = library.hrmcore_test_planted(
        name.encode(), blocks, name in COOPERATIVE, numbers.ctypes.data_as(ctypes.c_void_p), count.ctypes.data
    )
    return error and error.decode(), numbers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, seed: int) -> None:
    with seeded(seed):
        error, _ = run(name, blocks=3 if name in SEVERAL_BLOCKS else 1)
    assert error is not None
    assert re.search(FAULTS[name], error), error
    assert "kernel launched at faults.cpp:" in error


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_run(seed: int) -> None:
    with seeded(seed):
        error, numbers = run("sum_of_block")
        assert (error, numbers[0]) == (None, 64 * 65 / 2)
        error, numbers = run("passed_through_the_grid", blocks=7)
        assert error is None
        assert numbers[:14].tolist() == [1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7, 1]
        error, numbers = run("works_between_arriving_and_waiting", blocks=5)
        assert error is None
        assert numbers[:10].tolist() == [200, 201, 202, 203, 204, 201, 202, 203, 204, 200]
        error, numbers = run("votes")
        assert error is None
        assert numbers[:64].tolist() == [32 * warp + (lane + 1) % 32 for warp in (0, 1) for lane in range(32)]


def test_a_launch_after_a_failed_one_is_clean() -> None:
    assert run("deadlock")[0] is not None
    assert run("sum_of_block")[0] is None


def test_shared_memory_starts_as_nan() -> None:
    error, numbers = run("shared_not_written")
    assert error is None
    assert all(math.isnan(x) for x in numbers[:64])


def test_an_asynchronous_copy_lands_when_it_is_awaited() -> None:
    numbers, count = np.zeros(1000, np.float32), np.zeros(1, np.uint64)
    numbers[:32] = np.arange(1, 33)
    assert not library.hrmcore_test_planted(
        b"copied_and_awaited", 1, False, numbers.ctypes.data_as(ctypes.c_void_p), count.ctypes.data
    )
    assert numbers[100:108].tolist() == [4, 8, 12, 16, 20, 24, 28, 0]  # the last copies 8 of 16 bytes, then zeros


def test_the_schedule_varies_with_the_seed_and_only_with_it() -> None:
    orders = []
    for seed in (*SEEDS, *SEEDS):
        with seeded(seed):
            orders.append(tuple(run("order_of_blocks", blocks=40)[1][:40]))
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(40))}
    assert orders[:5] == orders[5:]
    assert len(set(orders)) > 1


def test_what_a_launch_does_is_counted() -> None:
    counters()
    assert run("passed_through_the_grid", blocks=7)[0] is None
    assert counters() == {
        "launches": 1,
        "bytes_read": 28,
        "bytes_written": 56,
        "block_barriers": 14,  # one as a block arrives at the grid's, one as it has waited
        "grid_barriers": 1,
        "bytes_read_first": 28,
    }


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Of numbers that bfloat16 holds exactly."""
    bits = x.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint32)


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A (16, 16) B (16, 8) + C (16, 8) through the fragments of 32 lanes."""
    group, member = np.arange(32) // 4, np.arange(32) % 4
    a_bits, b_bits = bf16_bits(a), bf16_bits(b)

    def pair_of_a(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return a_bits[row, column] | a_bits[row, column + 1] << 16

    def pair_of_b(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return b_bits[row, column] | b_bits[row + 1, column] << 16

    # a0, a1: (row = groupID for ai where i < 2 || 4 <= i < 6, else groupID + 8); columns + 8 for i >= 4
    a_registers = np.stack(
        [pair_of_a(group + 8 * (i % 2), 2 * member + 8 * (i // 2)) for i in range(4)], axis=1
    ).astype(np.uint32)
    b_registers = np.stack([pair_of_b(2 * member + 8 * i, group) for i in range(2)], axis=1).astype(np.uint32)
    places = [(group + 8 * (i // 2), 2 * member + i % 2) for i in range(4)]
    c_registers = np.stack([c[place] for place in places], axis=1).astype(np.float32)
    pointers = [np.ascontiguousarray(x).ctypes.data_as(ctypes.c_void_p) for x in (a_registers, b_registers)]
    c_registers = np.ascontiguousarray(c_registers)
    assert not library.hrmcore_test_mma(*pointers, c_registers.ctypes.data_as(ctypes.c_void_p))
    out = np.full((16, 8), np.nan, np.float32)
    for i, place in enumerate(places):
        out[place] = c_registers[:, i]
    return out


@pytest.mark.parametrize("row", range(16))
def test_one_hot_mma(row: int) -> None:
    """Every element of A alone selects its row of B, every element of B alone its column of A."""
    numbers = np.arange(1, 129, dtype=np.float32)
    for k in range(16):
        hot = np.zeros((16, 16), np.float32)
        hot[row, k] = 1
        b = numbers.reshape(16, 8)
        assert (mma(hot, b, np.zeros((16, 8))) == hot @ b).all()
    for column in range(8):
        hot = np.zeros((16, 8), np.float32)
        hot[row, column] = 1
        a = np.concatenate([numbers, numbers + 128]).reshape(16, 16)
        assert (mma(a, hot, np.ones((16, 8))) == a @ hot + 1).all()


def test_ldmatrix() -> None:
    elements = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.zeros((32, 8), np.uint32)
    assert not library.hrmcore_test_ldmatrix(
        elements.ctypes.data_as(ctypes.c_void_p), registers.ctypes.data_as(ctypes.c_void_p)
    )
    for lane in range(32):
        for matrix in range(4):
            row, column = lane // 4, lane % 4 * 2
            plain, transposed = registers[lane, matrix], registers[lane, 4 + matrix]
            assert [plain & 0xFFFF, plain >> 16] == elements[matrix, row, column : column + 2].tolist()
            assert [transposed & 0xFFFF, transposed >> 16] == elements[matrix, column : column + 2, row].tolist()
