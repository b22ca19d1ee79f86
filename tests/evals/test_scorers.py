"""What each named rule takes for the expected answer, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrmcore.cli import main
from hrmcore.evals import iq
from hrmcore.evals.harness import Question, Task, records_task, tally
from hrmcore.evals.scorers import SCORERS

RIGHT = [
    ("B", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("(B).", "B"),
    ("**B**", "B"),
    ("\\boxed{B}", "B"),
    ("So it is $\\boxed{\\text{B}}$.", "B"),
    ("First \\boxed{A}, no: \\boxed{B}", "B"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("We add.\n#### 1,234", "1234"),
    ("The answer is (B).", "B"),
    ("Step 1.\nAnswer: B\n", "B"),
    ("**Answer:** B", "B"),
    ("The answer is **B**.", "B"),
    ("my answer: key", "my answer: key"),
    ("The answer depends on B. The answer is: 12", "12"),
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("-1,234,567.50", "-1234567.5"),
    ("42.", "42"),
    ("42.0", "42"),
    ("+7", "7"),
    ("cafe\u0301", "caf\u00e9"),
    ("caf\u00e9", "cafe\u0301"),
    ("\u1100\u1161", "\uac00"),
    ("1, 2", "1, 2"),
    ("(1, 2)", "(1, 2)"),
    ("()", "()"),
    (".", "."),
]
WRONG = [
    ("A", "B"),
    ("b", "B"),
    ("(B) or (C)", "B"),
    ("B or C", "B"),
    ("\\boxed{A} B", "B"),
    ("\\boxed{B", "B"),
    ("12,34", "1234"),
    ("1.234", "1234"),
    ("10\u00b2", "102"),
    ("(a)(b)", "a)(b"),
    ("", "B"),
    ("", "."),
    ("", "*"),
    (" ", "**"),
]


@pytest.mark.parametrize(("response", "expected"), RIGHT)
def test_an_answer_is_found(response: str, expected: str) -> None:
    assert SCORERS["answer"](response, expected)


@pytest.mark.parametrize(("response", "expected"), WRONG)
def test_another_answer_is_not(response: str, expected: str) -> None:
    assert not SCORERS["answer"](response, expected)


def test_exact_and_first_line_are_strict() -> None:
    for name in ("exact", "first_line"):
        assert SCORERS[name](" B\n", "B")
        assert not SCORERS[name]("B.", "B")
    assert SCORERS["first_line"]("B\nbecause", "B")
    assert not SCORERS["exact"]("B\nbecause", "B")


def test_a_task_names_its_scorer_and_takes_another(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"instruction": "Which?", "response": "B"}) + "\n")
    task = records_task(str(path), 10, 0)
    assert (task.scorer, iq.tasks("counting", 1, 0)[0].scorer) == ("exact", "first_line")
    assert tally(task, ["(B)"]).right == 0
    score = tally(task.scored_by("answer"), ["(B)"])
    assert (score.right, score.scorer) == (1, "answer")
    with pytest.raises(ValueError, match="unknown scorer 'fuzzy'; there are: exact, first_line, answer"):
        Task("a", "b", (Question("c", "d"),), lambda *_: 0.0).scored_by("fuzzy")


def test_the_command_chooses_a_scorer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "choices.jsonl", tmp_path / "out.json"
    path.write_text(json.dumps({"instruction": "Which?", "response": "B"}) + "\n")
    command = ["eval", "--model", str(checkpoint), "--tasks", str(path), "--max-new-tokens", "2", "--out", str(out)]
    assert main(command) == 0
    assert json.loads(out.read_text())["tasks"][0]["scorer"] == "exact"
    assert main([*command, "--scorer", "answer"]) == 0
    assert json.loads(out.read_text())["tasks"][0]["scorer"] == "answer"
    with pytest.raises(SystemExit):
        main([*command, "--scorer", "fuzzy"])
    assert "fuzzy" in capsys.readouterr().err
