"""The prefill's model: the shapes that the kernel takes, and its arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.emulator import counters, emulated_cuda

from bench.gpu import prefill_model
from bench.gpu.prefill_model import TILES, Card
from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import in_fragments
from hrmcore.engine.packed_model import PackedMatrix


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_model_and_the_kernel_choose_the_same_blocks(dtype: str) -> None:
    """By the barriers: two stages a block. Of some sizes the shapes have as many blocks each."""
    chosen = set()
    for rows, tokens in ((250, 250), (120, 250), (400, 60)):
        matrix = PackedMatrix(in_fragments(torch.zeros(rows, 80), dtype).flatten(), rows, 0, dtype)
        for processors in (1, 2, 4, 8, 1000):
            card = Card(processors=processors, mma=Card().mma * processors / Card().processors)
            tile = prefill_model.tile_of(rows, tokens, dtype, card)
            counters()
            with emulated_cuda():
                matrix.multiply(torch.zeros(tokens, 80, dtype=torch.bfloat16), processors=processors)
            blocks = -(-rows // tile.rows) * -(-tokens // tile.tokens)
            assert counters()["block_barriers"] == 2 * blocks, (rows, tokens, processors, tile)
            chosen.add(tile[:2])
    assert chosen == {tile[:2] for tile in TILES}


def test_bounds_are_those_of_a_sum_by_hand() -> None:
    card = dataclasses.replace(Card(), processors=2, mma=2e6, clock=1e6, second_level=1e6, copy=1e6)
    # 128 rows and 192 tokens of 32 columns: three blocks of 128 x 64 on two processors, two turns of the busier
    found = prefill_model.bounds(TILES[3], 128, 32, 192, "int8", card)
    assert found["mma"] == pytest.approx(2 * 2 * 128 * 64 * 32 / 1e6)
    assert found["instructions"] == pytest.approx(2 * TILES[3].instructions["int8"] * 2 / 1e6)
    assert found["cache"] == pytest.approx(3 * 32 * (2 * 64 + 128 * 17 / 16) / 1e6)
    assert found["memory"] == pytest.approx(128 * 32 * 17 / 16 / 1e6)


def test_a_longer_prompt_and_more_launches_take_longer() -> None:
    config = HRMConfig.preset("XL")
    for way, dtype in (("torch", "bfloat16"), ("unpacked", "int8"), ("packed", "int4")):
        times = [prefill_model.first_token(config, n, way, dtype, 1) for n in (64, 256, 1024, 2048)]
        assert times == sorted(times)
        launches = prefill_model.first_token(config, 256, way, dtype, 3) - times[1]
        # two launches more, and keys are read a second time
        more = 2 * Card().launch + 2 * config.attention_width * 256 / Card().second_level
        assert launches == pytest.approx(1e3 * config.cache_slots * more)


def test_a_layer_s_parts_by_hand() -> None:
    """The 1B shape: 12 heads of 128, width 1,536, F = 4,096; 1,024 tokens that all see each other."""
    config, card = HRMConfig.preset("XL"), Card()
    parts = prefill_model.layer_of(config, 1024)
    assert parts["attention"] == pytest.approx(12 * 16 * 16 * 0.90e-6 / 132)  # tiles of 64 x 64, a head
    assert parts["norms"] == pytest.approx(2 * 4 * 1536 * 2 * 1024 / card.second_level)
    assert parts["launches"] == pytest.approx(9 * card.launch)
    # 96 blocks of 128 x 128 for 132 multiprocessors are one turn; in four pieces 384 quarters of one are three
    assert parts["down"] == pytest.approx(2 * 128 * 128 * 4096 * 132 / card.product)
    saved = list(prefill_model.savings(config, 1024).values())
    assert saved[3] == pytest.approx(parts["down"] / 4 - 2 * 3 * 1536 * 2 * 1024 / card.second_level)
    whole = 1e3 * (config.cache_slots * sum(parts.values()) + 65536 * 1536 * 2 / card.copy + card.launch)
    found = prefill_model.first_token(config, 1024, "torch", "bfloat16", 1)
    assert 0 < whole - found < 1e3 * sum(parts[name] for name in ("o", "gate_up", "down"))
