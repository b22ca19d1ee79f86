"""Prefills in the shapes of buckets: logits and cache of prefills as they are, and graphs that run again.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.emulator import counters, emulated_cuda
from support.engines import distance
from support.graphs import Replayed

from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.prefill_buckets import SEQUENCES, TOKENS, BucketedPrefill, bucket_of
from hrmcore.engine.runner import PAGE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-5  # in norm, float32: sums of some 200 terms in another order
CONFIG = HRMConfig(50, 32, 32, 2, 2, 16, H_cycles=2, L_cycles=2, max_position_embeddings=2048)
SHAPES: dict[str, dict[str, Any]] = {
    "rope": {},
    "causal": {"prefix_lm": False},
    "a window": {"attention_window": 64},
    "xPos": {"position_encoding": "xpos"},
}


def model_of(**changes: Any) -> HRM:
    torch.manual_seed(0)
    return HRM(CONFIG.replace(**changes)).requires_grad_(False)


def prompts_of(lengths: list[int]) -> list[list[int]]:
    chance = random.Random(sum(lengths))
    return [[chance.randrange(50) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[5], [64], [100, 3, 29], [65, 1, 1, 1, 1], [300]], ids=str)
@torch.inference_mode()
def test_logits_and_cache_are_those_of_a_prefill_as_it_is(lengths: list[int], shape: str) -> None:
    """Run, captured and replayed; the rows of other sequences stay as they are."""
    model, prompts = model_of(**SHAPES[shape]), prompts_of(lengths)
    prefixes = [length // 2 if model.config.prefix_lm else 0 for length in lengths]
    plain = TorchRunner(model)
    handles, expected = plain.open(prompts, prefixes)
    rows = [plain._sequences[handle].rows(0, length) for handle, length in zip(handles, lengths, strict=True)]
    kv, used = torch.full_like(plain.kv, 7.0), torch.cat(rows)
    grown = torch.cat([kv, torch.full_like(kv[:, :, :PAGE], 7.0)], 2)
    graphs = Replayed()
    prefill = BucketedPrefill(model, graphs)
    assert prefill.takes(prompts)
    for expected_log in (["warm"], ["capture", "replay"], ["replay"]):
        grown.fill_(7.0)
        logits = prefill.run(prompts, prefixes, rows, grown)
        assert graphs.calls == expected_log
        graphs.calls.clear()
        assert distance(logits, expected) < SAME
        assert distance(grown[:, :, used], plain.kv[:, :, used]) < SAME
        others = torch.ones(grown.shape[2], dtype=torch.bool)
        others[used] = False
        assert bool((grown[:, :, others] == 7.0).all())


@torch.inference_mode()
def test_a_bucket_is_captured_at_its_second_use_and_serves_other_prompts() -> None:
    model, graphs = model_of(), Replayed()
    prefill, plain = BucketedPrefill(model, graphs), TorchRunner(model)
    kv = torch.zeros(CONFIG.cache_slots, 2, 5 * PAGE, 2, 16)

    def both(lengths: list[int]) -> None:
        prompts = prompts_of(lengths)
        starts = [PAGE * index for index in range(len(lengths))]
        rows = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        logits = prefill.run(prompts, lengths, rows, kv)
        assert distance(logits, plain.open(prompts, lengths)[1]) < SAME

    for lengths in ([40, 3], [9, 60], [33, 31], [64], [7], [50, 60], [1, 2, 3]):
        both(lengths)
    captured = ["capture", "replay"]
    assert graphs.calls == ["warm", "warm", *captured, "warm", *captured, *captured, "warm"]


@torch.inference_mode()
def test_a_cache_that_moved_is_captured_anew() -> None:
    model, graphs = model_of(), Replayed()
    prefill = BucketedPrefill(model, graphs)
    prompts, rows = prompts_of([9]), [torch.arange(9)]
    shape = (CONFIG.cache_slots, 2, 2 * PAGE, 2, 16)
    first, second = torch.zeros(shape), torch.zeros(shape)
    for kv in (first, first, second, second):
        kv.zero_()
        prefill.run(prompts, [9], rows, kv)
        assert bool(kv[:, :, :9].any())
    assert graphs.calls == ["warm", "capture", "replay"] * 2


def test_what_fits_no_bucket_is_not_taken() -> None:
    prefill = BucketedPrefill(model_of(), Replayed())
    assert bucket_of([[1] * 65, [1]]) == (128, 2)
    assert bucket_of([[1]] * 5) == (64, 8)
    assert prefill.takes([[1] * TOKENS[-1]])
    assert not prefill.takes([[1] * TOKENS[-1], [1]])
    assert not prefill.takes([[1]] * (SEQUENCES[-1] + 1))
    short = BucketedPrefill(model_of(max_position_embeddings=64), Replayed())
    assert short.takes([[1] * 50, [1] * 50])
    assert not short.takes([[1] * 43] * 3)  # the filling is longer than a sequence may be


@pytest.mark.emulated
@torch.inference_mode()
def test_the_kernels_of_cuda_take_empty_sequences_and_the_filling() -> None:
    """In bfloat16, whose attention goes by a table of tiles, made once a prefill."""
    config = CONFIG.replace(num_layers_per_stack=1, H_cycles=1, L_cycles=1, hidden_size=64, head_dim=64)
    torch.manual_seed(0)
    model = HRM(config.replace(num_attention_heads=1)).requires_grad_(False).bfloat16()
    prompts = prompts_of([20, 9, 13])
    expected = TorchRunner(model).open(prompts, [20, 4, 0])[1]
    rows = [torch.arange(20), torch.arange(20, 29), torch.arange(PAGE, PAGE + 13)]
    kv = torch.zeros(config.cache_slots, 2, 3 * PAGE, 1, 64, dtype=torch.bfloat16)
    counters()
    with emulated_cuda():
        logits = BucketedPrefill(model, Replayed()).run(prompts, [20, 4, 0], rows, kv)
    assert distance(logits, expected) < 2e-2
    # A layer: rotation with the cache, attention, two norms, SwiGLU; the closing norms are among them. One norm opens,
    # one table is made.
    assert counters()["launches"] == 5 * config.cache_slots + 2


@pytest.mark.emulated
def test_the_engine_on_cuda_prefills_in_buckets_and_decodes_after_them() -> None:
    """Beside one without: the logits of prefills and of steps after them, in a pool that grows in between."""
    config = CONFIG.replace(num_layers_per_stack=1, H_cycles=1, L_cycles=1)
    torch.manual_seed(0)
    model, graphs = HRM(config).requires_grad_(False), Replayed()
    ours, theirs = CudaRunner(model, blocks=2, graphs=graphs), CudaRunner(model, blocks=2)
    opened: list[list[int]] = [[], []]
    for lengths in ([30], [20], [200, 9], [1], [PAGE]):
        prompts = prompts_of(lengths)
        (ours_new, ours_rows), (theirs_new, theirs_rows) = (r.open(prompts, lengths) for r in (ours, theirs))
        assert distance(ours_rows, theirs_rows) < 2e-2
        opened = [[*opened[0], *ours_new], [*opened[1], *theirs_new]]
        with emulated_cuda():
            steps = [r.step(h, [3] * len(h)) for r, h in zip((ours, theirs), opened, strict=True)]
        assert distance(*steps) < 2e-2
    assert {"warm", "capture", "replay"} == set(graphs.calls)
    for handle in opened[0]:
        ours.close(handle)
    assert len(ours._pool._free) == ours.kv.shape[2] // PAGE
