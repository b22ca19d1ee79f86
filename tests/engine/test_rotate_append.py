"""Rotation and the cache in one launch, by the emulator of CUDA: the bits of the ops that it stands for.

Shapes: T tokens, H heads, d head_dim.
"""

from __future__ import annotations

import pytest
import torch
from support.emulator import counters, emulated_cuda, same_bits_for_every_schedule
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.rope import rope, rope_table

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]


def operands(tokens: int, heads: int, head_dim: int, room: int) -> dict[str, Tensor]:
    """Queries, keys and values are views of one projection; the rows of the cache are in no order."""
    torch.manual_seed(tokens)
    _, q, k, v = torch.randn(tokens, 4, heads, head_dim).bfloat16().unbind(1)
    cache = torch.full((2, room, heads, head_dim), 7.0, dtype=torch.bfloat16)
    return {
        "q": q,
        "k": k,
        "v": v,
        "table": rope_table(100, head_dim),
        "positions": torch.randint(0, 100, (tokens,), dtype=torch.int32),
        "rows": torch.randperm(room)[:tokens],
        "q_out": torch.full((tokens, heads, head_dim), torch.nan, dtype=torch.bfloat16),
        "k_out": torch.full((tokens, heads, head_dim), torch.nan, dtype=torch.bfloat16),
        "keys": cache[0],
        "values": cache[1],
    }


def run(given: dict[str, Tensor]) -> None:
    _C.cuda_rotate_append(**{name: to_dlpack(tensor) for name, tensor in given.items()}, stream=0)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 128), (12, 16), (2, 6), (1, 64)])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_bits_are_those_of_the_rotation_and_of_copies(tokens: int, heads: int, head_dim: int) -> None:
    given = operands(tokens, heads, head_dim, 80)
    before = given["keys"].clone()
    counters()
    with emulated_cuda():
        run(given)
        assert counters()["launches"] == 1
        q, k = rope(given["q"], given["k"], given["table"], given["positions"])
    assert torch.equal(given["q_out"], q)
    assert torch.equal(given["k_out"], k)
    assert torch.equal(given["keys"], before.index_copy(0, given["rows"], k))
    assert torch.equal(given["values"], before.index_copy(0, given["rows"], given["v"]))


def test_every_schedule_gives_the_same_bits() -> None:
    given = operands(9, 2, 32, 20)

    def compute() -> list[Tensor]:
        run(given)
        return [given[name].clone() for name in ("q_out", "k_out", "keys", "values")]

    assert same_bits_for_every_schedule(compute)


def test_a_position_that_there_is_not_harms_no_other_token_and_a_row_that_there_is_not_is_left_out() -> None:
    given = operands(4, 2, 16, 20)
    given["rows"].copy_(torch.tensor([3, -1, 20, 7]))
    given["positions"][3] = 100
    with emulated_cuda():
        run(given)
    assert bool(given["keys"][7].isnan().all())
    assert torch.equal(given["keys"][3], given["k_out"][0])
    assert torch.equal(given["values"][7], given["v"][3])
    for cache in ("keys", "values"):
        untouched = [row for row in range(20) if row not in (3, 7)]
        assert bool((given[cache][untouched] == 7).all())
    assert not given["k_out"][:3].isnan().any()


def test_wrong_operands_are_refused() -> None:
    good = operands(3, 2, 16, 5)
    for name, wrong, message in (
        ("q", good["q"].float(), "q must be"),
        ("k", good["k"][:2], "k must"),
        ("v", good["v"].transpose(1, 2), "v must"),
        ("table", good["table"].double(), "table must"),
        ("table", good["table"][:, :8], "table must"),
        ("positions", good["positions"].long(), "positions must"),
        ("rows", good["rows"].int(), "rows must"),
        ("rows", good["rows"][:2], "rows must"),
        ("keys", good["keys"][:, :1], "keys must"),
        ("values", good["values"][:0], "values must be of at least one row, got none"),
    ):
        with emulated_cuda(), pytest.raises(ValueError, match=message):
            run(good | {name: wrong})
    with pytest.raises(ValueError, match="on a CUDA device, got a tensor on the CPU"):
        run(good)
