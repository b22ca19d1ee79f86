"""Products of packed int8 and int4 weights, by the emulator of CUDA: against float64, and the same bits in any company.

Shapes: T tokens, R rows and K columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.emulator import counters, emulated_cuda, seeded
from torch import Tensor

from hrmcore.engine.mma_layout import in_fragments, paired, quantised
from hrmcore.engine.packed_model import PackedMatrix

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

DTYPES = ("int8", "int4")
# A float32 sum of n terms is off by at most n units of 2^-24 of the sum of their magnitudes; a result in bfloat16 by
# 2^-8 of itself more.
UNIT, ROUNDED = 2.0**-24, 2.0**-8


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.rand(rows, 1)


def random_tokens(tokens: int, columns: int) -> Tensor:
    torch.manual_seed(tokens)
    return torch.randn(tokens, columns).bfloat16()


def packed(weight: Tensor, dtype: str, pieces: int = 0) -> PackedMatrix:
    ordered = paired(weight, pieces) if pieces else weight
    return PackedMatrix(in_fragments(ordered, dtype).flatten(), len(weight), pieces, dtype)


def rounded(weight: Tensor, dtype: str) -> Tensor:
    """The weights that a product meets: whole numbers times scales, in bfloat16; returned as float64."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64))
    whole, scales = quantised(padded, dtype)
    scaled = (whole.view(len(whole), -1, 32) * scales.float()[..., None]).view_as(padded)
    return scaled.bfloat16().double()[:, : weight.shape[1]]


def multiply(matrix: PackedMatrix, x: Tensor, **options: Any) -> Tensor:
    with emulated_cuda():
        return matrix.multiply(x, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "pieces"),
    [(1, 16, 16, 0), (3, 50, 48, 0), (5, 50, 80, 0), (37, 96, 272, 3), (70, 128, 64, 4), (130, 200, 144, 0)],
)
@pytest.mark.parametrize("result", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_product_is_the_sum_in_float64(
    tokens: int, rows: int, columns: int, pieces: int, result: torch.dtype, dtype: str
) -> None:
    rows += result == torch.float32 and not pieces  # an odd number, as a vocabulary may have
    weight, x = random_weight(rows, columns), random_tokens(tokens, columns)
    found = multiply(packed(weight, dtype, pieces), x, dtype=result).double()
    exact, weights = x.double() @ rounded(weight, dtype).T, rounded(weight, dtype)
    allowed = columns * UNIT * (x.double().abs() @ weights.abs().T)
    if result == torch.bfloat16:
        allowed += ROUNDED * (exact.abs() + allowed)
    assert bool(((found - exact).abs() <= allowed).all())
    assert float(exact.abs().max()) > 100 * float(allowed.min())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "ffn", "columns"), [(1, 16, 16), (19, 48, 80), (67, 136, 144)])
