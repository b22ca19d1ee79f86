"""How long a captured prefill takes on a GPU, predicted from bytes, FLOPs, instructions and launches.

    python -m bench.gpu.prefill_model      # the table of docs/design/cuda_speed.md

A layer is a chain of kernels in a graph: each takes a launch and the largest of what binds it. Torch's products are
tiles at the rate of a large one; those of packed weights (csrc/decode/packed_product.h) are bound by mma.sync, by
instructions, by what their blocks ask of the second-level cache, or by memory. Nothing here has been measured or
fitted: `Card` says where each number is from.

Letters: T tokens, R rows and K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench.gpu.card import H200
from bench.gpu.report import table
from bench.gpu.train_model import Card as TrainCard
from bench.gpu.train_model import Work, attention_seconds
from hrmcore.config import HRMConfig

GOALS = {256: 9.0, 1024: 16.0}  # milliseconds of a first token at the 1B shape on an H200
WEIGHT_BYTES = {"bfloat16": 2.0, "int8": 1.0625, "int4": 0.5625}  # with the scales


@dataclass(frozen=True)
class Card(H200):
    """And what is assumed of it for a prefill."""

    mma: float = 0.62 * 989e12  # FLOP/s of mma.sync, as for attention
    clock: float = 1.755e9
    met: float = 0.85  # how much of its bound a product of packed weights reaches


class Tile(NamedTuple):
    """A block of csrc/decode/packed_product.cu: rows of weights, tokens, and what a scheduler issues for 16 columns."""

    rows: int
    tokens: int
    instructions: dict[str, float]


# Instructions of 16 columns: a turn of the sm_90 code's loop, counted (bench/gpu/sass.py), over its four 16 columns.
# There is no such kernel of bfloat16 weights: they are left out.
TILES = (
    Tile(256, 128, {"int8": 208.5, "int4": 174.5}),  # two warps a scheduler
    Tile(256, 64, {"int8": 146.3, "int4": 112.3}),
    Tile(128, 128, {"int8": 104.3, "int4": 87.8}),
    Tile(128, 64, {"int8": 80.3, "int4": 62.3}),
    Tile(64, 64, {"int8": 46.0, "int4": 37.8}),
)


def tile_of(rows: int, tokens: int, dtype: str, card: Card = Card()) -> Tile:
    """The shape that the kernel takes, by the same rule: whose products or reads of the cache take the least."""

    def cost(tile: Tile) -> float:
        found = bounds(tile, rows, 1, tokens, dtype, card)
        return max(found["mma"], found["cache"])

    return min(TILES, key=cost)


def packed_product(rows: int, columns: int, tokens: int, dtype: str, card: Card = Card()) -> dict[str, float]:
    """Seconds of each bound of one product, results written through the cache included."""
    found = bounds(tile_of(rows, tokens, dtype, card), rows, columns, tokens, dtype, card)
    return found | {"cache": found["cache"] + 2 * rows * tokens / card.second_level}


def bounds(tile: Tile, rows: int, columns: int, tokens: int, dtype: str, card: Card) -> dict[str, float]:
    blocks = -(-rows // tile.rows) * -(-tokens // tile.tokens)
    turns = -(-blocks // card.processors)  # of the busiest multiprocessor
    weight = WEIGHT_BYTES[dtype]
    return {
        "mma": turns * 2 * tile.rows * tile.tokens * columns / (card.mma / card.processors),
        "instructions": turns * tile.instructions.get(dtype, 0.0) * columns / 16 / card.clock,  # a warp a scheduler
        "cache": blocks * columns * (tile.tokens * 2 + tile.rows * weight) / card.second_level,
        "memory": rows * columns * weight / card.copy,
    }


def torch_product(rows: int, columns: int, tokens: int, card: Card = Card()) -> float:
    """Seconds of a bfloat16 product: tiles of 128 x 128 or half of one, in whole turns."""

    def turns(height: int) -> int:
        return -(-(-(-rows // height) * -(-tokens // 128)) // card.processors)

    one = 2 * 128 * 128 * columns / (card.product / card.processors)
    return max(min(turns(128), turns(64) / 2) * one, rows * columns * 2 / card.copy)


def unpacked(rows: int, columns: int, dtype: str, card: Card = Card()) -> float:
    """Seconds of writing a matrix as bfloat16 for torch's product: from memory and to memory."""
    return card.launch + rows * columns * (2 + WEIGHT_BYTES[dtype]) / card.copy


def matrices(config: HRMConfig) -> dict[str, tuple[int, int]]:
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    return {
        "gqkv": (4 * attention, width),
        "o": (width, attention),
        "gate_up": (2 * ffn, width),
        "down": (width, ffn),
    }


def attention(config: HRMConfig, tokens: int) -> float:
    """Seconds of attention over a prompt, all of which is a prefix: every tile of 64 queries sees all keys."""
    work = Work((tokens,), prefix=1.0)
    return attention_seconds(config, work, TrainCard.tile_forward, TrainCard.block_forward, TrainCard())


def passed(elements: float, tokens: int, card: Card) -> float:
    """Seconds of reading and writing so many bfloat16 of each token, through the second-level cache."""
    return 2 * elements * tokens / card.second_level


