"""The bytes that one decode step on CUDA reads, counted from its schedule; tests compare the emulator's count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import GROUP, ITEMS, TILE
from hrmcore.engine.runner import PAGE

MAX_SPLITS = 8  # of a request's keys


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step reads from global memory. What several thread blocks read counts once for each of them."""

    weights: int
    cache: int
    activations: int
    activations_once: int  # those that no other block has read in the same phase

    @property
    def floor(self) -> int:
        """What must come from memory: every weight once a visit, the visible keys and values once."""
        return self.weights + self.cache

    @property
    def total(self) -> int:
        return self.floor + self.activations

    @property
    def from_memory(self) -> int:
        """What comes from memory when the GPU's cache holds what several blocks of a phase read: a few KB a request."""
        return self.floor + self.activations_once


def traffic(
    config: HRMConfig,
    positions: Sequence[int],
    blocks: int,
    dtype: str = "bfloat16",
    table_length: int | None = None,
    kv_dtype: str = "bfloat16",
) -> Traffic:
    """What the kernels of csrc/decode/phases.cuh read for up to 8 requests with `positions` tokens in the cache.

    `blocks` is the grid, `dtype` that of the weights, `kv_dtype` of the cache, `table_length` the pages that a table
    has room for: as many as the longest needs unless given.
    """
    width, ffn, heads, d = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
    attention, batch = config.attention_width, len(positions)
    warps = 8
    head_dtype = "int8" if dtype == "int4" else dtype
    xpos = config.position_encoding == "xpos"
    window = config.attention_window
    first_pages = [max(0, (position // window - 1) * window) // PAGE if window else 0 for position in positions]
    pages = [position // PAGE + 1 - first for position, first in zip(positions, first_pages, strict=True)]
    room = table_length or max(position // PAGE + 1 for position in positions)
    columns_of_warp = -(-attention // (ITEMS[dtype] * warps)) * ITEMS[dtype]
    joined = -(-batch * columns_of_warp // 8 // 32)
    apart = splits_apart(batch * heads, min(room, 2 * window // PAGE) if window else room, blocks, joined)
    splits = [min(seen, MAX_SPLITS) if apart else 1 for seen in pages]

    def active(rows: int) -> int:
        return min(blocks, -(-rows // TILE))

    squares, row = 4 * batch * width // TILE, 2 * batch * width  # of the residual stream
    matrices = ((4 * attention, width), (width, attention), (2 * ffn, width), (width, ffn))
    layer = sum(matrix_bytes(rows, columns, dtype) for rows, columns in matrices)
    # The new token's own row is read with them; for an int8 cache it comes in float32.
    token, own = (heads * (2 * d + 16), 8 * attention) if kv_dtype == "int8" else (4 * attention, 4 * attention)
    cache = sum(token * (position - PAGE * first) + own for position, first in zip(positions, first_pages, strict=True))
    joined = [MAX_SPLITS if n > MAX_SPLITS // 2 else MAX_SPLITS // 2 for n in splits]  # read, some of them twice
    attended = sum(attention // 8 * (20 * n if apart else 16) for n in joined)
    once_attended = sum(2 * attention * n + 4 * heads * n * apart for n in splits)
    added_to = 2 * 4 * batch * width  # the stream, by o and by down
    per_layer = (
        sum(splits) * heads * (warps * 32 * d + 4 * d)  # each warp reads the queries of its keys
        + active(width) * attended
        + active(2 * ffn) * (squares + row)
        + active(width) * 2 * batch * ffn
        + added_to
    )
    per_layer_once = 8 * batch * attention + once_attended + squares + row + 2 * batch * ffn + added_to
    not_entering = config.cache_slots - config.visits
    entering = (config.visits - 1) * ((blocks + 1) * 8 * batch * width + blocks * warps * squares)
    entering_once = (config.visits - 1) * (8 * batch * width + squares)
    first = (blocks + 1) * batch * (6 * width + 4 * 2 * width // TILE)  # z_init, embedding, the token of each piece
    first_once = 4 * width + batch * (2 * width + 4)
    launch = blocks * (8 * batch + 4 * d * batch + 2 * d * xpos) + 4 * heads * sum(pages)
    launch_once = 4 * batch + 4 * sum(pages) + 4 * d * len(set(positions)) + 2 * d * xpos
    return Traffic(
        weights=config.cache_slots * layer + matrix_bytes(config.vocab_size, width, head_dtype),
        cache=config.cache_slots * cache,
        activations=config.cache_slots * per_layer
        + not_entering * active(4 * attention) * (squares + row)
        + entering
        + first
        + active(config.vocab_size) * (squares + row)
        + launch,
        activations_once=config.cache_slots * per_layer_once
        + not_entering * (squares + row)
        + entering_once
        + first_once
        + squares
        + row
        + launch_once,
    )


def splits_apart(rows: int, pages: int, blocks: int, joined: int) -> bool:
    """Whether the splits of a head lie in blocks of their own: when a block then sees fewer pages one by one.

    `joined` are the groups of 32 pieces that a warp then joins, each in the time of a page or two.
    """
    splits = min(pages, MAX_SPLITS)
    apart = -(-rows * splits // blocks) * -(-pages // splits)
    return apart + (2 if splits > MAX_SPLITS // 2 else 1) * joined < -(-rows // blocks) * pages


def matrix_bytes(rows: int, columns: int, dtype: str) -> int:
    """Bytes of a matrix in fragments."""
    columns_of_item = ITEMS[dtype]
    item = 512 + (0 if dtype == "bfloat16" else 2 * TILE * columns_of_item // GROUP)
    return -(-rows // TILE) * -(-columns // columns_of_item) * item