def test_gated_rows_are_silu_times_their_partners(tokens: int, ffn: int, columns: int, dtype: str) -> None:
    weight, x = random_weight(2 * ffn, columns), random_tokens(tokens, columns)
    found = multiply(packed(weight, dtype, 1), x, gated=True).double()
    weights = rounded(weight, dtype)
    a, b = (x.double() @ weights.T).chunk(2, dim=1)
    wrong_a, wrong_b = (columns * UNIT * (x.double().abs() @ weights.abs().T)).chunk(2, dim=1)
    silu = a * a.sigmoid()
    exact = silu * b
    # silu's slope is at most 1.1; exponential, reciprocal and products: 16 units more than cover them
    allowed = 1.1 * wrong_a * (b.abs() + wrong_b) + (silu.abs() + 1.1 * wrong_a) * wrong_b + 16 * UNIT * exact.abs()
    allowed += ROUNDED * (exact.abs() + allowed)
    assert bool(((found - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_depend_on_no_shape_of_blocks_no_schedule_and_no_neighbour(dtype: str) -> None:
    """Blocks of all five shapes, chosen by how many multiprocessors there are."""
    shapes = set()
    for rows in (120, 250):
        matrix, x = packed(random_weight(rows, 80), dtype), random_tokens(250, 80)
        first = multiply(matrix, x, processors=1, dtype=torch.float32)
        for processors in (1, 4, 8, 1000):
            counters()
            with seeded(processors):
                assert torch.equal(multiply(matrix, x, processors=processors, dtype=torch.float32), first)
            shapes.add((rows, counters()["block_barriers"]))
        alone = multiply(matrix, x[100:101], dtype=torch.float32)
        assert torch.equal(alone, first[100:101])
        x[99], x[101] = torch.nan, torch.inf
        assert torch.equal(multiply(matrix, x, dtype=torch.float32)[100:101], alone)
    # two stages a block: 256 x 128, 256 x 64, 128 x 64 and 64 x 64 blocks of 250 rows; 128 x 128 of 120
    assert {blocks for _, blocks in shapes} >= {4, 8, 16, 32}
    assert (120, 4) in shapes


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_the_result_is_written_and_only_operands_are_read(dtype: str) -> None:
    """Operands and results in the middle of memory that is NaN, or weights that would make one."""
    weight, x = random_weight(51, 80), random_tokens(37, 80)
    matrix = packed(weight, dtype)
    expected = multiply(matrix, x, dtype=torch.float32)
    x_frame = torch.full((x.numel() + 2048,), torch.nan, dtype=torch.bfloat16)
    x_frame[1024:-1024] = x.flatten()
    bytes_frame = torch.full((len(matrix.weights) + 4096,), 0xFF, dtype=torch.uint8)
    bytes_frame[2048:-2048] = matrix.weights
    framed = PackedMatrix(bytes_frame[2048:-2048], 51, 0, dtype)
    assert torch.equal(multiply(framed, x_frame[1024:-1024].view(37, 80), dtype=torch.float32), expected)
    out = torch.full((39, 51), torch.nan)
    with emulated_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: out[1:-1])
        matrix.multiply(x, dtype=torch.float32)
    assert torch.equal(out[1:-1], expected)
    assert bool(out[[0, -1]].isnan().all())


def test_a_matrix_is_read_from_memory_once_and_activations_by_every_block_of_rows() -> None:
    matrix, x = packed(random_weight(256, 128), "int8"), random_tokens(128, 128)
    counters()
    multiply(matrix, x, processors=1000)  # 64 x 64 blocks: 4 of rows, 2 of tokens
    found = counters()
    assert found["bytes_read_first"] == len(matrix.weights) + 2 * x.numel()
    assert found["bytes_read"] == 2 * len(matrix.weights) + 4 * 2 * x.numel()
    assert found["bytes_written"] == 2 * 128 * 256


def test_wrong_operands_are_refused() -> None:
    matrix, x = packed(random_weight(32, 64), "int8"), random_tokens(3, 64)
    for change, wrong, message in (
        ({}, x.float(), "x must be"),
        ({}, x[0], "x must"),
        ({}, x[:, :40], "x must"),
        ({}, x[:, :40].contiguous(), "x must be of a positive multiple of 16 columns, got 40"),
        ({}, x[:, :32].contiguous(), "weights must be 1088 bytes, got 2176"),
        ({"weights": matrix.weights[1:]}, x, "weights must be 2176 bytes"),
        ({"rows": 40}, x, "weights must be"),
        ({"pieces": 3}, x, "pieces must be 0, or pieces of a multiple of 16 of the 32 rows, got 3"),
        ({"dtype": "bfloat16"}, x, "dtype must be int8 or int4"),
    ):
        with pytest.raises(ValueError, match=message):
            multiply(PackedMatrix(**{**vars(matrix), **change}), wrong)
    for options, message in (
        ({"gated": True}, "pieces must be 1 of gated rows, got 0"),
        ({"gated": True, "dtype": torch.float32}, "out must be bfloat16 where rows are gated"),
        ({"processors": -1}, "processors must be from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            multiply(matrix, x, **options)
    with pytest.raises(ValueError, match="out must be of an even number of columns in bfloat16, got 51"):
        multiply(packed(random_weight(51, 64), "int8"), x)
    with pytest.raises(ValueError, match="on a CUDA device, got a tensor on the CPU"):
        matrix.multiply(x)
