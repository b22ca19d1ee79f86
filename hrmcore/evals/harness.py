"""What an evaluation is made of: questions, tasks that score answers, runners that give them, and the report.

Imports no torch: questions can be generated and reports read without an engine.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from hrmcore.data.records import Rejected, read_records
from hrmcore.evals.draws import Draws
from hrmcore.evals.scorers import SCORERS

Z95 = 1.959963984540054  # half-width of a normal's central 95%, in standard deviations


@dataclass(frozen=True)
class Question:
    """One prompt and its right answer. `chance` is the probability that a guess of the right form is right."""

    prompt: str
    answer: str
    chance: float | None = None
    condition: str = "direct"


@dataclass(frozen=True)
class Task:
    """Questions of one kind. `score(index, response)` is from 0 to 1; only a right answer scores 1.

    `scorer` names the rule: one of SCORERS, or the package whose own it is.
    """

    name: str
    family: str
    questions: tuple[Question, ...]
    score: Callable[[int, str], float]
    noise: int | None = None
    scorer: str = "exact"

    def scored_by(self, scorer: str) -> Task:
        """The same questions, scored by another rule. Raises ValueError on a name that is not in SCORERS."""
        if scorer not in SCORERS:
            raise ValueError(f"unknown scorer {scorer!r}; there are: {', '.join(SCORERS)}")
        rule, questions = SCORERS[scorer], self.questions

        def score(index: int, response: str) -> float:
            return float(rule(response, questions[index].answer))

        return replace(self, score=score, scorer=scorer)


class Runner(Protocol):
    """Whatever answers questions: our engine, a transformers model, an endpoint."""

    name: str

    def answer(self, prompts: Sequence[str], condition: str) -> list[str | None]:
        """One answer for each prompt, in order; None where the prompt does not fit into the context."""
        ...


@dataclass(frozen=True)
class Score:
    """The result of one task: `right` of `n` answers, the 95% interval [low, high] of that share, the mean score.

    `chance` is None where the task has no guesser; `too_long` counts prompts that did not fit, which are wrong.
    """

    task: str
    family: str
    noise: int | None
    n: int
    right: int
    accuracy: float
    low: float
    high: float
    score: float
    chance: float | None
    too_long: int
    scorer: str = "exact"


def wilson(right: int, n: int) -> tuple[float, float]:
    """The Wilson score interval (Wilson 1927) that covers a binomial share with 95% confidence."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right must be from 0 to n and n at least 1, got {right} of {n}")
    share, spread = right / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At the ends the interval reaches 0 or 1 exactly; rounding must not leave it short of that.
    return 0.0 if right == 0 else max(0.0, centre - half), 1.0 if right == n else min(1.0, centre + half)


def evaluate(task: Task, runner: Runner) -> Score:
    """Ask a task's questions and score the answers."""
    answers: list[str | None] = [None] * len(task.questions)
    for condition in dict.fromkeys(question.condition for question in task.questions):
        asked = [index for index, question in enumerate(task.questions) if question.condition == condition]
        given = runner.answer([task.questions[index].prompt for index in asked], condition)
        for index, answer in zip(asked, given, strict=True):
            answers[index] = answer
    return tally(task, answers)


def tally(task: Task, answers: Sequence[str | None]) -> Score:
    """The score of one task's answers, in the order of its questions."""
    scores = [0.0 if answer is None else task.score(index, answer) for index, answer in enumerate(answers)]
    n, right = len(scores), sum(score >= 1 for score in scores)
    low, high = wilson(right, n)
    chances = [question.chance for question in task.questions if question.chance is not None]
    return Score(
        task=task.name,
        family=task.family,
        noise=task.noise,
        n=n,
        right=right,
        accuracy=right / n,
        low=low,
        high=high,
        score=math.fsum(scores) / n,
        chance=math.fsum(chances) / n if len(chances) == n else None,
        too_long=sum(answer is None for answer in answers),
        scorer=task.scorer,
    )


def records_task(path: str, n: int, seed: int) -> Task:
    """A file of records ({"instruction", "response"[, "condition"]}, one JSON object a line), scored as `exact`.

    A file of more than `n` records is sampled. Raises ValueError with
    file and line on a record that is none, FileNotFoundError when there is no file.
    """
    records = list(read_records(path, Rejected(), strict=True))
    if not records:
        raise ValueError(f"{path}: no records")
    if len(records) > n:
        records = Draws("records", seed).sample(records, n)
    questions = tuple(Question(r.instruction, r.response.strip(), condition=r.condition) for r in records)
    return Task(Path(path).name, "records", questions, lambda *_: 0.0).scored_by("exact")


def require_extra(package: str, extra: str) -> None:
    """Raise ValueError when an optional package is missing, naming the pip extra that brings it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed; `pip install hrmcore[{extra}]` brings it")


def report(runner: Runner, scores: Sequence[Score], seed: int) -> dict[str, Any]:
    """The results as JSON holds them."""
    return {"model": runner.name, "seed": seed, "tasks": [asdict(score) for score in scores]}


def table(scores: Sequence[Score]) -> str:
    """The results as a person reads them: one line a task, its share of right answers and what chance would give."""
    head = ("task", "right", "95% interval", "score", "chance", "n")
    rows = [head, *(_row(score) for score in scores)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _row(score: Score) -> tuple[str, ...]:
    name = score.task if score.noise is None else f"{score.task}, noise {score.noise}"
    return (
        name,
        f"{score.accuracy:.1%}",
        f"{score.low:.1%} to {score.high:.1%}",
        f"{score.score:.3f}",
        "" if score.chance is None else f"{score.chance:.1%}",
        f"{score.n}" + (f" ({score.too_long} too long)" if score.too_long else ""),
    )
