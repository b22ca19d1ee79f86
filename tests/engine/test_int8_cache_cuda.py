"""The int8 cache on CUDA, by the emulator: what is stored, the decode step over it, and the engine with it.

Shapes: B requests, T tokens, H heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_cuda_step import SHAPES, TOLERANCE, random_model
from support.emulator import counters, device_with, emulated_cuda, same_bits_for_every_schedule, seeded
from support.engines import distance
from support.traffic import traffic
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.cuda_cache import Int8Page, from_int8, store_int8
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.runner import PAGE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.ops.rope import rope, rope_table

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]


# What is stored


def some_cache(pages: int, heads: int, head_dim: int) -> Tensor:
    """One slot's pages, of noise."""
    return torch.randint(0, 256, (pages, heads, Int8Page(head_dim).bytes), dtype=torch.uint8)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_what_is_stored_lies_within_half_a_step(head_dim: int) -> None:
    """By the definition: a step is the largest of 32 channels of a key, or of all of a value, over 127."""
    torch.manual_seed(0)
    pages, rows = some_cache(3, 2, head_dim), torch.randperm(3 * PAGE)[:50]
    k, v = torch.randn(2, 50, 2, head_dim) * torch.logspace(-3, 3, 50)[:, None, None]
    k[7], v[7] = 0, 0
    k[8, 0, 3] = 1e-35  # the only one of its scale that is not zero: too small for one
    k[8, 0, :3], k[8, 0, 4:] = 0, 0
    store_int8(pages, rows, k, v)
    keys, values = from_int8(pages, rows, head_dim)
    groups = k.unflatten(-1, (-1, min(32, head_dim)))
    step = groups.abs().amax(-1, keepdim=True) / 127
    # bfloat16 moves the scale by 2^-9 of it at most, and what is stored by that share of 127 steps and a half
    assert ((keys.view_as(groups) - groups).abs() <= step * (0.5 + 2**-9) * (1 + 2**-8) + 1e-30).all()
    assert ((values - v).abs() <= v.abs().amax(-1, keepdim=True) / 127 * (0.5 + 1e-4)).all()
    assert (keys[7] == 0).all()
    assert (values[7] == 0).all()


def test_a_number_that_is_not_finite_leaves_such_a_scale() -> None:
    pages, rows = some_cache(1, 1, 64), torch.arange(4)
    k, v = torch.ones(2, 4, 1, 64)
    k[1, 0, 40], v[2, 0, 3] = torch.inf, torch.nan
    store_int8(pages, rows, k, v)
    keys, values = from_int8(pages, rows, 64)
    assert not keys[1, 0, 40].isfinite()
    assert keys[1, 0, :32].isfinite().all()
    assert values[2].isnan().all()
    assert values[1].isfinite().all()


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 128), (12, 16), (1, 64), (5, 32)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_rotation_and_rounding_in_one_launch(tokens: int, heads: int, head_dim: int) -> None:
    """Queries and keys to go on with are those of the rotation; what is stored is the turned key in float32, rounded."""
    torch.manual_seed(tokens)
    _, q, k, v = torch.randn(tokens, 4, heads, head_dim).bfloat16().unbind(1)
    table, positions = rope_table(100, head_dim), torch.randint(0, 100, (tokens,), dtype=torch.int32)
    room, rows = some_cache(2, heads, head_dim), torch.randperm(2 * PAGE)[:tokens]
    rows[0] = -1 if tokens > 1 else 3
    written, expected = room.clone(), room.clone()
    q_out, k_out = torch.full((2, tokens, heads, head_dim), torch.nan).bfloat16()
    keys, values = written.tensor_split((Int8Page(head_dim).values,), dim=-1)
    operands = {"q": q, "k": k, "v": v, "table": table, "positions": positions, "rows": rows}
    operands |= {"q_out": q_out, "k_out": k_out, "keys": keys, "values": values}
    counters()
    with emulated_cuda():
        _C.cuda_rotate_append(**{name: to_dlpack(x) for name, x in operands.items()}, stream=0)
        assert counters()["launches"] == 1
        turned_q, turned_k = rope(q, k, table, positions)
        exact = rope(q.float(), k.float(), table, positions)[1]
    assert torch.equal(q_out, turned_q)
    assert torch.equal(k_out, turned_k)
    kept = rows >= 0
    store_int8(expected, rows[kept], exact[kept], v[kept])
    ours, theirs = (Int8Page(head_dim).parts(pages) for pages in (written, expected))
    # The last place of a product decides between two neighbours where both are as near.
    for name in ("keys", "values"):
        difference = (getattr(ours, name).int() - getattr(theirs, name).int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
    torch.testing.assert_close(ours.value_scales[0], theirs.value_scales[0], rtol=2e-7, atol=0, equal_nan=True)
    for ours_scale, theirs_scale in zip(ours.key_scales.flatten(), theirs.key_scales.flatten(), strict=True):
        assert ours_scale.view(torch.int16) == theirs_scale.view(torch.int16) or abs(ours_scale / theirs_scale - 1) < 0.01


def test_every_schedule_stores_the_same_bits() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 64).bfloat16()
    table, positions = rope_table(20, 64), torch.arange(9, dtype=torch.int32)
    room, rows = some_cache(1, 2, 64), torch.randperm(PAGE)[:9]

    def compute() -> list[Tensor]:
        written = room.clone()
        keys, values = written.tensor_split((Int8Page(64).values,), dim=-1)
        out = torch.empty_like(q), torch.empty_like(k)
        operands = {"q": q, "k": k, "v": v, "table": table, "positions": positions, "rows": rows}
        operands |= {"q_out": out[0], "k_out": out[1], "keys": keys, "values": values}
        _C.cuda_rotate_append(**{name: to_dlpack(x) for name, x in operands.items()}, stream=0)
        return [written, *out]

    assert same_bits_for_every_schedule(compute)