def passes(config: HRMConfig, tokens: int, rotations: int, fused: bool, card: Card = Card()) -> dict[str, float]:
    """Seconds of a layer's other kernels without their launches; SwiGLU where it is one."""
    width, attended, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    return {
        "attention": attention(config, tokens),
        "norms": passed(2 * 4 * width, tokens, card),
        "rotation": passed((7 if rotations == 1 else 8) * attended, tokens, card),
        "SwiGLU": 0.0 if fused else passed(3 * ffn, tokens, card),
        "launches": (3 + rotations + (0 if fused else 1)) * card.launch,
    }


def first_token(config: HRMConfig, tokens: int, way: str, dtype: str, rotations: int, card: Card = Card()) -> float:
    """Milliseconds of a prefill's layers and head; `way` is torch, unpacked or packed."""
    products: dict[str, Callable[[int, int], float]] = {
        "torch": lambda rows, columns: card.launch + torch_product(rows, columns, tokens, card),
        "unpacked": lambda rows, columns: (
            card.launch + torch_product(rows, columns, tokens, card) + unpacked(rows, columns, dtype, card)
        ),
        "packed": lambda rows, columns: (
            card.launch + max(packed_product(rows, columns, tokens, dtype, card).values()) / card.met
        ),
    }
    layer = sum(products[way](*shape) for shape in matrices(config).values())
    layer += sum(passes(config, tokens, rotations, way == "packed", card).values())
    # the last layer's o and MLP are for the last token alone: they take their weights' time
    spared = sum(
        products[way](*shape) - card.launch - shape[0] * shape[1] * WEIGHT_BYTES[dtype] / card.copy
        for name, shape in matrices(config).items()
        if name != "gqkv"
    )
    head = config.vocab_size * config.hidden_size * 2 / card.copy + card.launch
    return 1e3 * (config.cache_slots * layer - max(0.0, spared) + head)


def layer_of(config: HRMConfig, tokens: int, card: Card = Card()) -> dict[str, float]:
    """Seconds of each part of a layer in bfloat16, torch's products without their launches."""
    products = {name: torch_product(*shape, tokens, card) for name, shape in matrices(config).items()}
    others = passes(config, tokens, 1, False, card)
    others["launches"] += len(products) * card.launch
    return products | others


def savings(config: HRMConfig, tokens: int, card: Card = Card()) -> dict[str, float]:
    """What a layer in bfloat16 could save with torch's products, seconds. The last two do not go together.

    The norm has no gain: a product of its input, scaled by row afterwards, is a product of its output.
    """
    width, attended = config.hidden_size, config.attention_width
    norm = card.launch + passed(4 * width, tokens, card)  # reads two and writes two
    pieces, (rows, columns) = 4, matrices(config)["down"]
    # each piece a product of its own in the same launch, in turns of a quarter; written, and read by the norm
    whole, cut = (torch_product(n * rows, columns // n, tokens, card) for n in (1, pieces))
    return {
        "o adds the residual, SwiGLU scales": norm - passed(2 * width, tokens, card),
        "queries rotated by attention": passed(2 * attended, tokens, card),
        "down adds the residual, rotation and attention scale": norm - passed(2 * width + attended, tokens, card),
        "down in four pieces of its columns, the norm adds them": (
            whole - cut - passed(2 * (pieces - 1) * width, tokens, card)
        ),
    }


def main() -> None:
    config = HRMConfig.preset("XL")
    cases = [
        ("bfloat16, torch's products, three launches to rotate and append", "torch", "bfloat16", 3),
        ("bfloat16, one launch to rotate and append", "torch", "bfloat16", 1),
        *((f"{dtype}, unpacked for torch's products", "unpacked", dtype, 1) for dtype in WEIGHT_BYTES),
        *((f"{dtype}, products of packed weights", "packed", dtype, 1) for dtype in WEIGHT_BYTES),
    ]
    rows = [
        [name, *(f"{first_token(config, n, way, dtype, rotations):.1f}" for n in (64, 256, 1024, 2048))]
        for name, way, dtype, rotations in cases
    ]
    goals = [f"{GOALS[n]:g}" if n in GOALS else "" for n in (64, 256, 1024, 2048)]
    print(table(["first token, ms", "64", "256", "1,024", "2,048"], [*rows, ["goal", *goals]]))
    print()
    of_products = [
        [f"{dtype}, {tokens:,} tokens, {name}", *(f"{1e6 * s:.1f}" for s in found.values())]
        for dtype in ("int8", "int4")
        for tokens in (256, 1024)
        for name, shape in matrices(config).items()
        for found in [packed_product(*shape, tokens, dtype)]
    ]
    parts = {n: layer_of(config, n) for n in (256, 1024)}
    rows = [[name, *(f"{1e6 * parts[n][name]:.1f}" for n in parts)] for name in parts[256]]
    print(table(["us of a layer in bfloat16", *map(str, parts)], rows))
    print()
    saved = {n: savings(config, n) for n in parts}
    rows = [[name, *(f"{1e3 * config.cache_slots * saved[n][name]:.2f}" for n in saved)] for name in saved[256]]
    print(table(["ms of a first token that could be saved", *map(str, saved)], rows))
    print()
    print(table(["us of a product's bounds", "mma", "instructions", "cache", "memory"], of_products))


if __name__ == "__main__":
    main()
