"""The IQ suite: ceiling, floor, and the same questions everywhere."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import subprocess
import sys
import time

import pytest

from hrmcore.evals import iq
from hrmcore.evals.draws import Draws
from hrmcore.evals.harness import tally

LEVELS = [(name, level) for name, task in iq.TASKS.items() for level in (iq.NOISE if task.noisy else (0,))]

# SHA-256 of the first five questions of each task, every amount of noise, with their answers: seed 0.
GOLDEN = {
    "attribute_mapping": "b1794e2e3f721d80",
    "counting": "575698be998036b5",
    "string_replacement": "74ad5a45e95fefbf",
    "head_and_tail": "844556b79926bb3f",
    "full_repeating": "3af6e7704ec2909a",
    "head_slicing": "1cfba2a7e10f830e",
    "key_retrieval": "722c3c2498f6910f",
    "one_supporting_fact": "eaa274dc40cf21bb",
    "two_supporting_facts": "8dcdbcdd85bd2756",
}


def fingerprint(name: str) -> str:
    levels = [level for task, level in LEVELS if task == name]
    items = [(q.prompt, q.answer) for level in levels for q in iq.questions(name, 5, 0, level)]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", iq.TASKS)
def test_the_questions_are_those_of_every_platform(name: str) -> None:
    assert fingerprint(name) == GOLDEN[name]


def test_hash_randomisation_changes_nothing() -> None:
    """Sets and dicts of words must not leave their order in a question."""
    code = "from hrmcore.evals import iq; print([iq.questions(n, 3, 1, 4) for n in iq.TASKS])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(("name", "noise"), LEVELS)
def test_the_solver_is_always_right(name: str, noise: int) -> None:
    task = iq.TASKS[name]
    for question in iq.questions(name, 300, 3, noise):
        assert task.solve(question.prompt) == question.answer, question.prompt


def surprise(right: int, chances: list[float]) -> float:
    """How many standard deviations `right` is from what independent guesses of these chances give."""
    return (right - sum(chances)) / math.sqrt(sum(p * (1 - p) for p in chances) or 1)


@pytest.mark.parametrize(("name", "noise"), LEVELS)
def test_a_guesser_scores_chance(name: str, noise: int) -> None:
    """The answers that a guesser draws from hold the right one exactly once, and guessing gives what they promise.

    Eighteen tests: the interval is that of 99.9% confidence, so that the suite as a whole has about 98%.
    """
    guesses = random.Random(f"{name} {noise}")
    [task] = iq.tasks(name, 1000, 5, [noise])
    candidates = [iq.TASKS[name].candidates(question.prompt) for question in task.questions]
    for question, answers in zip(task.questions, candidates, strict=True):
        assert list(answers).count(question.answer) == 1
        assert len(set(answers)) == len(answers)
    score = tally(task, [guesses.choice(answers) for answers in candidates])
    assert abs(surprise(score.right, [1 / len(answers) for answers in candidates])) < 3.29
    assert score.chance == pytest.approx(statistics.fmean(1 / len(answers) for answers in candidates))


@pytest.mark.parametrize("name", ["one_supporting_fact", "two_supporting_facts"])
def test_no_place_is_a_better_guess_than_another(name: str) -> None:
    [task] = iq.tasks(name, 1000, 0, [4])
    for place in iq.PLACES:
        assert abs(surprise(tally(task, [place] * 1000).right, [1 / len(iq.PLACES)] * 1000)) < 3.29


def test_the_suite_covers_its_families() -> None:
    assert iq.FAMILIES == ("symbolic_mapping", "rule_understanding", "pattern_mining", "anti_interference")
    assert {name for name, task in iq.TASKS.items() if task.noisy} == {
        name for name, task in iq.TASKS.items() if task.family == "anti_interference"
    }


@pytest.mark.parametrize("name", [name for name, task in iq.TASKS.items() if task.noisy])
def test_noise_is_the_number_of_irrelevant_facts(name: str) -> None:
    facts = 2 if name == "two_supporting_facts" else 1
    for noise in (0, 1, 9):
        for question in iq.questions(name, 20, 0, noise):
            assert len(question.prompt.splitlines()) == facts + noise + 1


def test_a_question_needs_its_facts() -> None:
    """Without the line that tells where the actor went last, the story's answer changes or is gone."""
    for question in iq.questions("one_supporting_fact", 50, 0, 8):
        who = question.prompt.splitlines()[-1].split()[2].removesuffix("?")
        lines = question.prompt.splitlines()
        last = max(index for index, line in enumerate(lines) if line.startswith(f"{who} went"))
        assert question.answer in lines[last]


def test_questions_do_not_depend_on_how_many_are_asked() -> None:
    for name, noise in LEVELS:
        assert iq.questions(name, 3, 0, noise) == iq.questions(name, 10, 0, noise)[:3]
        assert iq.questions(name, 3, 0, noise) != iq.questions(name, 3, 1, noise)


@pytest.mark.parametrize("name", [name for name, task in iq.TASKS.items() if not task.noisy])
def test_questions_differ_and_10000_take_seconds(name: str) -> None:
    """Seconds on any machine: a tenth of the questions in a tenth of a generous time."""
    started = time.process_time()
    made = iq.questions(name, 1000, 0)
    assert time.process_time() - started < 3
    assert len({question.prompt for question in made}) > 990


def test_only_the_first_line_counts() -> None:
    [task] = iq.tasks("counting", 1, 0)
    right = task.questions[0].answer
    for response in (right, f" {right}\n", f"\n{right}\nand more"):
        assert task.score(0, response) == 1
    for response in ("", f"{right} or so", f"more\n{right}", f"{right}0"):
        assert task.score(0, response) == 0


def test_draws_are_uniform_and_named() -> None:
    draws = Draws("test", 1)
    counts = [0] * 7
    for _ in range(7000):
        counts[draws.below(7)] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 22.5  # chi-squared, 6 degrees of freedom: 99.9%
    assert sorted(Draws("a").shuffled(range(50))) == list(range(50))
    assert Draws("a").shuffled(range(50)) == Draws("a").shuffled(range(50)) != Draws("b").shuffled(range(50))
    assert {draws.between(2, 4) for _ in range(200)} == {2, 3, 4}
