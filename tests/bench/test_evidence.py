"""bench/evidence: halving by its rule, tables wherever it is cut short, runs that go on, intervals, Muon, data."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.evidence import cell as cells
from bench.evidence import claim as claims
from bench.evidence import data as sets
from bench.evidence import intervals, optimizers, page, picture, table
from bench.evidence.claim import Claim, Scale, Study
from bench.evidence.growth import tokens_for
from bench.evidence.muon import MuonBeside
from bench.evidence.queue import Cell, Rule
from hrmcore import machine
from hrmcore.config import HRMConfig
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
RULE = Rule(("a", "b"), 4, 3, 3)


# The queue


def made_up(cell: Cell) -> float:
    """Losses of which the rule's choices are known: candidate 2 of a, after it had been second; candidate 1 of b."""
    order = {"a": ((0.3, 0.9, 0.4, 0.8), (0.3, None, 0.2, None)), "b": ((0.9, 0.1, 0.5, 0.6), (None, 0.1, 0.2, None))}
    if cell.rung == 2:
        return 0.1 + 0.01 * cell.seed
    found = order[cell.arm][cell.rung][cell.candidate]
    assert found is not None, f"{cell} was not to be run"
    return found


def in_order(rule: Rule = RULE) -> list[Cell]:
    done: dict[Cell, float] = {}
    while (cell := rule.next_cell(done.get)) is not None:
        assert cell not in done
        done[cell] = made_up(cell)
    return list(done)


def test_halving_follows_the_rule_in_an_order_that_treats_arms_alike() -> None:
    order = in_order()
    assert len(order) == RULE.count() == 2 * (4 + 2 + 3)
    assert order[:8] == [Cell(arm, which, 0, 0) for which in range(4) for arm in "ab"]
    assert order[8:12] == [Cell("a", 0, 0, 1), Cell("b", 1, 0, 1), Cell("a", 2, 0, 1), Cell("b", 2, 0, 1)]
    assert order[12:] == [Cell(arm, which, seed, 2) for seed in range(3) for arm, which in (("a", 2), ("b", 1))]


def test_a_table_is_taken_where_all_arms_are() -> None:
    done: dict[Cell, float] = {}
    levels = []
    for cell in in_order():
        done[cell] = made_up(cell)
        levels.append(RULE.level(done.get))
        if len(done) > 1:
            assert all(RULE.measured(arm, levels[-1], done.get) for arm in RULE.arms)
    assert levels == [0] * 9 + [1] * 4 + [2] * 5
    assert RULE.measured("a", 2, done.get) == {2: [0, 1, 2]}
    assert next(iter(RULE.measured("a", 0, done.get))) == 0  # the best at that rung, which the next one left behind


def test_a_diverged_candidate_is_last_and_equal_ones_keep_their_order() -> None:
    losses = {Cell("a", which, 0, 0): loss for which, loss in enumerate((math.inf, 0.5, 0.5, 0.4))}
    assert RULE.survivors("a", 1, losses.get) == [3, 1]


def test_a_rule_that_does_not_come_down_to_one_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="5 candidates are more than 3 rungs"):
        Rule(("a",), 5, 3, 1)


# Curves and intervals


def test_a_value_lies_between_two_validations_and_behind_an_end_stands_what_was_reached() -> None:
    curve = cells.Curve(step=[10, 20, 30], flops=[1, 2, 3], loss=[2.0, 1.0, 1.5], exact=[0.0, 0.5, 0.4])
    assert curve.at("step", 10, "loss") == curve.at("step", 4, "loss") == 2.0
    assert curve.at("step", 15, "loss") == curve.at("flops", 1.5, "loss") == 1.5
    assert curve.reached("step", 1.25) == 17.5
    assert curve.reached("step", 0.9) is None
    with pytest.raises(ValueError, match="has come to 30, not to 40"):
        curve.at("step", 40, "loss")
    solved = replace(curve, exact=[0.0, 1.0, 1.0])
    assert (solved.at("step", 40, "loss"), solved.at("step", 40, "exact")) == (1.0, 1.0)
    assert replace(curve, failed="NaN").at("step", 40, "loss") == math.inf


def test_a_run_ends_where_it_has_nothing_more_to_say() -> None:
    worse = [1.0] + [1.1] * cells.PATIENT
    flat = cells.Curve(step=list(range(len(worse))), loss=worse, exact=[0.04] * len(worse))
    assert not flat.ended  # it has not left the plateau
    assert replace(flat, exact=[0.06] * len(worse)).ended
    assert not replace(flat, loss=worse[:-1], exact=[0.06] * cells.PATIENT).ended
    assert not cells.Curve().ended


