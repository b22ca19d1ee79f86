"""The int8 cache on CUDA, by the emulator: what is stored, the decode step over it, and the engine with it.

Shapes: B requests, T tokens, H heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_cuda_step import SHAPES, TOLERANCE, random_model
from support.emulator import (
    bits_in_any_company,
    counters,
    device_with,
    emulated_cuda,
    same_bits_for_every_schedule,
    seeded,
)
from support.engines import distance
from support.graphs import Replayed
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
    """Queries and keys to go on with are the rotation's; what is stored is rounded from the turned key in float32."""
    torch.manual_seed(tokens)
    _, q, k, v = torch.randn(tokens, 4, heads, head_dim).bfloat16().unbind(1)
    table, positions = rope_table(100, head_dim), torch.randint(0, 100, (tokens,), dtype=torch.int32)
    room, rows = some_cache(2, heads, head_dim), torch.randperm(2 * PAGE)[:tokens]
    rows[0] = -1 if tokens > 1 else 3
    written, expected = room.clone(), room.clone()
    q_out, k_out = torch.full((2, tokens, heads, head_dim), torch.nan).bfloat16()
    operands = {"q": q, "k": k, "v": v, "table": table, "positions": positions, "rows": rows}
    operands |= {"q_out": q_out, "k_out": k_out, "keys": written, "values": written}
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
        assert (
            ours_scale.view(torch.int16) == theirs_scale.view(torch.int16) or abs(ours_scale / theirs_scale - 1) < 0.01
        )


def test_every_schedule_stores_the_same_bits() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 64).bfloat16()
    table, positions = rope_table(20, 64), torch.arange(9, dtype=torch.int32)
    room, rows = some_cache(1, 2, 64), torch.randperm(PAGE)[:9]

    def compute() -> list[Tensor]:
        written = room.clone()
        out = torch.empty_like(q), torch.empty_like(k)
        operands = {"q": q, "k": k, "v": v, "table": table, "positions": positions, "rows": rows}
        operands |= {"q_out": out[0], "k_out": out[1], "keys": written, "values": written}
        _C.cuda_rotate_append(**{name: to_dlpack(x) for name, x in operands.items()}, stream=0)
        return [written, *out]

    assert same_bits_for_every_schedule(compute)


# The decode step


