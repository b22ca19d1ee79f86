"""Sampling: filters against transformers, the C++ samplers against the reference and the distribution that is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.sampler_reference import SamplerRef, Scores, keep_min_p, keep_top_k, keep_top_p, penalize
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hrmcore import _C
from hrmcore.engine.sampling import Sampler, Sampling, sample


def pick(sampler: Sampler, logits: NDArray[np.floating]) -> int:
    """The next token from one row."""
    return sample([sampler], logits.astype(np.float32)[None])[0]


def scores(seed: int, size: int = 50, spread: float = 3.0) -> Scores:
    return np.random.default_rng(seed).normal(scale=spread, size=size)


def theirs(processor: Any, values: Scores, ids: list[int] | None = None) -> Scores:
    return processor(torch.tensor([ids or [0]]), torch.from_numpy(values)[None])[0].numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 7, 49, 50, 1000])
def test_top_k_is_that_of_transformers(seed: int, k: int) -> None:
    values = scores(seed).round(1)  # with ties
    assert len(np.unique(values)) < len(values)
    np.testing.assert_array_equal(keep_top_k(values, k), theirs(TopKLogitsWarper(k), values))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_that_of_transformers(seed: int, p: float) -> None:
    values = scores(seed)
    np.testing.assert_array_equal(keep_top_p(values, p), theirs(TopPLogitsWarper(p), values))


def test_top_p_prefers_low_ids_among_equals() -> None:
    assert np.flatnonzero(np.isfinite(keep_top_p(np.zeros(8), 0.4))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_min_p_is_that_of_transformers(seed: int, p: float) -> None:
    values = scores(seed)
    np.testing.assert_array_equal(keep_min_p(values, p), theirs(MinPLogitsWarper(p), values))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    values, ids = scores(0), [3, 3, 7, 49, 0]
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), values, ids)
    np.testing.assert_array_equal(penalize(values, set(ids), penalty), expected)
    assert not np.array_equal(expected, values)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_draws_follow_the_distribution_that_transformers_leaves(options: dict[str, Any]) -> None:
    logits, prompt, draws = scores(5, size=20, spread=1.5), [2, 11, 4], 20000
    chain = [RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
    chain.append(TemperatureLogitsWarper(options["temperature"]))
    filters = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chain += [filters[name](options[name]) for name in filters if name in options]
    rounded = logits.astype(np.float32).astype(np.float64)
    left = torch.from_numpy(theirs(LogitsProcessorList(chain), rounded, prompt)).softmax(-1).numpy()

    samplers = [Sampler(Sampling(seed=seed, **options), prompt) for seed in range(draws)]
    drawn = sample(samplers, np.tile(logits.astype(np.float32), (draws, 1)))
    counts = np.bincount(drawn, minlength=20)
    assert counts[left == 0].sum() == 0
    expected = draws * left[left > 0]
    statistic = ((counts[left > 0] - expected) ** 2 / expected).sum()
    assert chance_of(statistic, len(expected) - 1) > 1e-4
    wrong = np.roll(left[left > 0], 1)  # the test can fail: the same counts do not fit another distribution
    assert chance_of(((counts[left > 0] - draws * wrong) ** 2 / (draws * wrong)).sum(), len(wrong) - 1) < 1e-9


def chance_of(statistic: float, freedom: int) -> float:
    """The upper tail of the chi-square distribution."""
    tail = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2))
    return float(tail)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.01},
    {"temperature": 50.0, "min_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_seed_draws_the_reference_s_tokens(options: dict[str, Any]) -> None:
    for seed in (0, 1, 2**64 - 1):
        sampling = Sampling(seed=seed, **options)
        ours, reference = Sampler(sampling, [3, 4, 4]), SamplerRef(sampling, [3, 4, 4])
        rows = [scores(i, size=200).astype(np.float32) for i in range(60)]
        rows[7][::2] = -np.inf
        assert [pick(ours, row) for row in rows] == [reference.pick(row) for row in rows]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 5}, {"top_p": 0.4}, {"top_p": 0.5}, {"min_p": 1.0}])
def test_ties_leave_what_the_reference_leaves(options: dict[str, Any]) -> None:
    """Every token that is left is drawn sooner or later, and no other."""
    logits = np.array([1, 0, 2, 1, 2, -1, 2, 1, 0, -np.inf], np.float32)
    kept = logits.astype(np.float64)
    kept = keep_top_k(kept, options.get("top_k", 10))
    kept = keep_min_p(keep_top_p(kept, options.get("top_p", 1.0)), options.get("min_p", 0.0))
    samplers = [Sampler(Sampling(temperature=1.0, seed=seed, **options), []) for seed in range(3000)]
    drawn = set(sample(samplers, np.tile(logits, (len(samplers), 1))))
    assert drawn == set(np.flatnonzero(np.isfinite(kept)).tolist())


def test_a_mass_that_is_exactly_reached_ends_the_nucleus() -> None:
    samplers = [Sampler(Sampling(temperature=1.0, top_p=0.5, seed=seed), []) for seed in range(500)]
    assert set(sample(samplers, np.zeros((500, 8), np.float32))) == {0, 1, 2, 3}


def test_philox_against_its_published_vectors() -> None:
    # Random123 (D. E. Shaw Research), kat_vectors, philox4x64 10.
    zeros = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    ones = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert _C.philox4x64([0] * 4, [0] * 2) == zeros
    assert _C.philox4x64([2**64 - 1] * 4, [2**64 - 1] * 2) == ones


def test_philox_against_numpy() -> None:
    chance = np.random.default_rng(0)
    for _ in range(50):
        counter, key = (chance.integers(0, 2**64, size, dtype=np.uint64) for size in (4, 2))
        counter[0] |= np.uint64(1)  # numpy counts up first: one less must not borrow
        theirs = np.random.Philox(counter=counter - np.array([1, 0, 0, 0], np.uint64), key=key).random_raw(4)
        assert _C.philox4x64(counter.tolist(), key.tolist()) == theirs.tolist()


def test_a_sampler_draws_the_same_beside_others() -> None:
    rows = np.stack([scores(i, size=100) for i in range(20)]).astype(np.float32)

    def new(seed: int) -> Sampler:
        return Sampler(Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=seed), [seed])

    alone, together = [], [new(seed) for seed in range(8)]
    for seed in range(8):
        sampler = new(seed)
        alone.append([pick(sampler, row) for row in rows])
    beside = [sample(together, np.tile(row, (8, 1))) for row in rows]
    assert np.array(beside).T.tolist() == alone
    assert len(set(map(tuple, alone))) == 8


def test_without_a_seed_draws_differ() -> None:
    rows = [np.zeros(1000, np.float32)] * 5
    samplers = [Sampler(Sampling(temperature=1.0), []) for _ in range(2)]
    assert [pick(samplers[0], row) for row in rows] != [pick(samplers[1], row) for row in rows]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0, 2.0], np.float32)
    assert pick(Sampler(Sampling(), []), logits) == 1
    assert pick(Sampler(Sampling(repetition_penalty=2.0), []), logits) == 1


def test_the_penalty_counts_prompt_and_answer() -> None:
    logits = np.array([4.0, 3.0, 2.5, 2.4], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert [pick(sampler, logits) for _ in range(4)] == [1, 2, 3, 0]


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_every_filter_ends_in_greedy(options: dict[str, Any]) -> None:
    for seed in range(20):
        logits = scores(seed).astype(np.float32)
        sampler = Sampler(Sampling(**{"temperature": 5.0, "seed": seed, **options}), [])
        assert pick(sampler, logits) == int(logits.argmax())


def test_a_huge_temperature_draws_evenly() -> None:
    samplers = [Sampler(Sampling(temperature=1e300, seed=seed), []) for seed in range(4000)]
    counts = np.bincount(sample(samplers, np.tile(scores(0, size=8).astype(np.float32), (4000, 1))), minlength=8)
    assert chance_of(((counts - 500.0) ** 2 / 500).sum(), 7) > 1e-4


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.1}])
def test_logits_that_are_not_finite_are_an_error(bad: float, options: dict[str, Any]) -> None:
    sampling = Sampling(seed=1, **options)
    good, row = np.arange(3, dtype=np.float32), np.array([0.0, bad, 1.0], np.float32)
    samplers = [Sampler(sampling, []) for _ in range(2)]
    with pytest.raises(ArithmeticError, match=rf"not finite: {abs(bad)} for token 1"):
        sample(samplers, np.stack([good, row]))
    with pytest.raises(ArithmeticError, match="not finite: -inf for token 0"):
        pick(samplers[1], np.full(3, -np.inf))
    # Nothing was drawn: the next draw is the first.
    assert sample(samplers, np.stack([good, good])) == [pick(Sampler(sampling, []), good)] * 2


def test_wrong_rows_are_refused() -> None:
    samplers = [Sampler(Sampling(), []) for _ in range(2)]
    for rows, message in [
        (np.zeros((3, 4), np.float32), r"logits must be of size 2 \(samplers\)"),
        (np.zeros((2, 4)), "logits must be float32, got float64"),
        (np.zeros((2, 0), np.float32), "at least one column"),
        (np.zeros((4, 4), np.float32)[::2, ::2], "logits must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(samplers, rows)


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True], "0 or more"),
        ("top_k", [0, -1, 1.5, "5", True], "at least 1"),
        ("top_p", [0, -0.1, 1.01, float("nan"), "0.5"], "above 0 and at most 1"),
        ("min_p", [-0.1, 1.01, float("nan"), "0.5"], "between 0 and 1"),
        ("repetition_penalty", [0, -1, float("inf"), None], "above 0"),
        ("seed", [-1, 1.0, "1", True, 2**64], "whole number"),
    ],
)
def test_values_out_of_range_are_named(option: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} must be .*{expected}.*, got ") as error:
            Sampling(**{option: value})
        assert repr(value) in str(error.value)
