"""The bytes that one decode step on CUDA reads, counted from its schedule; tests compare the emulator's count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import GROUP, ITEMS, TILE
from hrmcore.engine.runner import PAGE


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


def traffic(config: HRMConfig, positions: Sequence[int], blocks: int, dtype: str = "bfloat16") -> Traffic:
    """What the kernels of csrc/decode/phases.cuh read for requests with `positions` tokens in the cache.

    `blocks` is the grid, `dtype` that of the weights.
    """
    width, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    attention, requests = config.attention_width, len(positions)
    threads = 256  # of a block
    head_dtype = "int8" if dtype == "int4" else dtype

    def active(rows: int) -> int:
        return min(blocks, -(-rows // TILE))

    layer = sum(
        matrix_bytes(rows, columns, dtype)
        for rows, columns in ((4 * attention, width), (width, attention), (2 * ffn, width), (width, ffn))
    )
    cache = 0  # of one layer, as all that follows
    splits_read = attention_read = attention_once = 0
    xpos = config.position_encoding == "xpos"
    for position in positions:
        window = config.attention_window
        first_page = max(0, (position // window - 1) * window) // PAGE if window else 0
        pages = position // PAGE + 1 - first_page
        kv_splits = min(-(-pages // 4), 4)
        weights_of_splits = 4 * kv_splits if kv_splits > 1 else 0  # of one head
        cache += 4 * attention * (position + 1 - first_page * PAGE)
        attention_read += kv_splits * (8 * attention + 32 * heads * threads * xpos) + 4 * heads * pages * threads // 32
        splits_read += active(width) * attention // 8 * (16 * kv_splits + weights_of_splits)
        attention_once += 8 * attention + 4 * pages + 2 * attention * kv_splits + heads * weights_of_splits
    between = requests * (active(4 * attention) * 2 * width + 8 * attention)
    others = active(2 * ffn) * 2 * width + active(width) * 2 * ffn + 8 * width
    per_layer = between + attention_read + splits_read + requests * others
    per_layer_once = attention_once + 2 * config.head_dim * xpos + 4 * config.head_dim * len(set(positions))
    per_layer_once += requests * (2 * width + 2 * width + 2 * ffn + 8 * width)
    entering = 8 * requests * width  # beyond the bfloat16 copy that every other layer begins with
    entering_read = blocks * requests * 10 * width - requests * active(4 * attention) * 2 * width
    first_entering = requests * (2 * width + 4) + 4 * width - 10 * requests * width
    first_entering_read = blocks * requests * (6 * width + width // 2) - blocks * requests * 10 * width
    positions_read = 8 * requests
    return Traffic(
        weights=config.cache_slots * layer + matrix_bytes(config.vocab_size, width, head_dtype),
        cache=config.cache_slots * cache,
        activations=config.cache_slots * per_layer
        + config.visits * entering_read
        + first_entering_read
        + requests * active(config.vocab_size) * 2 * width
        + blocks * positions_read,
        activations_once=config.cache_slots * per_layer_once
        + config.visits * entering
        + first_entering
        + 2 * requests * width
        + positions_read,
    )


def matrix_bytes(rows: int, columns: int, dtype: str) -> int:
    """Bytes of a matrix in fragments."""
    columns_of_item = ITEMS[dtype]
    item = 512 + (0 if dtype == "bfloat16" else 2 * TILE * columns_of_item // GROUP)
    return -(-rows // TILE) * -(-columns // columns_of_item) * item