class Requests:
    """Prompts in an int8 cache, filled by the model in torch, with room for more; and beside it a float32 model whose
    cache holds what those numbers mean."""

    def __init__(self, model: HRM, lengths: list[int]) -> None:
        torch.manual_seed(1)
        prompts = [torch.randint(0, model.config.vocab_size, (n,)).tolist() for n in lengths]
        prefixes = [n // 2 for n in lengths]
        ours, self.exact = TorchRunner(model, torch.uint8), TorchRunner(model)
        handles, _ = ours.open(prompts, prefixes)
        self.handles, _ = self.exact.open(prompts, prefixes)
        ours.reserve(handles, 2 * PAGE)
        self.exact.reserve(self.handles, 2 * PAGE)
        self.tables, self.kv = ours.page_tables(handles), ours.kv
        self.positions = torch.tensor(lengths, dtype=torch.int32)
        for row, (here, there) in enumerate(zip(self.tables, self.exact.page_tables(self.handles), strict=True)):
            places = torch.arange(lengths[row])
            ours_at, theirs_at = (table.long()[places // PAGE] * PAGE + places % PAGE for table in (here, there))
            for slot, pages in enumerate(self.kv):
                stored = torch.stack(from_int8(pages, ours_at, model.config.head_dim))
                with torch.inference_mode():  # what the runner's tensors may be of
                    self.exact.kv[slot][:, theirs_at] = stored

    def expected(self, tokens: list[int]) -> Tensor:
        """The logits of the float32 model, whose new keys and values are not rounded."""
        return torch.from_numpy(self.exact.step(self.handles, tokens))

    def run(self, step: CudaStep, tokens: list[int], chosen: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The step's logits, and the cache after it."""
        kv = self.kv.clone()
        with emulated_cuda():
            ids = torch.tensor(tokens, dtype=torch.int32)
            return step(ids[chosen], self.positions[chosen], self.tables[chosen], kv), kv


WIDE = {"num_attention_heads": 1, "head_dim": 128}  # the kernels for head_dim 128 and RoPE
STEPS: dict[str, dict[str, Any]] = SHAPES | {"head_dim 128": WIDE, "head_dim 32": {"head_dim": 32}}


@pytest.mark.parametrize("shape", STEPS)
def test_the_step_equals_a_float32_model_over_the_same_cache(shape: str) -> None:
    """The new token alone is rounded in one and not in the other."""
    model = random_model(**STEPS[shape])
    requests = Requests(model, [63, 200, 5])
    logits, _ = requests.run(CudaStep(model, "graph", 3, kv_dtype="int8"), [3, 1, 4])
    assert distance(logits, requests.expected([3, 1, 4])) < TOLERANCE


@pytest.mark.parametrize("shape", ["two layers, three heads", "head_dim 128"])
def test_the_new_token_is_stored_as_it_is_rounded(shape: str) -> None:
    """All that changes is its row, and that lies within half a step, and the products' own error, of the exact one."""
    model = random_model(**STEPS[shape] | {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1})
    requests = Requests(model, [63, 64, 5])
    before = requests.kv.clone()
    _, kv = requests.run(CudaStep(model, "persistent", 3, kv_dtype="int8"), [3, 1, 4])
    requests.expected([3, 1, 4])
    for row, (here, there) in enumerate(
        zip(requests.tables, requests.exact.page_tables(requests.handles), strict=True)
    ):
        position = int(requests.positions[row])
        ours, theirs = (
            table[position // PAGE : position // PAGE + 1].long() * PAGE + position % PAGE for table in (here, there)
        )
        for stored, exact in zip(
            from_int8(kv[0], ours, model.config.head_dim), requests.exact.kv[0][:, theirs], strict=True
        ):
            largest = exact.abs().max()
            assert (stored - exact).abs().max() <= largest * (0.5 / 127 + 3 * 2**-8)
        head_dim = model.config.head_dim
        for pages in (before, kv):  # its row aside, nothing changes
            for part in Int8Page(head_dim).parts(pages[:, here[position // PAGE]]):
                part[:, :, position % PAGE] = 0
    used = Int8Page(model.config.head_dim).parts
    for mine, theirs in zip(used(kv.flatten(0, 1)), used(before.flatten(0, 1)), strict=True):
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("changes", [{}, WIDE, {"position_encoding": "xpos"}, {"attention_window": 64}])
def test_the_bits_are_the_same_in_both_forms_and_for_every_schedule_grid_and_batch(changes: dict[str, Any]) -> None:
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=2, **changes)
    requests = Requests(model, [300, 64, 127, 1, 63, 20, 128, 5])
    tokens = list(range(8))
    logits, kv = requests.run(CudaStep(model, "graph", 1, kv_dtype="int8"), tokens)
    for seed in range(5):
        with seeded(seed):
            for form, blocks in (("persistent", 2 + seed), ("graph", 6 - seed)):
                step = CudaStep(model, form, blocks, kv_dtype="int8")
                again = requests.run(step, tokens)
                assert torch.equal(again[0], logits)
                assert torch.equal(again[1], kv)
    step = CudaStep(model, "persistent", 3, kv_dtype="int8")
    assert torch.equal(requests.run(step, tokens, slice(2, 3))[0], logits[2:3])
    assert distance(logits, requests.expected(tokens)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_rings_of_any_depth_and_weights_of_any_kind_give_right_logits(dtype: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 2, "head_dim": 128}
    shape |= {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1}
    model, rounded = random_model(**shape), random_model(**shape)
    if dtype != "bfloat16":
        model.save_pretrained(tmp_path / "model")
        packed = CpuRunner.from_checkpoint(tmp_path / "model", dtype, None, 1, 0)
        for name, tensor in rounded.named_parameters():
            packed.core.get_weight(name, tensor)
    requests = Requests(rounded, [130, 5])
    results = []
    for shared_kib in (99, 180, 227):
        with device_with(shared_kib):
            results.append(requests.run(CudaStep(model, "persistent", 5, dtype, "int8"), [7, 8])[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert distance(results[0], requests.expected([7, 8])) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_up_to_32_requests_at_once_have_the_bits_of_fewer(dtype: str) -> None:
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1, **WIDE)
    requests = Requests(model, [n + i for i in range(4) for n in (130, 64, 2, 1, 63, 20, 9, 5)])
    tokens = list(range(32))

    def run(form: Form, blocks: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        with device_with(227), emulated_cuda():
            step = CudaStep(model, form, blocks, dtype, "int8")
            assert step.most_requests(requests.tables.shape[1]) == 32
            return requests.run(step, tokens, slice(first, last))

    alone = bits_in_any_company(run)
    if dtype == "bfloat16":
        assert distance(alone, requests.expected(tokens)) < TOLERANCE


def test_other_models_than_those_of_head_dim_128_take_eight_requests_at_once() -> None:
    for changes in ({}, WIDE | {"position_encoding": "xpos"}):
        step = CudaStep(random_model(num_layers_per_stack=1, **changes), blocks=3, kv_dtype="int8")
        with device_with(227), emulated_cuda():
            assert step.most_requests(4) == 8


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("bfloat16", {"attention_window": 128}), ("int8", {"position_encoding": "xpos"}), ("int4", {})],
)
def test_the_bytes_read_are_those_of_the_plan(dtype: str, changes: dict[str, Any]) -> None:
    model = random_model(num_layers_per_stack=2, H_cycles=1, L_cycles=1, **changes)
    requests = Requests(model, [400, 5])
    counters()
    requests.run(CudaStep(model, blocks=7, dtype=dtype, kv_dtype="int8"), [1, 2])
    counted = counters()
    planned = traffic(model.config, [400, 5], 7, dtype, requests.tables.shape[1], kv_dtype="int8")
    assert counted["bytes_read"] == planned.total
    assert counted["bytes_read_first"] == planned.from_memory


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_values_of_any_size_keep_their_bits(scale: float) -> None:
    """Weights meet the bytes as f16, which has neither 1e12 nor 1e-12: they are counted in units of the values'."""
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1)
    heads, width = model.config.num_attention_heads, model.config.attention_width
    assert heads * model.config.head_dim == width
    grown = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1)
    exponent = 2.0 ** round(torch.tensor(scale).log2().item())
    for stack in (grown.L_module, grown.H_module):
        layer: Any = stack.layers[0]
        layer.gqkv_proj.weight[3 * width :] *= exponent
        layer.o_proj.weight /= exponent
    logits = [
        Requests(each, [70, 3]).run(CudaStep(each, "persistent", 2, kv_dtype="int8"), [1, 2])[0]
        for each in (model, grown)
    ]
    assert distance(logits[1], logits[0]) < 1e-4


def test_wrong_caches_are_refused() -> None:
    model = random_model(num_layers_per_stack=1)
    requests, ids = Requests(model, [5]), torch.zeros(1, dtype=torch.int32)
    step = CudaStep(model, kv_dtype="int8")
    for wrong, message in (
        (requests.kv[..., :-16].contiguous(), "kv must"),
        (requests.kv[1:], "kv must"),
        (requests.kv[:, :0], "kv must"),
        (requests.kv[0], "kv must"),
    ):
        with pytest.raises(ValueError, match=message):
            step(ids, ids, requests.tables, wrong)


# The engine


@pytest.mark.parametrize("bucketed", [False, True])
def test_the_engine_answers_as_the_cpu_engine_with_an_int8_cache(bucketed: bool, tmp_path: Path) -> None:
    """Opened, kept and forked, decoded on over pages' ends; the cache in half the bytes."""
    model = random_model(num_layers_per_stack=1)
    model.save_pretrained(tmp_path)
    prompts, prefixes = [list(range(1, 3 + i)) for i in range(3)] + [[5, 3] * 31], [1, 2, 3, 40]
    cpu = CpuRunner.from_checkpoint(tmp_path, "bfloat16", "int8", 1, 0)
    theirs, expected = cpu.open(prompts, prefixes)
    runner = CudaRunner(model, blocks=3, graphs=Replayed() if bucketed else None, kv_dtype="int8")
    plain = CudaRunner(random_model(num_layers_per_stack=1), blocks=3)
    assert runner.cache_bytes_per_token < 0.76 * plain.cache_bytes_per_token  # of head_dim 16
    assert runner.cache_bytes_per_token == runner.kv.new_empty(0).element_size() * 3 * (2 * 16 + 16) * len(runner.kv)
    with emulated_cuda():
        ours, found = runner.open(prompts, prefixes)
        assert distance(torch.from_numpy(found), torch.from_numpy(expected)) < TOLERANCE
        for turn in range(4):
            tokens = [turn, 7, 9, 2 * turn]
            found, expected = runner.step(ours, tokens), cpu.step(theirs, tokens)
            assert distance(torch.from_numpy(found), torch.from_numpy(expected)) < TOLERANCE
        forked = runner.fork(runner.keep(ours[3]))
        one, other = (torch.from_numpy(runner.step([handle], [4])) for handle in (ours[3], forked))
        assert torch.equal(one, other)