def test_intervals_are_students() -> None:
    """t from the definition: 95% of Student's density lies within."""
    for freedom, t in enumerate(intervals.T975, start=1):
        x = np.linspace(-t, t, 200_001)
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        assert np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x) == pytest.approx(0.95, abs=5e-5)
    found = intervals.of_mean([1.0, 2.0, 4.0])
    half = 4.303 * np.std([1.0, 2.0, 4.0], ddof=1) / math.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-12)
    assert intervals.of_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert intervals.of_mean([2.0]) == {"mean": 2.0, "low": None, "high": None}
    assert intervals.of_mean([2.0, math.inf])["low"] is None
    wide = {"mean": 0.7, "low": -0.2, "high": 1.6}
    assert intervals.within(wide, 0, 1) == {"mean": 0.7, "low": 0, "high": 1}
    with pytest.raises(ValueError, match="1 to 13 values, got 0"):
        intervals.of_mean([])


def test_verdicts() -> None:
    assert table.verdict({"mean": -1.0, "low": -2.0, "high": -0.5}) == "lower"
    assert table.verdict({"mean": 1.0, "low": 0.5, "high": 2.0}) == "higher"
    assert table.verdict({"mean": 1.0, "low": -0.5, "high": 2.0}) == "not told apart"
    assert table.verdict({"mean": 1.0, "low": None, "high": None}) == "open: one seed"


# Runs


def echoes() -> Iterator[sets.Pair]:
    for a, b, c in itertools.product("abcdefgh", repeat=3):
        yield a + b + c, c + b + a, a + b + c


@pytest.fixture(scope="module")
def tiny() -> Iterator[Claim]:
    """The claim of the optimizers at a size that takes seconds: AdamW and Muon, two rungs, two seeds."""
    skip_without_muon()
    scale = Scale(("echoes",), 200, 20, 32, 1, 128, (4, 8), seeds=2, warmup=2, eval_every=2, checked=20)
    arms = {name: optimizers.CLAIM.arms[name][:2] for name in ("adamw", "muon")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sets.SETS, "echoes", echoes)
        patch.setattr(machine, "peak_flops", lambda precision, device: 1e12)
        yield replace(optimizers.CLAIM, scales={"cpu": scale}, arms=arms)


def study_of(claim: Claim, out: Path) -> Study:
    return Study(claim, claim.scales["cpu"], "echoes", out)


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    report = json.loads(json.dumps(report))
    for line in report["lines"]:
        line.pop("seconds", None)
    return report


