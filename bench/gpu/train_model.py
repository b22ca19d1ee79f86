"""What a training step on a GPU should take, from its FLOPs and bytes: a prediction, written before a card is asked.

    python -m bench.gpu.train_model      # the table of docs/design/cuda_speed.md

A step is products, attention, passes over memory and launches. Products run at the rate of a large product measured on
the card, small ones below it. Attention pays for each tile of 64 x 64 that it computes: an estimate, for its kernels
have not run. All else moves its bytes at the rate of a copy. The first column of `MEASURED` is the step of 2026-11-27
(docs/results/cuda.md), by which the byte terms are checked: they were not fitted to it.

Letters as in hrmcore/planner.py: D width, A attention width, F ffn width, V vocabulary, K gradient horizon, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu.card import H200
from bench.gpu.report import table
from hrmcore import planner
from hrmcore.config import HRMConfig

SMALL = HRMConfig(
    vocab_size=290,
    hidden_size=192,
    intermediate_size=512,
    num_layers_per_stack=2,
    num_attention_heads=3,
    head_dim=64,
    max_position_embeddings=512,
)


@dataclass(frozen=True)
class Card(H200):
    """And what is assumed of it for training."""

    # Assumed, of attention's predicted times in docs/design/cuda_speed.md: seconds of a processor for a tile of 64 x 64
    # at head_dim 128 (0.11 and 0.37 ms for 55 sequences of mean 297), and for a block, of which it holds two, at least.
    tile_forward: float = 0.90e-6
    tile_backward: float = 3.0e-6
    block_forward: float = 4e-6
    block_backward: float = 10e-6  # of both kernels
    kernel: float = 2e-6  # assumed: no kernel of a graph takes less
    thin: float = 0.5  # assumed: share of `product` that a product of an inner size of 192 reaches
    host: float = 2.5e-3  # assumed: what the host does between two replayed steps; filling up a batch alone takes 0.9
    to_host: float = 50e9  # assumed: bytes/s to page-locked main memory (PCIe 5, 16 lanes: 63 at most)
    to_pageable: float = 6e9  # assumed: to any other, by way of a staging buffer
    float8: float = 1.8  # assumed: a product in float8 beside one in bfloat16, 2 on the data sheet


@dataclass(frozen=True)
class Work:
    """One packed batch: lengths of its sequences, and which share of each is the instruction, read both ways."""

    lengths: tuple[int, ...]
    prefix: float = 0.5

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def supervised(self) -> int:
        return sum(n - int(n * self.prefix) for n in self.lengths)

    @property
    def tiles(self) -> int:
        """Tiles of 64 queries x 64 keys that a head computes."""
        return sum(
            -(-max(int(n * self.prefix), min(first + 64, n)) // 64) for n in self.lengths for first in range(0, n, 64)
        )


def attention_seconds(config: HRMConfig, work: Work, tile: float, block: float, card: Card) -> float:
    """Of one call: its tiles, or its blocks where those are short."""
    heads = config.num_attention_heads / card.processors
    blocks = sum(-(-n // 64) for n in work.lengths)
    return max(heads * work.tiles * tile * config.head_dim / 128, heads * blocks * block / 2)


def passes(config: HRMConfig, horizon: int) -> tuple[int, int]:
    """Layers that a token passes, and those of them that carry gradient."""
    counts = planner.backward_visits(config, horizon)
    return config.cache_slots, sum(n * depth for n, depth in zip(counts, config.depths, strict=True))


def predict(config: HRMConfig, work: Work, horizon: int, card: Card = Card(), graph: bool = False) -> dict[str, float]:
    """Milliseconds of a step by part, AdamAtan2 with an average. Of a `graph` no kernel is shorter than its least."""
    forward, backward = passes(config, horizon)
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    flops = planner.training_flops(config, horizon, work.tokens, work.supervised)
    logits = 2.0 * work.supervised * config.vocab_size * width  # computed again in backward
    rate = card.product * (card.thin if width < 512 else 1.0)
    parameters = planner.parameters(config)
    stacks = parameters - 2 * config.vocab_size * width
    token_bytes = {
        "norms": forward * 8 * width + backward * 12 * width,
        "swiglu": forward * 3 * ffn + backward * 6 * ffn,
        "rotation": forward * 4 * attention,
    }
    chunks = -(-work.supervised // 2048)
    seconds = {
        "products": (flops.stacks + flops.head + logits) / rate,
        "attention forward": forward * attention_seconds(config, work, card.tile_forward, card.block_forward, card),
        "attention backward": backward * attention_seconds(config, work, card.tile_backward, card.block_backward, card),
        **{name: 2 * work.tokens * count / card.copy for name, count in token_bytes.items()},
        # of q and of k, cosines and sines for each head: as if none of it were hidden behind products
        "rotated back": backward * 8.0 * work.tokens * attention / card.second_level,
        # logits are written and read twice, their gradient written and read twice, and the head's sum for each chunk
        "cross-entropy": (16.0 * work.supervised * config.vocab_size + 8.0 * chunks * config.vocab_size * width)
        / card.copy,
        "weights rounded": 6 * stacks / card.copy,
        # a product that adds reads what it writes: as if none of it were hidden
        "gradients summed": 4 * (backward * planner.layer_weights(config) - stacks) / card.copy,
        "optimizer": (28 + 8 + 4) * parameters / card.copy,  # the norm reads each gradient once
    }
    if graph:
        kernels = {"norms": 2 * forward + 4 * backward, "swiglu": forward + backward, "rotation": forward}
        for name, count in kernels.items():
            seconds[name] = max(seconds[name], count * card.kernel)
        seconds["products"] = max(seconds["products"], (4 * forward + 8 * backward) * card.kernel)
        seconds["between steps"] = card.host
    return {name: 1e3 * s for name, s in seconds.items()}


def before(config: HRMConfig, work: Work, horizon: int, card: Card = Card()) -> dict[str, float]:
    """The terms of the step of 2026-11-27, which rounded and added at every visit, and for every 128 rows of logits."""
    found = predict(config, work, horizon, card)
    forward, backward = passes(config, horizon)
    weights = planner.layer_weights(config)
    kept = {name: found[name] for name in ("products", "norms", "swiglu")}
    kept["rotation"] = found["rotation"] * (forward + backward) / forward  # backward had launches of its own
    head = -(-work.supervised // 128) * config.vocab_size * config.hidden_size
    # each matrix for each pass over it, and each product that is a gradient, made float32
    rounded = 6 * ((forward + 2 * backward) * weights + head) / card.copy
    stacks = planner.parameters(config) - 2 * config.vocab_size * config.hidden_size
    added = 12 * (backward * weights - stacks + head) / card.copy
    return kept | {"weights rounded": 1e3 * rounded, "gradients added": 1e3 * added}


def with_float8(config: HRMConfig, work: Work, horizon: int, card: Card = Card()) -> dict[str, float]:
    """`predict`, were the blocks' forward products and those of their inputs' gradients in float8, scales by row.

    Gradients of weights and the head stay in bfloat16. Each operand's row is read once, in bfloat16, and written.
    """
    forward, backward = passes(config, horizon)
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    parts = predict(config, work, horizon, card)
    flops = 2.0 * work.tokens * (forward + backward) * planner.layer_weights(config)
    parts["products"] -= 1e3 * flops / card.product * (1 - 1 / card.float8)
    elements = forward * (2 * width + attention + ffn) + backward * (2 * width + 4 * attention + 2 * ffn)
    parts["rounded to float8"] = 1e3 * 3.0 * work.tokens * elements / card.copy
    return parts


def state_seconds(config: HRMConfig, work: Work, horizon: int, card: Card = Card()) -> tuple[float, float]:
    """What a training state with an average costs a run: copied in its way, and beside the next step.

    There the update alone waits, for what forward and backward leave of the copy's time.
    """
    size = 16.0 * planner.parameters(config)
    parts = predict(config, work, horizon, card)
    beside = 1e-3 * (sum(parts.values()) - parts["optimizer"])
    return size / card.to_pageable, max(0.0, size / card.to_host - beside)


# GPU milliseconds at the 1B shape, K = 5, 16,335 tokens of mean 297; "gradients added" as the profiler named it.
MEASURED = {
    "products": 391.0,
    "norms": 30.0,
    "swiglu": 29.0,
    "rotation": 11.0,
    "weights rounded": 28.0,
    "gradients added": 28.0,
}


def mix(tokens: int = 16_335, mean: int = 297) -> Work:
    """Lengths from a third of the mean to some three times it, as `packed_lengths` draws them."""
    import torch

    from bench.gpu.checks import packed_lengths

    return Work(tuple(packed_lengths(tokens // mean, mean, torch.Generator().manual_seed(8))))


def tokens_a_second(parts: dict[str, float], work: Work) -> float:
    return 1e3 * work.tokens / sum(parts.values())


def share(config: HRMConfig, work: Work, horizon: int, parts: dict[str, float], card: Card = Card()) -> float:
    """Of the measured product's FLOP/s, by the model's FLOPs."""
    records = [planner.Record(n // 2, n - n // 2) for n in work.lengths]
    pairs = sum(record.pairs * n for record, n in zip(records, work.lengths, strict=True))
    flops = planner.training_flops(config, horizon, work.tokens, work.supervised, pairs).total
    return flops / (1e-3 * sum(parts.values())) / card.product


GOALS = {("XL", 5): 28_500, ("XL", 2): 41_000, ("small", 5): 3_000_000, ("small", 2): 3_000_000}


def rows() -> Sequence[list[str]]:
    cases = [
        ("XL", HRMConfig.preset("XL"), mix(), 5, False),
        ("XL", HRMConfig.preset("XL"), mix(), 2, False),
        ("small", SMALL, Work((35,) * 936), 5, True),
        ("small", SMALL, Work((35,) * 936), 2, True),
    ]
    found = []
    for name, config, work, horizon, graph in cases:
        parts = predict(config, work, horizon, graph=graph)
        speed = tokens_a_second(parts, work)
        found.append(
            [
                f"{name}, K = {horizon}",
                f"{sum(parts.values()):.1f}",
                f"{speed:,.0f}",
                f"{GOALS[name, horizon]:,}",
                f"{share(config, work, horizon, parts):.0%}",
                ", ".join(f"{part} {ms:.1f}" for part, ms in sorted(parts.items(), key=lambda p: -p[1])),
            ]
        )
    return found


def next_experiments() -> Sequence[list[str]]:
    """What is not shipped, or costs a run besides its steps."""
    config, work, found = HRMConfig.preset("XL"), mix(), []
    for horizon in (5, 2):
        parts, float8 = predict(config, work, horizon), with_float8(config, work, horizon)
        blocking, beside = state_seconds(config, work, horizon)
        found.append(
            [
                f"XL, K = {horizon}",
                f"{sum(parts.values()):.0f}, of which products {parts['products']:.0f}",
                f"{sum(float8.values()):.0f}, of which products {float8['products']:.0f}",
                f"{blocking:.1f}",
                f"{beside:.2f}",
            ]
        )
    return found


def main() -> None:
    checked = before(HRMConfig.preset("XL"), mix(), 5)
    print(
        table(
            ["milliseconds, K = 5, 2026-11-27", "measured", "modelled"],
            [[name, f"{ms:.0f}", f"{checked[name]:.1f}"] for name, ms in MEASURED.items()],
        )
    )
    print()
    print(table(["", "ms", "tok/s", "goal", "of the product's peak", "parts, ms"], list(rows())))
    print()
    print(table(["", "bfloat16, ms", "float8, ms", "a state, s", "beside a step, s"], list(next_experiments())))


if __name__ == "__main__":
    main()