# The decode step


class Requests:
    """Prompts in an int8 cache, filled by the model in torch, with room for more; and a float32 model beside it whose
    cache holds the same numbers, in float32."""

    def __init__(self, model: HRM, lengths: list[int]) -> None:
        torch.manual_seed(1)
        self.model = model
        prompts = [torch.randint(0, model.config.vocab_size, (n,)).tolist() for n in lengths]
        prefixes = [n // 2 for n in lengths]
        ours, self.exact = TorchRunner(model, torch.uint8), TorchRunner(model)
        handles, _ = ours.open(prompts, prefixes)
        self.handles, _ = self.exact.open(prompts, prefixes)
        for runner, open_ in ((ours, handles), (self.exact, self.handles)):
            runner.reserve(open_, 2 * PAGE)
        self.tables, self.kv = ours.page_tables(handles), ours.kv
        self.positions = torch.tensor(lengths, dtype=torch.int32)
        rows = torch.cat([torch.arange(n) + PAGE * 0 for n in lengths])
        for request, length in enumerate(lengths):
            place = torch.arange(length)
            rows = self.tables[request].long()[place // PAGE] * PAGE + place % PAGE
            theirs = self.exact.page_tables(self.handles)[request].long()[place // PAGE] * PAGE + place % PAGE
            for slot in range(len(self.kv)):
                keys, values = from_int8(self.kv[slot], rows, model.config.head_dim)
                self.exact.kv[slot, 0, theirs], self.exact.kv[slot, 1, theirs] = keys, values

    def expected(self, tokens: list[int]) -> Tensor:
        """The logits of the float32 model, whose new keys and values are not rounded."""
        return torch.from_numpy(self.exact.step(self.handles, tokens))


def run(step: CudaStep, requests: Requests, tokens: list[int], chosen: slice = slice(None)) -> tuple[Tensor, Tensor]:
    kv = requests.kv.clone()
    with emulated_cuda():
        ids = torch.tensor(tokens, dtype=torch.int32)
        return step(ids[chosen], requests.positions[chosen], requests.tables[chosen], kv), kv


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_equals_a_float32_model_over_the_same_cache(shape: str) -> None:
    """The new token alone is rounded in one and not in the other."""
    model = random_model(**SHAPES[shape])
    requests = Requests(model, [63, 200, 1])
    logits, _ = run(CudaStep(model, "graph", 3, kv_dtype="int8"), requests, [3, 1, 4])
    assert distance(logits, requests.expected([3, 1, 4])) < TOLERANCE
