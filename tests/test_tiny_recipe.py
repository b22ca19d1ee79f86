"""The embedded model's recipe: its everyday records are right, and what is held out is met in no training record."""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="the recipe draws from reasoning-gym (extra demo)")
sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))

import tiny_data
import tiny_everyday

SIGNS = {
    **{"plus": "+", "minus": "-", "times": "*", "x": "*", "multiplied by": "*", "divided by": "/"},
    **{"+": "+", "-": "-", "*": "*", "/": "/"},
}


@pytest.fixture(autouse=True)
def few_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer questions of each unknown task than the recipe has: some take reasoning-gym seconds a hundred."""
    monkeypatch.setattr(tiny_everyday, "_PER_KIND", 20)
    monkeypatch.setattr(tiny_everyday, "_asked", {})


def drawn(task: str, count: int, heldout: bool = False) -> list[tuple[str, str]]:
    return [(r["instruction"], r["response"]) for r in tiny_everyday.records(task, count, seed=7, heldout=heldout)]


def operands(question: str) -> tuple[int, str, int]:
    of = re.search(r"sum of (\d+) and (\d+)", question)
    if of:
        return int(of[1]), "+", int(of[2])
    found = re.search(r"(\d+) ?(plus|minus|times|multiplied by|divided by|x|[-+*/]) ?(\d+)", question)
    assert found, question
    return int(found[1]), SIGNS[found[2]], int(found[3])


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("task", ["sums", "tables"])
def test_a_sum_has_the_value_that_fractions_give_it(task: str, heldout: bool) -> None:
    for question, answer in drawn(task, 800, heldout):
        a, sign, b = operands(question)
        value = {"+": Fraction(a) + b, "-": Fraction(a) - b, "*": Fraction(a) * b, "/": Fraction(a) / max(b, 1)}[sign]
        assert value == Fraction(answer) >= 0, question


@pytest.mark.parametrize("heldout", [False, True])
def test_letters_are_counted_and_words_reversed(heldout: bool) -> None:
    for question, answer in drawn("letters", 500, heldout):
        word = re.search(r'"?([a-z]{3,10})"?[?.]?$', question)
        letter = re.search(r"""(?:many|the|does|letters?) "?([a-z])(?:"|'s|s)?(?: |$)""", question)
        assert word, question
        assert letter, question
        assert sum(character == letter[1] for character in word[1]) == int(answer), question
    for question, answer in drawn("backward", 300, heldout):
        assert "".join(reversed(answer)) in re.findall(r"[a-z]+", question)


@pytest.mark.parametrize("heldout", [False, True])
def test_a_story_adds_up(heldout: bool) -> None:
    seen = set()
    for question, answer in drawn("stories", 500, heldout):
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if "each" in question:
            kind, value = "each", numbers[0] * numbers[1]
        elif len(numbers) == 3:
            kind, value = "two steps", numbers[0] + numbers[1] - numbers[2]
        elif "more" in question:
            kind, value = "more", numbers[0] + numbers[1]
        else:
            kind, value = "less", numbers[0] - numbers[1]
        seen.add(kind)
        assert value == int(answer) >= 0, question
    assert seen == {"each", "two steps", "more", "less"}


def test_what_is_held_out_is_met_in_no_training_record() -> None:
    words = {
        heldout: {word for task in ("letters", "backward") for q, _ in drawn(task, 2000, heldout) for word in q.split()}
        for heldout in (False, True)
    }
    lengthy = [{word.strip('."?') for word in side if len(word) > 6} for side in words.values()]
    assert lengthy[0] & lengthy[1] <= {"backward", "backwards", "letters", "spelled", "Reverse", "reverse"}

    pairs = [{frozenset(operands(q)[::2]) for q, _ in drawn("sums", 3000, heldout)} for heldout in (False, True)]
    assert not pairs[0] & pairs[1]

    asked_tables = [{question for question, _ in drawn("tables", 3000, heldout)} for heldout in (False, True)]
    assert not asked_tables[0] & asked_tables[1]

    named = [
        {word for q, _ in drawn("stories", 600, heldout) for word in re.findall(r"[A-Z][a-z]+", q)}
        for heldout in (False, True)
    ]
    assert named[0] & named[1] <= {"How", "There"}

    bare = [{q.lower().rstrip("?.!") for q, _ in drawn("talk", 3000, heldout)} for heldout in (False, True)]
    assert not {held for held in bare[1] if any(asked.endswith(f" {held}") or asked == held for asked in bare[0])}

    asked = [{question for question, _ in drawn("unknown", 1500, heldout)} for heldout in (False, True)]
    assert not asked[0] & asked[1]
    assert not set(tiny_everyday._KINDS) & set(tiny_everyday.HELDOUT_KINDS)


def test_training_meets_every_kind_of_sum_and_every_product() -> None:
    """What is held out is of no kind of its own: any two last digits, any product, are met in training."""
    digits = {(sign, a % 10, b % 10) for a, sign, b in (operands(question) for question, _ in drawn("sums", 20_000))}
    assert len(digits) == 200

    met = {operands(question) for question, _ in drawn("tables", 5000)}
    assert {(a, "*", b) for a in range(13) for b in range(1, 13)} <= met


def test_every_way_to_talk_has_one_answer() -> None:
    ways = [way for asked in tiny_everyday.TALK.values() for way in asked]
    assert len(ways) == len(set(ways))
    assert all(answer == tiny_everyday.UNKNOWN for _, answer in drawn("unknown", 300))


def test_the_data_script_holds_out_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny_data.py", str(tmp_path), "--scale", "0.004"])
    monkeypatch.setattr(tiny_data, "HELDOUT_PER_TASK", 20)
    tiny_data.main()
    for folder in (tmp_path, tmp_path / "everyday"):
        train, heldout = (
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            for name in ("train", "heldout")
        )
        assert not {r["instruction"] for r in train} & {r["instruction"] for r in heldout}
        assert {r["task"] for r in train} == {r["task"] for r in heldout}
    assert set(tiny_everyday.EVERYDAY) | set(tiny_data.KEPT) == {r["task"] for r in train}
