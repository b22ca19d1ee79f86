"""`hrmcore init`: from records to a run file that trains, and a model that answers, through the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import hrmcore

from hrmcore import planner
from hrmcore.config import HRMConfig
from hrmcore.data import split
from hrmcore.data.prepare import vocabulary_for
from hrmcore.data.records import Corpus
from hrmcore.data.store import open_store
from hrmcore.train import proposal
from hrmcore.train.proposal import Speed
from hrmcore.train.run_file import read_config

FLOPS = 2e9  # a second, of the machine that the tests suppose


@pytest.fixture
def steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of FLOPS in float32, half of it in bfloat16, whatever else runs."""

    def measured(
        model: HRMConfig, corpus: Corpus, batch_tokens: int, precision: str, device: str, seconds: float
    ) -> Speed:
        rate = FLOPS / (1 if precision == "float32" else 2) / proposal.flops_a_token(model, corpus)
        return Speed(rate, batch_tokens / rate, batch_tokens)

    monkeypatch.setattr(proposal, "measured", measured)


def records(path: Path, count: int = 300) -> Path:
    rows = [{"question": f"What is {i} + {i % 7}?", "answer": str(i + i % 7)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


COLUMNS = ("--columns", "instruction=question,response=answer")


@pytest.mark.slow
@pytest.mark.usefixtures("no_peak")
def test_three_commands_lead_from_records_to_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records(tmp_path / "sums.jsonl")
    monkeypatch.setattr(proposal, "_LEAST_STEPS", 1)  # the machine may be busy
    assert hrmcore("init", "sums.jsonl", *COLUMNS, "--hours", "0.002", "--out", "sums.toml") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: hrmcore train sums.toml"
    run_file = tmp_path / "sums.toml"
    config = read_config(run_file)
    text = run_file.read_text()
    run_file.write_text(text.replace(f"steps = {config.steps}\n", "steps = 2\n"))
    assert hrmcore("train", "sums.toml") == 0
    assert capsys.readouterr().err.splitlines()[-1] == "next: hrmcore repl sums/checkpoint"
    assert hrmcore("generate", "What is 3 + 3?", "--model", "sums/checkpoint", "--max-new-tokens", "4") == 0
    [line] = [line for line in map(json.loads, (tmp_path / "sums/metrics.jsonl").open()) if "heldout_loss" in line][-1:]
    assert line["heldout_loss"] > 0


@pytest.mark.usefixtures("steady_machine")
def test_the_run_fits_the_budget_and_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records(tmp_path / "sums.jsonl", 3000)
    sizes = {}
    for hours in (0.01, 0.05, 1, 20):
        out = f"run{hours}.toml"
        assert hrmcore("init", "sums.jsonl", *COLUMNS, "--hours", str(hours), "--out", out) == 0
        config = read_config(out)
        corpus = open_store(config.train_files[0]).corpus
        flops = proposal.flops_a_token(config.model, corpus) * config.steps * config.batch_tokens
        assert flops <= 3600 * hours * FLOPS
        seen = config.steps * config.batch_tokens
        assert seen <= 1.1 * proposal.MOST_EPOCHS * corpus.lengths.sum()
        assert config.precision == "float32"
        assert config.batch_tokens >= corpus.lengths.max()
        sizes[hours] = planner.parameters(config.model)
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes[20] > sizes[0.01]


@pytest.mark.usefixtures("steady_machine")
def test_no_question_is_in_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": conversation(i % 90)} for i in range(400)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert hrmcore("init", "chat.jsonl", "--hours", "0.05") == 0
    heldout = [json.loads(line)["instruction"] for line in (tmp_path / "run-data/heldout.jsonl").open()]
    stores = {name: open_store(tmp_path / "run-data" / name) for name in ("train", "heldout")}
    assert stores["heldout"].manifest["records"] == len(heldout) > 0
    assert sum(store.manifest["records"] for store in stores.values()) == 800
    trained = {tuple(s) for s in prompts(stores["train"].corpus)}
    assert trained.isdisjoint(tuple(s) for s in prompts(stores["heldout"].corpus))
    firsts = {text for text in heldout if not text.startswith("User: ")}
    assert {text.split("\n\n")[0].removeprefix("User: ") for text in heldout} == firsts


def conversation(i: int) -> list[dict[str, str]]:
    texts = (f"What is {i} + 1?", str(i + 1), "And one more?", str(i + 2))
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def prompts(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens[start : start + p].tolist() for start, p in zip(corpus.offsets, corpus.prefix, strict=False)]


@pytest.mark.usefixtures("steady_machine")
def test_without_records_the_puzzles_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(split, "_PUZZLE_SCALE", 0.002)
    assert hrmcore("init", "--hours", "0.05") == 0
    assert "next: hrmcore train run.toml" in capsys.readouterr().out
    first = (tmp_path / "run-data/heldout.jsonl").open().readline()
    assert json.loads(first).keys() == {"instruction", "response", "condition"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hrmcore("init", "--out", "other.toml") == 2
    assert "`pip install hrmcore[demo]` brings it, or name records" in capsys.readouterr().err
    assert not (tmp_path / "other-data").exists()


def test_more_text_has_a_larger_vocabulary() -> None:
    sizes = [vocabulary_for(10**n) for n in range(3, 11)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (384, 32768)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sums.jsonl", "--hours", "0"], "--hours must be above 0, got 0"),
        (["sums.jsonl", "--context", "0"], "--context must be at least 1, got 0"),
        (["sums.jsonl", "--out", "run.json"], "run.json: a run file's name must end in .toml"),
        (["sums.jsonl", "--out", "there.toml"], "there.toml: exists already; remove it or name another --out"),
        (["sums.jsonl"], "no keys of a known shape, but question, answer; --columns"),
        (["none.jsonl"], "none.jsonl: No such file or directory"),
        (["sums.jsonl", *COLUMNS, "--hours", "0.000001"], "steps of the smallest model; give at least --hours"),
    ],
)
@pytest.mark.usefixtures("steady_machine")
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    records(tmp_path / "sums.jsonl")
    (tmp_path / "there.toml").touch()
    assert hrmcore("init", *arguments) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("hrmcore init: ")
    assert message in err
