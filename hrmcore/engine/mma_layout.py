"""Weights in the order of the fused decode step on CUDA (csrc/decode/decode_step.h), in bfloat16, int8 or int4.

A tile is 16 rows; an item is the tile's next 16, 32 or 64 columns: 16 bytes for each of 32 lanes, then the scales
(bfloat16) of rows g and g + 8 for each group of 32 columns, g from 0 to 7. They are 16 * 2^24 times the weights' own:
activations beside int8 and int4 are stored in sixteenths (csrc/decode/activations.cuh), and whole numbers become f16
as multiples of 2^-24, the smallest (csrc/decode/gemm.cuh). Rows g + 8 of int4 become multiples of 2^-20 instead.
Lane 4g + h holds, of each 16 columns, 4h to 4h + 3 of rows g and g + 8: what mma.m16n8k16 takes, with the columns of
activations renumbered alike.
Shapes: R rows, K columns of a matrix, as the model has them; T tiles, I items.
"""

from __future__ import annotations

import torch
from torch import Tensor

MMA_DTYPES = ("bfloat16", "int8", "int4")

TILE = 16  # rows
GROUP = 32  # columns that share a scale
SCALE_FACTOR = {"int8": (2.0**28, 2.0**28), "int4": (2.0**28, 2.0**24)}  # of rows g and g + 8
ITEMS = {"bfloat16": 16, "int8": 32, "int4": 64}  # columns

# The int4 scales that are tried for a group: its weight of largest magnitude, divided by each of these. The CPU engine
# (csrc/gemm/pack.cpp) tries the same; tests/engine/test_cuda_step.py holds the weights of both to be equal.
INT4_DIVISORS = (-8.5, -8.0, -7.75, -7.5, -7.25, -7.0, -6.75, -6.5, -6.0, 7.25, 6.75, 6.25)


def in_fragments(weight: Tensor, dtype: str) -> Tensor:
    """A matrix (R, K) as bytes (T, I, bytes of an item), zeros beyond R and K."""
    rows, columns = weight.shape
    tiles, items = -(-rows // TILE), -(-columns // ITEMS[dtype])
    padded = weight.new_zeros(tiles * TILE, items * ITEMS[dtype], dtype=torch.float32)
    padded[:rows, :columns] = weight
    if dtype == "bfloat16":
        pairs = padded.bfloat16().view(tiles, 2, 8, items, 4, 2, 2)
        order = pairs.permute(0, 3, 2, 4, 5, 1, 6).contiguous()  # tile, item, g, h, pair of columns, g or g + 8, column
        return order.view(tiles, items, -1).view(torch.uint8)
    whole, scales = quantised(padded, dtype)
    sixteens = whole.view(tiles, 2, 8, items, ITEMS[dtype] // 16, 4, 2, 2)
    if dtype == "int8":  # magnitudes of a column of both registers; each one's sign stands beside the other's magnitude
        columns_of_two = sixteens.to(torch.int8).permute(0, 3, 2, 5, 4, 1, 7, 6)
        signs = (columns_of_two.flip(-1) < 0).to(torch.uint8) << 7
        bytes_ = (columns_of_two.abs().to(torch.uint8) | signs).reshape(tiles, items, -1)
    else:  # the first columns of the four registers in nibbles 0 to 3 of a word, the second in nibbles 4 to 7
        nibbles = (sixteens + 8).permute(0, 3, 2, 5, 4, 7, 6, 1).to(torch.uint8).reshape(tiles, items, -1, 2)
        bytes_ = nibbles[..., 0] | nibbles[..., 1] << 4
    groups = ITEMS[dtype] // GROUP
    factors = scales.new_tensor(SCALE_FACTOR[dtype]).view(2, 1, 1, 1)
    pairs = factors * scales.view(tiles, 2, 8, items, groups)
    ordered = pairs.permute(0, 3, 2, 4, 1).contiguous()  # tile, item, g, group, g or g + 8
    return torch.cat([bytes_, ordered.view(tiles, items, -1).view(torch.uint8)], dim=-1)


def bytes_of(weight: Tensor, dtype: str) -> int:
    """How many bytes `in_fragments` makes of a matrix (R, K)."""
    rows, columns = weight.shape
    groups = 0 if dtype == "bfloat16" else ITEMS[dtype] // GROUP
    return -(-rows // TILE) * -(-columns // ITEMS[dtype]) * (32 * 16 + groups * TILE * 2)


def quantised(weight: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Whole numbers (R, K) and scales (R, K / 32) bfloat16, the same as the CPU engine's (csrc/gemm/pack.cpp)."""
    groups = weight.view(len(weight), -1, GROUP)
    if dtype == "int8":
        scales = (groups.abs().amax(-1) / 127).bfloat16()
        whole = _rounded(groups, scales, -127, 127)
    else:
        scales = _int4_scales(groups)
        whole = _rounded(groups, scales, -8, 7)
    return whole.reshape(weight.shape), scales


def _rounded(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    return (groups * inverse[..., None]).round().clamp(low, high)


def _int4_scales(groups: Tensor) -> Tensor:
    """Of the scales tried, the one with the least squared error, summed over the columns in order."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, 3e38)
    for divisor in INT4_DIVISORS:
        scales = (extreme / divisor).bfloat16()
        miss = groups - scales.float()[..., None] * _rounded(groups, scales, -8, 7)
        error = torch.zeros_like(extreme)
        for column in range(GROUP):
            error += miss[..., column] * miss[..., column]
        best = torch.where(error < least, scales.float(), best)
        least = torch.minimum(error, least)
    return best.bfloat16()


def paired(weight: Tensor, pieces: int) -> Tensor:
    """Reorder rows, cut into equal `pieces`: every 16 hold 8 of a piece's lower half and their 8 partners of the upper.

    Partners are the rows that are rotated together (RoPE), or multiplied (the gate and the value of the FFN).
    """
    rows, columns = weight.shape
    return weight.reshape(pieces, 2, rows // pieces // 16, 8, columns).transpose(1, 2).reshape(rows, columns)
