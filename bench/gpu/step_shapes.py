"""What a block of the fused decode step has to do in each phase, by count: tiles, stages, tasks, bytes.

Computed as csrc/decode/schedule.h and decode_step.cu do (and, with `old`, as they did at commit 8d63661), at any shape;
tests/support/traffic.py counts the same step's bytes, which the emulator confirms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from bench.gpu.card import H200
from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import GROUP, ITEMS, TILE
from hrmcore.engine.runner import PAGE

WARPS, PARTIAL_SLOTS, MOST_SPLITS = 8, 4, 8
COLUMNS, MOST_REQUESTS = 8, 32  # requests of a product of the tensor cores, and of a step
SHARED_BYTES = 227 << 10  # of a block, on sm_90
STAGE_ITEMS = {"bfloat16": 4, "int8": 6, "int4": 3}  # at most
PAGE_STAGE = 2048  # bytes: of 8 rows of a page
INT8_PAGE_STAGE = 2176  # of an int8 cache: keys, values and scales
DEPTHS = {  # of the rings, in stages, by the weights and the cache: of one request, of up to 8, on small cards
    ("bfloat16", "bfloat16"): (11, 7, 3),
    ("int8", "bfloat16"): (7, 5, 2),
    ("int4", "bfloat16"): (12, 8, 4),
    ("bfloat16", "int8"): (10, 7, 3),
    ("int8", "int8"): (7, 5, 2),
    ("int4", "int8"): (10, 8, 3),
}
STREAMING_DEPTHS = {  # where activations stream: of up to 8, up to 16 and up to 32
    ("bfloat16", "bfloat16"): {1: 11, 2: 9, 4: 6},
    ("int8", "bfloat16"): {1: 7, 2: 6, 4: 4},
    ("int4", "bfloat16"): {1: 11, 2: 9, 4: 6},
    ("bfloat16", "int8"): {1: 10, 2: 8, 4: 5},
    ("int8", "int8"): {1: 7, 2: 5, 4: 3},
    ("int4", "int8"): {1: 10, 2: 8, 4: 5},
}
PRODUCT_PHASES = ("gqkv", "o", "gate_up", "down", "head")


def kernel_name(dtype: str, most: int, kv_dtype: str = "bfloat16") -> str:
    """Of the kernel for up to so many requests: 1, 8, 16 or 32."""
    requests = f", {most} request{'s' if most > 1 else ''}"
    return dtype + requests + (", int8 cache" if kv_dtype == "int8" else "")


def window(dtype: str, groups: int) -> int:
    """How many 16s of columns of activations a lane has asked for ahead of its products, for `groups` of 8 requests."""
    return 2 if groups > 2 else 8 if dtype == "bfloat16" else 12 if groups == 1 else 6


@dataclass(frozen=True)
class Matrix:
    """A matrix in fragments."""

    rows: int
    columns: int
    dtype: str

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE)

    @property
    def item_bytes(self) -> int:
        return 512 + (0 if self.dtype == "bfloat16" else 2 * TILE * ITEMS[self.dtype] // GROUP)

    @property
    def warp_items(self) -> int:
        """Of a tile, in the warps that have most."""
        return -(-self.columns // (ITEMS[self.dtype] * WARPS))

    @property
    def stages(self) -> int:
        return -(-self.warp_items // STAGE_ITEMS[self.dtype])

    @property
    def bytes(self) -> int:
        return self.tiles * -(-self.columns // ITEMS[self.dtype]) * self.item_bytes


@dataclass(frozen=True)
class Layout:
    """Of a kernel's shared memory: stages of a warp's ring, for how many tiles of 8 requests there are partial sums, of
    how many columns of a warp there is room for the activations, and whether these stream."""

    stages: int
    slots: int
    columns: int
    streaming: bool


@dataclass(frozen=True)
class Case:
    """One step: a model, weights in a dtype, requests that each have `cached` tokens, a grid, the cache's dtype."""

    config: HRMConfig
    dtype: str
    batch: int
    cached: int
    blocks: int = H200.processors
    kv_dtype: str = "bfloat16"

    def matrix(self, phase: str) -> Matrix:
        c = self.config
        rows, columns = {
            "gqkv": (4 * c.attention_width, c.hidden_size),
            "o": (c.hidden_size, c.attention_width),
            "gate_up": (2 * c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
            "head": (c.vocab_size, c.hidden_size),
        }[phase]
        return Matrix(rows, columns, "int8" if phase == "head" and self.dtype == "int4" else self.dtype)

    @property
    def pages(self) -> int:
        """That a request's new token sees."""
        return self.cached // PAGE + 1

    @property
    def cache_bytes(self) -> int:
        """Keys and values of earlier tokens, of one layer."""
        d = self.config.head_dim
        return self.batch * self.cached * self.config.num_attention_heads * (2 * d + 16 if self.int8_cache else 4 * d)

    @property
    def int8_cache(self) -> bool:
        return self.kv_dtype == "int8"

    @property
    def bytes(self) -> int:
        """What must come from memory: every weight once a visit, the visible keys and values once."""
        layer = sum(self.matrix(phase).bytes for phase in PRODUCT_PHASES[:-1]) + self.cache_bytes
        return self.config.cache_slots * layer + self.matrix("head").bytes

    def tiles_of_block(self, phase: str) -> int:
        """In the blocks that have most."""
        return -(-self.matrix(phase).tiles // self.blocks)

    def blocks_with_work(self, phase: str) -> int:
        if phase == "attention":
            apart = self.splits_apart
            return min(self.blocks, self.heads_of_all * (min(self.pages, MOST_SPLITS) if apart else 1))
        return min(self.blocks, self.matrix(phase).tiles)

    # Groups of requests

    @property
    def column_groups(self) -> int:
        """Of 8 requests, that one read of a weight is multiplied with."""
        return 1 if self.batch <= COLUMNS else 2 if self.batch <= 2 * COLUMNS else 4

    @property
    def rows(self) -> int:
        """Of activations, of which some are no request's where they stream."""
        return COLUMNS * self.column_groups if self.layout.streaming else self.batch

    @property
    def kernel(self) -> str:
        """Its name among the counts, which are those of cards with much shared memory."""
        if not self.layout.streaming and (self.batch > 1 or self.ring_stages() < DEPTHS[self.dtype, self.kv_dtype][0]):
            raise ValueError("a kernel of cards with little shared memory: it has no counts")
        return kernel_name(self.dtype, COLUMNS * self.column_groups if self.layout.streaming else 1, self.kv_dtype)

    def columns_of_warp(self, phase: str) -> int:
        matrix = self.matrix(phase)
        return matrix.warp_items * ITEMS[matrix.dtype]

    @property
    def held_columns(self) -> int:
        """Of how many columns a warp has room for the activations."""
        return self.layout.columns

    def sixteens(self, phase: str) -> int:
        """Of a warp's columns."""
        return -(-self.matrix(phase).columns // 16 // WARPS)

    def streams(self, phase: str) -> bool:
        """Whether activations stream from the second-level cache into registers beside the products."""
        return self.layout.streaming and not (phase == "o" and self.splits_apart)

    def parts(self, phase: str) -> list[int]:
        """The 16s of columns that a warp brings to shared memory at once, and then multiplies."""
        sixteens, held = self.sixteens(phase), self.held_columns // 16
        if self.columns_of_warp(phase) > self.held_columns:
            stage = STAGE_ITEMS[self.dtype] * ITEMS[self.dtype] // 16
            held = held // stage * stage
        return [min(held, sixteens - first) for first in range(0, sixteens, held)]

    def times_brought(self, phase: str) -> int:
        """How often a block brings them: for each of its tiles where they have no room at once."""
        return 1 if self.columns_of_warp(phase) <= self.held_columns else self.tiles_of_block(phase)

    # Attention

    @property
    def heads_of_all(self) -> int:
        return self.batch * self.config.num_attention_heads

    def pages_of_block(self, apart: bool) -> int:
        splits = min(self.pages, MOST_SPLITS) if apart else 1
        return -(-self.heads_of_all * splits // self.blocks) * -(-self.pages // splits)

    @property
    def splits_apart(self) -> bool:
        turns = -(-self.batch * self.columns_of_warp("o") // 8 // 32)  # of a warp that joins
        joining = (2 if self.pages > MOST_SPLITS // 2 else 1) * turns
        return self.pages_of_block(True) + joining < self.pages_of_block(False)

    @property
    def tasks_of_block(self) -> int:
        splits = min(self.pages, MOST_SPLITS) if self.splits_apart else 1
        return -(-self.heads_of_all * splits // self.blocks)

    # Shared memory

    def ring_stages(self) -> int:
        """How many stages a warp's ring has."""
        return self.layout.stages

    def tiles_together(self) -> int:
        return PARTIAL_SLOTS // self.column_groups if self.layout.slots == PARTIAL_SLOTS else 1

    @cached_property
    def layout(self) -> Layout:
        """The first of a step's kernels that there is room for, as `choose` in csrc/decode/decode_step.cu finds it."""
        of_width = max(
            self.columns_of_warp("gqkv"), self.columns_of_warp("head"), STAGE_ITEMS[self.dtype] * ITEMS[self.dtype]
        )
        whole = max(of_width, self.columns_of_warp("o"), self.columns_of_warp("down"))
        deep, middle, shallow = DEPTHS[self.dtype, self.kv_dtype]
        streaming = STREAMING_DEPTHS[self.dtype, self.kv_dtype][self.column_groups]
        if self.column_groups > 1:
            tried = [Layout(streaming, PARTIAL_SLOTS, of_width, True)]
            if not self.int8_cache:
                tried.append(Layout(shallow, PARTIAL_SLOTS, of_width, True))
        else:
            one = Layout(deep, PARTIAL_SLOTS, whole, False)
            few = Layout(streaming, PARTIAL_SLOTS, of_width, True)
            tried = [one if self.batch == 1 else few, Layout(middle, PARTIAL_SLOTS, whole, False)]
            tried.append(Layout(shallow, 1, whole, False))
        found = next((layout for layout in tried if self.shared_bytes(layout) <= SHARED_BYTES), None)
        if found is None:
            raise ValueError("the step's activations do not fit in shared memory")
        return found

    def shared_bytes(self, layout: Layout) -> int:
        """Of a block, its rings last."""
        d = self.config.head_dim
        exchange = 4 * (2 * WARPS * (d + 2) + 2 * MOST_SPLITS * d)
        partials = max(layout.slots * WARPS * TILE * COLUMNS * 4, exchange)
        pages = 32 * self.pages_of_block(self.splits_apart)
        state = -(-(24 * MOST_REQUESTS + 8 + 4 * WARPS * MOST_REQUESTS) // 128) * 128
        angles = 4 * self.batch * d if self.column_groups == 1 else 0
        rows = COLUMNS * self.column_groups if layout.streaming else self.batch
        activations = 2 * WARPS * layout.columns * rows
        page = INT8_PAGE_STAGE if self.int8_cache else PAGE_STAGE
        rings = layout.stages * WARPS * max(page, STAGE_ITEMS[self.dtype] * self.matrix("gqkv").item_bytes)
        parts = (state + angles + 2 * d, pages, partials, activations)
        return sum(-(-part // 128) * 128 for part in parts) + rings

    # The step before

    def old_splits(self) -> int:
        return min(-(-self.pages // 4), 4)

    def old_tasks_of_block(self) -> int:
        """A task's split was its fastest index of 4, so that short caches met every fourth block."""
        tasks = Counter(
            (4 * row + split) % self.blocks for row in range(self.heads_of_all) for split in range(self.old_splits())
        )
        return max(tasks.values())


class SpreadCase(Case):
    """The step before with a change that was tried on the card: a split for each page, at most 4, over all blocks."""

    def old_splits(self) -> int:
        return min(self.pages, 4)

    def old_tasks_of_block(self) -> int:
        return -(-self.heads_of_all * self.old_splits() // self.blocks)
