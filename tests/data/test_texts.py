"""Plain text to go on pretraining with, and mixes of sources. Each through the command."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path

import pytest
from support.command_line import hrmcore
from support.records import PAIRS, PLAIN, Prepare, expected, lines, sequences
from support.runs import metrics, write_run

from hrmcore.data.store import Store
from hrmcore.tokenizer import Tokenizer

TEXTS = ["The sun <eoa> rose.\n\nIt was  late é.", "Be brief. " * 60]


def predicted(store: Store) -> list[tuple[list[int], list[int]]]:
    """(prefix, targets) of every sequence."""
    pairs = zip(sequences(store), store.corpus.prefix.tolist(), strict=True)
    return [(sequence[:prefix], sequence[prefix:]) for sequence, prefix in pairs]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "txt.gz", "columns"])
def test_a_text_is_predicted_whole_each_token_once(
    kind: str, prepared: Prepare, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "body" if kind == "columns" else "text"
    if kind.startswith("txt"):
        files: list[str | Path] = [tmp_path / f"{number}.{kind}" for number in range(2)]
        for file, text in zip(files, TEXTS, strict=True):
            Path(file).write_bytes(text.encode() if kind == "txt" else gzip.compress(text.encode()))
    else:
        files = [lines(tmp_path / "texts.jsonl", [{key: text, "id": 3} for text in TEXTS])]
        files += ["--columns", "text=body"] if kind == "columns" else []
    store = prepared(*files, "--context", "64")
    ids = Tokenizer.load(tokenizer)
    wanted = [[*ids.encode(text), ids.eoa] for text in TEXTS]
    assert all(prefix == [ids.boq, *ids.conditions("direct"), ids.eoq] for prefix, _ in predicted(store))
    found = [targets for _, targets in predicted(store)]
    assert [token for targets in found for token in targets] == [token for text in wanted for token in text]
    assert found[0] == wanted[0]  # short: one piece; what is spelled like a control token stays text
    assert found[0].count(ids.eoa) == 1
    pieces = [len(targets) for targets in found[1:]]
    assert len(pieces) == -(-len(wanted[1]) // (64 + 1 - 3))
    assert max(pieces) - min(pieces) <= 1
    assert max(store.corpus.lengths) <= 64
    out = capsys.readouterr().out
    assert sum(int(found) for found in re.findall(r"(\d+) texts, each in pieces that the context of 64", out)) == 2


def test_texts_can_be_trained_on(prepared: Prepare, tokenizer: Path, tmp_path: Path) -> None:
    """From the file and from a store alike, by a model that reads both ways and by a causal one on all tokens."""
    text = tmp_path / "book.txt"
    text.write_text("\n".join(f"{q} {a}." for q, a in PAIRS), encoding="utf-8")
    store = prepared(text, "--context", "64")
    losses = []
    for number, source in enumerate((text, store.folder)):
        run = write_run(tmp_path / f"run{number}", [], tokenizer, train_files=[str(source)], steps=2, batch_tokens=64)
        assert hrmcore("train", str(run)) == 0
        losses.append([row["loss"] for row in metrics(run.parent / "out")])
    assert losses[0] == losses[1]
    keys = {"train_files": [str(text)], "steps": 1, "batch_tokens": 64, "objective": "all"}
    causal = write_run(tmp_path / "causal", [], tokenizer, {"prefix_lm": False}, **keys)
    assert hrmcore("train", str(causal)) == 0
    [row] = metrics(causal.parent / "out")
    assert row["supervised_tokens"] == row["tokens"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n", "a.txt:1: 'text' is empty"),
        ("a.txt", b"good\n\xff", "a.txt:2: not UTF-8; save the file as UTF-8"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: 'text' is missing or not a string"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            "a.jsonl:2: it has 'prompt' and 'completion'",
        ),
    ],
)
def test_a_wrong_text_is_one_line(
    name: str, data: bytes, message: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    arguments = ["--tokenizer", str(tokenizer), "--workers", "1", "--strict", "--out", str(tmp_path / "store")]
    assert hrmcore("prepare", str(tmp_path / name), *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# Mixes


@pytest.mark.parametrize("weight", [1, 2, 2.5, 0.25])
def test_a_weight_says_how_often_records_come(
    weight: float, prepared: Prepare, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, others = lines(tmp_path / "a.jsonl", PLAIN[:8]), lines(tmp_path / "b.jsonl", PLAIN[8:])
    store = prepared(chosen, others, "--weight", f"a={weight}")
    found = Counter(map(tuple, sequences(store)))
    wanted = [tuple(sequence) for sequence in expected(tokenizer, PAIRS)]
    assert [found[sequence] for sequence in wanted[8:]] == 12 * [1]
    counts = [found[sequence] for sequence in wanted[:8]]
    assert sum(counts) == 8 * weight
    assert max(counts) - min(counts) <= 1
    assert sum(found.values()) == store.manifest["records"] == 12 + 8 * weight
    out = capsys.readouterr().out
    assert f"weight {weight:g}: an epoch sees each {weight:g} times" in out
    if weight == 0.25:
        assert "6 left out: beyond the cap of 2" in out
    hrmcore_again = prepared(chosen, others, "--weight", f"a={weight}")
    assert sequences(hrmcore_again) == sequences(store)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "--weight must be NAME=W with W a number, as chat=2.5, got 'a'"),
        (["a=x"], "--weight must be NAME=W"),
        (["a=nan"], "--weight must be NAME=W"),
        (["a=0"], "--weight a=0 must be above 0 and at most 100"),
        (["a=101"], "--weight a=101 must be above 0"),
        (["b=2"], "--weight names 'b', but the sources are a"),
        (["a=2", "a=3"], "--weight names 'a' twice"),
    ],
)
def test_a_wrong_weight_is_one_line(
    given: list[str], message: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "a.jsonl", PLAIN)
    weights = [word for weight in given for word in ("--weight", weight)]
    assert hrmcore("prepare", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "s"), *weights) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hrmcore prepare: {message}")
