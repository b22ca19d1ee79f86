"""Sampling: every filter against transformers, draws against the distribution that is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hrmcore.sampling import Sampler, Sampling, Scores, keep_min_p, keep_top_k, keep_top_p, penalize


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
    logits, prompt, draws = scores(5, size=20, spread=1.5), [2, 11, 4], 5000
    chain = [RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
    chain.append(TemperatureLogitsWarper(options["temperature"]))
    filters = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chain += [filters[name](options[name]) for name in filters if name in options]
    left = torch.from_numpy(theirs(LogitsProcessorList(chain), logits, prompt)).softmax(-1).numpy()

    drawn = [Sampler(Sampling(seed=seed, **options), prompt).pick(logits) for seed in range(draws)]
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


def test_one_seed_gives_one_sequence() -> None:
    rows = [scores(i).astype(np.float32) for i in range(30)]

    def sequence(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.pick(row) for row in rows]

    assert sequence(3) == sequence(3)
    assert len({tuple(sequence(seed)) for seed in range(10)}) == 10


def test_without_a_seed_draws_differ() -> None:
    rows = [np.zeros(1000, np.float32)] * 5
    samplers = [Sampler(Sampling(temperature=1.0), []) for _ in range(2)]
    assert [samplers[0].pick(row) for row in rows] != [samplers[1].pick(row) for row in rows]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0, 2.0], np.float32)
    assert Sampler(Sampling(), []).pick(logits) == 1


def test_the_penalty_counts_prompt_and_answer() -> None:
    logits = np.array([4.0, 3.0, 2.5, 2.4], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert [sampler.pick(logits) for _ in range(4)] == [1, 2, 3, 0]


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_every_filter_ends_in_greedy(options: dict[str, Any]) -> None:
    for seed in range(20):
        logits = scores(seed).astype(np.float32)
        sampler = Sampler(Sampling(**{"temperature": 5.0, "seed": seed, **options}), [])
        assert sampler.pick(logits) == int(logits.argmax())


def test_the_ends_of_the_random_interval_hit_kept_tokens() -> None:
    logits = np.array([-np.inf, 0.0, 1.0, 0.5, -np.inf], np.float32)
    picks = []
    for number in (0.0, float(np.nextafter(1.0, 0.0))):
        sampler = Sampler(Sampling(temperature=1.0), [])
        sampler._random = type("Fixed", (), {"random": lambda self, number=number: number})()
        picks.append(sampler.pick(logits))
    assert picks == [1, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(ArithmeticError, match=r"not finite.*token 1"):
        Sampler(Sampling(temperature=temperature), []).pick(logits)


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True], "0 or more"),
        ("top_k", [0, -1, 1.5, "5", True], "at least 1"),
        ("top_p", [0, -0.1, 1.01, float("nan"), "0.5"], "above 0 and at most 1"),
        ("min_p", [-0.1, 1.01, float("nan"), "0.5"], "between 0 and 1"),
        ("repetition_penalty", [0, -1, float("inf"), None], "above 0"),
        ("seed", [-1, 1.0, "1", True], "whole number"),
    ],
)
def test_values_out_of_range_are_named(option: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} must be .*{expected}.*, got ") as error:
            Sampling(**{option: value})
        assert repr(value) in str(error.value)
