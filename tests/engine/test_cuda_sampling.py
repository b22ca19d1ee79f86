"""Sampling on CUDA, run by the emulator: the CPU's draws, the filters on ties, what is not finite, the same bits.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.emulator import counters, emulated_cuda, same_bits_for_every_schedule
from support.sampler_reference import Scores, keep_min_p, keep_top_k, keep_top_p, penalize
from torch import Tensor

from hrmcore.engine.cuda_sampling import SamplerSlots
from hrmcore.engine.sampling import Sampler, Sampling, sample

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.01},
    {"temperature": 50.0, "min_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 2**63},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


def draw(samplers: list[Sampler], logits: NDArray[np.float32], fed: list[int] | None = None) -> list[int]:
    """The tokens that follow rows of logits (B, V), from samplers as they stand; `fed` is counted as seen."""
    slots = SamplerSlots(logits.shape[1], torch.device("cpu"))
    slots.put(dict(enumerate(samplers)))
    count = len(samplers)
    fed_tokens = torch.tensor([-1] * count if fed is None else fed, dtype=torch.int32)
    numbers = torch.arange(count, dtype=torch.int32)
    with emulated_cuda():
        return slots.draw(torch.from_numpy(logits), fed_tokens, numbers, torch.zeros(count, dtype=torch.int32)).tolist()


def rows_of(count: int, size: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=spread, size=(count, size)).astype(np.float32)


def scaled(logits: NDArray[np.float32], sampling: Sampling, seen: set[int]) -> Scores:
    """Scores below the largest, in float64."""
    scores = penalize(logits.astype(np.float64), seen, sampling.repetition_penalty)
    return (scores - scores.max()) / sampling.temperature


def kept(scores: Scores, sampling: Sampling) -> Scores:
    scores = keep_top_k(scores, sampling.top_k or len(scores))
    return keep_min_p(keep_top_p(scores, sampling.top_p or 1.0), sampling.min_p or 0.0)


def decided(logits: NDArray[np.float32], sampling: Sampling, seen: set[int], draws: int) -> bool:
    """Whether no token's end lies near the random number, and no filter's bound near a score.

    Near is twice the error that float32 makes: of a score three roundings, with a penalty one of the logit more; of a
    weight two units; and the 2**-40 that is cut off.
    """
    scores = scaled(logits, sampling, seen)
    whole = np.exp(keep_top_k(scores, sampling.top_k or len(scores)))
    largest = np.abs(logits[np.isfinite(logits)]).max() / sampling.temperature
    exponents = np.where(whole > 0, -scores, 0) * 3 + (largest if sampling.repetition_penalty != 1 else 0)
    near = 2 * ((whole * (exponents * 2**-24 + 2**-22)).sum() / whole.sum() + len(whole) * 2**-40)
    ends = np.exp(kept(scores, sampling)).cumsum()
    uniform = np.random.Generator(np.random.Philox(counter=draws, key=sampling.seed or 0)).random()
    mass = np.sort(whole)[::-1].cumsum() / whole.sum()
    margins = [np.abs(ends / ends[-1] - uniform), np.abs(mass - (sampling.top_p or 2))]
    of_bound = np.abs(whole - (sampling.min_p or 2)).min()  # relative to 1: min_p is large here
    return bool(min(of_bound, *(margin.min() for margin in margins)) > near)


@pytest.mark.parametrize("size", [1, 31, 50, 200, 1028, 2051])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_draws_are_those_of_the_cpu(options: dict[str, Any], size: int) -> None:
    """Five draws of four requests each, in vocabularies smaller than a block, and no multiple of anything."""
    samplings = [Sampling(seed=seed, **options) for seed in (0, 1, 2**63, 2**64 - 1)]
    prompt = [size // 2, 0, size - 1]
    ours, theirs = ([Sampler(sampling, prompt) for sampling in samplings] for _ in range(2))
    seen, compared = [set(prompt) for _ in samplings], 0
    for turn in range(5):
        rows = rows_of(4, size, turn)
        rows[1, ::2] = -np.inf if size > 1 else 0
        expected = sample(theirs, rows)
        for index, token in enumerate(draw(ours, rows)):
            if options.get("temperature", 0) == 0 or decided(rows[index], samplings[index], seen[index], turn):
                assert token == expected[index]
                compared += 1
            ours[index].core.accept(expected[index])
            seen[index].add(expected[index])
    assert compared > 10


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 5}, {"top_p": 0.4}, {"top_p": 0.5}, {"min_p": 1.0}])
def test_ties_leave_what_the_reference_leaves(options: dict[str, Any]) -> None:
    """No other token is drawn, and those that the CPU draws; tied tokens lie in four warps."""
    logits = np.full(100, -30.0, np.float32)
    logits[[0, 1, 2, 3, 30, 33, 64, 65, 96, 99]] = [1, 0, 2, 1, 2, -1, 2, 1, 0, -np.inf]
    sampling = Sampling(temperature=1.0, **options)
    left = np.flatnonzero(kept(scaled(logits, sampling, set()), sampling) > -29).tolist()
    samplers = [Sampler(Sampling(temperature=1.0, seed=seed, **options), []) for seed in range(200)]
    drawn = draw(samplers, np.tile(logits, (len(samplers), 1)))
    assert set(drawn) <= set(left)
    assert len(set(drawn)) >= len(left) - 1
    assert drawn == sample(samplers, np.tile(logits, (len(samplers), 1)))


@pytest.mark.parametrize("size", [8, 2048])
def test_a_mass_that_is_exactly_reached_ends_the_nucleus(size: int) -> None:
    samplers = [Sampler(Sampling(temperature=1.0, top_p=0.5, seed=seed), []) for seed in range(100)]
    drawn = draw(samplers, np.zeros((100, size), np.float32))
    assert drawn == sample(samplers, np.zeros((100, size), np.float32))
    assert max(drawn) < size // 2


def test_greedy_takes_the_lowest_of_equals() -> None:
    row = np.full(600, -1.0, np.float32)
    row[[70, 5, 599]] = 2.0
    zeros = np.zeros(600, np.float32)
    zeros[:3] = -0.0
    greedy = [Sampler(Sampling(), []), Sampler(Sampling(repetition_penalty=2.0), []), Sampler(Sampling(), [])]
    assert draw(greedy, np.stack([row, row, zeros])) == [5, 5, 0]


def test_the_penalty_counts_the_prompt_and_what_is_fed() -> None:
    """Four draws in a row, on the device alone; a fed token out of range is none."""
    logits, slots = torch.tensor([[4.0, 3.0, 2.5, 2.4]]), SamplerSlots(4, torch.device("cpu"))
    slots.put({0: Sampler(Sampling(repetition_penalty=2.0), [0])})
    fed, slot, positions = (torch.tensor([number], dtype=torch.int32) for number in (-1, 0, 7))
    drawn = []
    with emulated_cuda():
        for _ in range(4):
            fed = slots.draw(logits, fed, slot, positions)
            drawn.append(int(fed))
        slots.draw(logits, torch.tensor([4], dtype=torch.int32), slot, positions)
    assert drawn == [1, 2, 3, 0]
    assert positions.tolist() == [12]


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_every_filter_ends_in_greedy(options: dict[str, Any]) -> None:
    rows = rows_of(20, 50)
    samplers = [Sampler(Sampling(**{"temperature": 5.0, "seed": seed, **options}), []) for seed in range(20)]
    assert draw(samplers, rows) == rows.argmax(-1).tolist()


def test_a_huge_temperature_and_far_logits_draw_what_the_cpu_draws() -> None:
    rows = rows_of(40, 64)
    rows[:, 10:20] = -np.inf
    rows[20:, 20:30] = -3e38
    samplers = [Sampler(Sampling(temperature=1e300 if i < 20 else 1.0, seed=i), []) for i in range(40)]
    assert draw(samplers, rows) == sample(samplers, rows)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.5}, {"repetition_penalty": 1.1}])
def test_logits_that_are_not_finite_give_the_token_that_decides(bad: float, options: dict[str, Any]) -> None:
    rows = np.tile(np.arange(700, dtype=np.float32), (3, 1))
    rows[1, [80, 300]] = bad
    rows[2] = -np.inf
    samplers = [Sampler(Sampling(seed=1, **options), [80, 5]) for _ in range(3)]
    good, *wrong = draw(samplers, rows)
    assert good == sample(samplers[:1], rows[:1])[0]
    assert wrong == [-81, -1]


def test_a_penalty_beyond_float32_stays_finite() -> None:
    row = np.array([[1e30, 2e30, -1e30]], np.float32)
    assert draw([Sampler(Sampling(repetition_penalty=1e-30), [0, 2])], row) == [0]


def test_the_bits_are_the_same_for_every_schedule_and_whoever_is_beside() -> None:
    rows = rows_of(4, 300)
    samplings = [Sampling(seed=i, **options) for i, options in enumerate(OPTIONS[-4:])]
    samplers = [Sampler(sampling, [1, 2, 3]) for sampling in samplings]

    def compute() -> list[Tensor]:
        slots = SamplerSlots(300, torch.device("cpu"))
        slots.put({3 - i: sampler for i, sampler in enumerate(samplers)})
        order = torch.tensor([3, 2, 1, 0], dtype=torch.int32)
        positions, fed = torch.zeros(4, dtype=torch.int32), order.clone()
        drawn = slots.draw(torch.from_numpy(rows), fed, order, positions)
        return [drawn, slots.draw(torch.from_numpy(rows), drawn, order, positions), *slots._tensors.values()]

    assert same_bits_for_every_schedule(compute)
    alone = [draw([sampler], rows[i : i + 1], [3 - i])[0] for i, sampler in enumerate(samplers)]
    assert draw(samplers, rows, [3, 2, 1, 0]) == alone


def test_slots_grow_and_keep_what_they_hold() -> None:
    slots = SamplerSlots(40, torch.device("cpu"))
    slots.put({5: Sampler(Sampling(temperature=1.0, seed=2**64 - 1), [])})
    slots.put({200: Sampler(Sampling(repetition_penalty=2.0), [0, 31, 32, 39])})
    tensors = slots._tensors
    assert {len(tensor) for tensor in tensors.values()} == {201}
    assert tensors["options"][5].tolist() == [1, 1, 0, 1]
    assert tensors["counts"][5].tolist() == [0, -1, 0]
    assert tensors["seen"][200].tolist() == [1 - 2**31, 1 + 2**7]


def test_a_row_is_read_as_often_as_the_header_says() -> None:
    """In bytes; a sixteenth is read again by the warp that the draw falls in, up to the draw. Beside it 44 a thread."""
    size = 8192
    row = rows_of(1, size)
    for options, times in [
        ({}, 1),
        ({"temperature": 1.0}, 2),
        ({"temperature": 1.0, "top_k": 9}, 5),
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.9}, 8),
    ]:
        counters()
        draw([Sampler(Sampling(seed=3, **options), [])], row)
        read = counters()["bytes_read"]
        assert 0 <= read - times * 4 * size <= 4 * size // 16 + 4 * 128 + 512 * 44 + 64


def test_wrong_operands_are_refused() -> None:
    slots = SamplerSlots(8, torch.device("cpu"))
    slots.put({0: Sampler(Sampling(), [])})
    logits, ids = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32)
    for rows, fed, order, positions, message in [
        (logits.double(), ids, ids, ids, "logits must be float32, got float64"),
        (logits, ids[:1], ids, ids, r"fed must be of size 2 \(B\)"),
        (logits, ids, ids.long(), ids, "slots must be int32, got int64"),
        (logits, ids, ids, ids[:, None], "positions must be of rank 1"),
        (torch.zeros(2, 80), ids, ids, ids, r"seen must be of size 3 \(ceil\(V / 32\)\)"),
        (torch.zeros(2, 0), ids, ids, ids, "the vocabulary must be from 1 to 4194304, got 0"),
        (logits, ids, ids, ids, "logits must be on a CUDA device, got a tensor on the CPU"),
    ]:
        with pytest.raises(ValueError, match=message):
            slots.draw(rows, fed, order, positions)
