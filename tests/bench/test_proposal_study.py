"""The study of init's proposal: the rule is applied to what its runs left, and only to sets that are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import WORDS, repetitions, write_run

from bench.studies.proposal import Study, lines_of, report, two_digits


def left(out: Path, name: str, scores: dict[float, float], folder: str = "sweep") -> None:
    """What runs at these multiples of the proposed rate, 0.0035, leave; NaN: a run that became no number."""
    if not (out / f"{name}.toml").is_file():
        run = write_run(out / "made", repetitions(WORDS[:3]), steps=7, learning_rate=0.0035)
        (out / f"{name}.toml").write_text(run.read_text())
    runs = {}
    for factor, score in scores.items():
        key = f"learning_rate={two_digits(factor * 0.0035):g}"
        runs[key] = {"failed": "step 1"} if score != score else {"heldout_exact": score}
    (out / f"{name}-{folder}").mkdir()
    (out / f"{name}-{folder}/sweep.json").write_text(json.dumps({"run_file": "", "runs": runs}))


@pytest.mark.parametrize(
    ("scores", "holds", "verdict"),
    [
        ({0.25: 0.1, 0.5: 0.5, 1: 0.6, 2: 0.62, 4: float("nan")}, True, "holds"),
        ({0.25: 0.1, 0.5: 0.5, 1: 0.6, 2: 0.64, 4: 0.0}, False, "does not hold"),
        ({1: 0.6, 2: 0.9}, None, "not complete"),
    ],
)
def test_the_rule(tmp_path: Path, scores: dict[float, float], holds: bool | None, verdict: str) -> None:
    left(tmp_path, "words", scores)
    found = report(Study(tmp_path, 0.05, 0), ["words"], None)
    assert found["sets"]["words"]["holds"] is holds
    assert found["sets"]["words"]["steps"] == 7
    heading, line = lines_of(found)
    assert heading.split()[-5:] == ["×0.25", "×0.5", "×1", "×2", "×4"]
    assert line.endswith(verdict)
    assert "60.0%" in line


def test_other_seeds_are_compared_pair_by_pair_and_the_first_is_not_among_them(tmp_path: Path) -> None:
    left(tmp_path, "words", {0.25: 0.1, 0.5: 0.5, 1: 0.6, 2: 0.7, 4: 0.2})
    left(tmp_path, "words", {1: 0.5, 2: 0.54}, "sweep-seed1")
    left(tmp_path, "words", {1: 0.6, 2: 0.62}, "sweep-seed2")
    left(tmp_path, "words", {1: 0.6}, "sweep-seed3")
    found = report(Study(tmp_path, 0.05, 0), ["words"], None, seeds=4)
    pairs = found["sets"]["words"]["seeds"]
    assert (pairs["factor"], pairs["proposal"], pairs["other"]) == (2, [0.5, 0.6], [0.54, 0.62])
    assert pairs["difference"]["mean"] == pytest.approx(-0.03)
    # Student's t at 0.975 with one degree of freedom is 12.706; the two differences are 0.01 from their mean.
    assert pairs["difference"]["high"] == pytest.approx(-0.03 + 12.706 * 0.01)
    assert lines_of(found)[-1] == "words, other seeds: ×1 50.0%, 60.0%; ×2 54.0%, 62.0%"