@pytest.fixture(scope="module")
def whole(tiny: Claim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted study reports."""
    study = study_of(tiny, tmp_path_factory.mktemp("whole"))
    assert study.run(math.inf)
    return without_seconds(study.write())


def test_a_study_stopped_every_few_steps_gives_the_same_table(
    tiny: Claim, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(cells, "time", clock)
    monkeypatch.setattr(claims, "time", clock)
    sessions = 0
    while True:
        study = study_of(tiny, tmp_path / "cut")
        now, sessions = next(ticks), sessions + 1
        if study.run(now + 4.5):
            break
        report = study.write()
        assert [line["arm"] for line in report["lines"]] == ["adamw", "muon"]
        for line in report["lines"]:  # valid from the first cell on, whatever is missing
            assert line["n"] == len(line["seeds"]) == len(line.get("loss", ()))
        assert len(table.text(report).splitlines()) == 6
    assert sessions > 4
    assert without_seconds(study.write()) == whole
    assert whole["complete"]
    assert [line["n"] for line in whole["lines"]] == [2, 2]
    assert len(whole["tried"]) == 2 * (
        2 + 2 + 1
    )  # 2 candidates and the second seed at the lower rung, both seeds above


def test_a_page_has_the_figures_of_its_picture(whole: dict[str, Any], tmp_path: Path, figures: list[Any]) -> None:
    shown = page.page(whole)
    adamw = shown["lines"][0]
    assert shown["places"][-1] == whole["at"] == 8
    assert adamw["losses"][-1] == adamw["loss"]["mean"] == round(fmean(whole["lines"][0]["loss"]), 3)
    printed = "\n".join((table.text(whole), page.curves(shown), page.tried(whole)))
    for line in shown["lines"]:
        assert f"{line['arm']} | {line['settings']} | 2 | {line['loss']['mean']:.3f}" in printed
        assert f"| {' | '.join(f'{loss:.3f}' for loss in line['losses'])} |" in printed
        assert f"{line['right_percent']['mean']:.1f}%" in printed
    assert all(f"| {entry['arm']} | {entry['settings']} |" in printed for entry in whole["tried"])
    for line, percent in zip(shown["lines"], (0.0, 12.5), strict=True):  # eight steps may learn none, or some
        line["right_percent"] = {"mean": percent, "low": percent, "high": percent}
    picture.draw(shown, tmp_path / "picture.png")
    way, right = figures[0].axes
    assert [text.get_text() for text in way.get_legend().get_texts()] == ["adamw", "muon"]
    assert way.lines[0].get_ydata().tolist() == adamw["losses"]
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["adamw", "muon"]
    shown["lines"][1]["right_percent"] = shown["lines"][0]["right_percent"]
    picture.draw(shown, tmp_path / "picture.png")
    assert len(figures[1].axes) == 1  # no bars where no answer is right
    for line, verdict in zip(shown["lines"], ("", "not told apart"), strict=True):
        line["verdict"] = verdict
    best = min(shown["lines"], key=lambda line: line["loss"]["mean"])
    lowest = f"echoes: {best['arm']} has the lowest mean loss, {best['loss']['mean']:.3f}; no difference is shown"
    assert picture.title(shown) == lowest
    shown["lines"][1]["verdict"] = "higher"
    assert picture.title(shown) == "echoes, loss beside that of adamw: muon higher"


def test_a_killed_cell_is_repeated(
    tiny: Claim, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    step = optimizers.OptimizerTrainer._train_step
    calls = itertools.count(1)

    def dying(trainer: Any) -> Any:
        if next(calls) in (4, 10):  # in the first cell, with figures behind its last state; in a later one
            raise KilledError
        return step(trainer)

    monkeypatch.setattr(optimizers.OptimizerTrainer, "_train_step", dying)
    for _ in range(2):
        with pytest.raises(KilledError):
            study_of(tiny, tmp_path / "killed").run(math.inf)
        for metrics in (tmp_path / "killed").glob("runs/*/metrics.jsonl"):
            with metrics.open("a") as file:
                file.write('{"step": 3, "lo')  # as a kill leaves it
    study = study_of(tiny, tmp_path / "killed")
    assert study.run(math.inf)
    assert without_seconds(study.write()) == whole


def test_more_seeds_than_the_rules_go_on_from_those(
    tiny: Claim,
    tmp_path: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(claims.os, "nice", lambda more: 0)
    claims.main(tiny, [str(tmp_path), "--hours", "1"])
    claims.main(tiny, [str(tmp_path), "--hours", "1", "--seeds", "3"])
    report = json.loads((tmp_path / "report-echoes.json").read_text())
    assert report["complete"]
    for line, of_rule in zip(report["lines"], whole["lines"], strict=True):
        assert (line["n"], line["seeds"], line["loss"][:2]) == (3, [0, 1, 2], of_rule["loss"])
        assert line["settings"] == of_rule["settings"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        claims.main(tiny, [str(tmp_path), "--hours", "1", "--seeds", "14"])
    assert "the rule has 2, intervals are of 13 at most; got 14" in capsys.readouterr().err


def test_a_cell_that_becomes_no_number_is_kept_as_failed(
    tiny: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"adamw": ({"rate": 4e-3, "b1": 0.9},), "muon": ({"rate": 1e6, "b1": 0.9},)}
    scale = replace(tiny.scales["cpu"], rungs=(8,), warmup=0, seeds=1)
    study = study_of(replace(tiny, arms=rates, scales={"cpu": scale}), tmp_path)
    assert study.run(math.inf)
    [adamw, muon] = study.write()["lines"]
    assert math.isfinite(adamw["loss"][0])
    assert muon["loss"] == [math.inf]
    assert "inf" in table.text(study.write())


def test_someone_elses_ctrl_c_ends_the_study(tiny: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = cells.CellTrainer._train_step

    def asked(trainer: Any) -> Any:
        trainer._interruption.asked.set()
        return step(trainer)

    monkeypatch.setattr(cells.CellTrainer, "_train_step", asked)
    with pytest.raises(KeyboardInterrupt):
        study_of(tiny, tmp_path).run(math.inf)


# The claims


@pytest.mark.parametrize("name", ["optimizers", "objectives", "architectures", "growth", "lengths"])
def test_every_cell_of_a_claim_has_a_run_file_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim: Claim = importlib.import_module(f"bench.evidence.{name}").CLAIM
    monkeypatch.setitem(sets.SETS, "echoes", echoes)
    for device, scale in claim.scales.items():
        assert claim.reference in claim.arms
        assert list(scale.rungs) == sorted(scale.rungs)
        assert set(scale.data) <= set(sets.SETS)
        small = replace(scale, records=200, heldout=20)
        study = Study(claim, small, "echoes", tmp_path / device)
        counts = itertools.product(claim.arms, range(study.rule.candidates), range(scale.seeds))
        folders = [study.config(Cell(arm, which, seed, study.rule.rungs - 1)).out for arm, which, seed in counts]
        assert len(set(folders)) == len(folders)


def test_growth_spends_its_flops() -> None:
    tokens = tokens_for(1e12, 0.25, small=2e6, large=8e6)
    assert 0.25 * tokens * 2e6 + 0.75 * tokens * 8e6 == pytest.approx(1e12)


def skip_without_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon; 2.9 has it")


def test_muon_steps_as_torchs_own_and_averages() -> None:
    skip_without_muon()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_layers_per_stack": 1, "num_attention_heads": 1}
    model = HRM(HRMConfig(vocab_size=20, head_dim=32, **shape))
    other = copy.deepcopy(model)
    ours = MuonBeside(model, lr=1e-2, momentum=0.9, weight_decay=0.1, ema=0.5)
    matrices = [p for name, p in other.named_parameters() if "_module." in name]
    assert len(matrices) == 8
    theirs = torch.optim.Muon(matrices, lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    averages = [matrix.detach().clone() for matrix in matrices]
    for _ in range(3):
        for mine, same in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            same.grad = 0.5 * mine.grad
        ours.step(grad_scale=torch.tensor([0.5]))
        theirs.step()
        for average, matrix in zip(averages, matrices, strict=True):
            average.lerp_(matrix.detach(), 0.5)
    mine = [p for name, p in model.named_parameters() if "_module." in name]
    assert all(torch.equal(a, b) for a, b in zip(mine, matrices, strict=True))
    with ours.swap_ema():
        assert all(torch.equal(a, b) for a, b in zip(mine, averages, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mine, matrices, strict=True))


# Data


def test_sudokus_have_one_solution_and_none_is_in_both_parts() -> None:
    train, heldout = sets.split(sets.SETS["sudoku4"](), 200, 40)
    assert (len(train), len(heldout)) == (200, 40)
    assert not set(train.values()) & set(heldout.values())
    solved = sets.solved4()
    assert solved.shape == (288, 16)  # as is known of 4 x 4
    for puzzle, answer in itertools.islice(heldout.items(), 10):
        given = [(place, int(cell)) for place, cell in enumerate(puzzle.replace("\n", "")) if cell != "_"]
        assert 4 <= len(given) <= 8
        [only] = [grid for grid in solved.tolist() if all(grid[place] == cell for place, cell in given)]
        assert "".join(map(str, only)) == answer.replace("\n", "")


@pytest.mark.parametrize("name", ["sums", "mazes", "iq"])
def test_sets_have_as_many_questions_as_are_asked_for(name: str) -> None:
    train, heldout = sets.split(sets.SETS[name](), 2500, 30)
    assert (len(train), len(heldout)) == (2500, 30)
    assert not set(train) & set(heldout)
    if name == "sums":
        assert all(eval(asked) == int(answer) for asked, answer in heldout.items())


def test_a_set_with_too_few_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="different questions to train on and"):
        sets.split(itertools.cycle(echoes()), 600, 10)


def test_look_alikes_of_a_sudoku_are_right() -> None:
    rows = [[(3 * (row % 3) + row // 3 + column) % 9 + 1 for column in range(9)] for row in range(9)]
    solution = np.array(rows)
    puzzle = np.where(np.arange(81).reshape(9, 9) % 2, solution, 0)
    random = np.random.default_rng(1)
    found = [sets.look_alike(np.stack([puzzle, solution]), random) for _ in range(50)]
    for asked, answer in found:
        boxes = answer.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
        assert all(
            sorted(part) == list(range(1, 10)) for part in (*answer.tolist(), *answer.T.tolist(), *boxes.tolist())
        )
        assert ((asked == answer) | (asked == 0)).all()
        assert (asked == 0).sum() == (puzzle == 0).sum()
    assert len({answer.tobytes() for _, answer in found}) == 50


def test_the_command_for_a_gpu_says_what_is_missing() -> None:
    done = subprocess.run([ROOT / "bench" / "gpu" / "evidence.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "OUT [--minutes 10]" in done.stderr
    environment = os.environ | {"PYTHON": "false"}
    done = subprocess.run(
        [ROOT / "bench" / "gpu" / "evidence.sh", "out"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
