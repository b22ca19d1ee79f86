"""Whether the engine asks for weights ahead follows from how long its first steps took, which are given here."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from hrmcore import _C

pytestmark = pytest.mark.native

STEPS = 12  # six of either kind


def tried(with_asking: Iterable[int], without: Iterable[int]) -> _C.PrefetchTrial:
    """A trial whose steps of one token took so many nanoseconds."""
    trial = _C.PrefetchTrial()
    for asking, plain in zip(with_asking, without, strict=True):
        for expected, took in ((True, asking), (False, plain)):
            assert not trial.decided
            assert trial.begin(1) is expected, "the two kinds take turns"
            trial.end(took)
    assert trial.decided
    return trial


@pytest.mark.parametrize(
    ("with_asking", "without", "wanted"),
    [
        ([90] * 6, [100] * 6, True),
        ([100] * 6, [90] * 6, False),
        ([100] * 6, [100] * 6, True),  # as it was before there was a trial
        ([900, 900, 900, 900, 900, 90], [100] * 6, True),  # five steps were disturbed
        ([100] * 6, [99, 900, 900, 900, 900, 900], False),
        ([90, 900, 900, 900, 900, 900], [100] * 6, True),
    ],
)
def test_the_kind_of_the_shortest_step_wins_and_stays(with_asking: list[int], without: list[int], wanted: bool) -> None:
    trial = tried(with_asking, without)
    for tokens, took in ((1, 1), (1, 10**9), (8, 1), (1, 1)):
        assert trial.begin(tokens) is wanted
        trial.end(took)
        assert trial.decided


def test_a_step_that_was_cut_short_is_made_again() -> None:
    trial = _C.PrefetchTrial()
    for _ in range(3):
        assert trial.begin(1)  # and no end
    trial.end(10)
    assert not trial.begin(1)


def test_other_work_starts_it_anew() -> None:
    """Steps of eight tokens are slower than those of one, whichever kind they are."""
    trial = _C.PrefetchTrial()
    for step in range(STEPS - 1):
        trial.begin(1)
        trial.end(10 if step % 2 == 0 else 20)
    for step in range(STEPS):
        assert not trial.decided
        assert trial.begin(8) is (step % 2 == 0)
        trial.end(200 if step % 2 == 0 else 100)
    assert trial.decided
    assert trial.begin(8) is False
