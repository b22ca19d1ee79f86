"""Records as people have them: shapes, kinds of files, and what a wrong file is told. Each through the command."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.command_line import hrmcore
from support.records import PAIRS, PLAIN, Prepare, expected, lines, sequences

from hrmcore.chat import render
from hrmcore.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <eoa>"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
]


SHAPES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "plain": lambda q, a: {"instruction": q, "response": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt": lambda q, a: {"prompt": q, "completion": a},
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "parts": lambda q, a: {
        "messages": [
            {"role": "system", "content": " "},
            {"role": "user", "content": [{"type": "text", "text": q}]},
            {"role": "assistant", "content": a},
        ]
    },
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_makes_the_same_records(shape: str, prepared: Prepare, tokenizer: Path, tmp_path: Path) -> None:
    store = prepared(lines(tmp_path / "a.jsonl", [SHAPES[shape](*pair) for pair in PAIRS]))
    assert sequences(store) == expected(tokenizer, PAIRS)


def table(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, PLAIN[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(PLAIN)


def squeezed(path: Path, squeeze: Callable[[bytes], bytes]) -> None:
    path.write_bytes(squeeze("".join(json.dumps(row) + "\n" for row in PLAIN).encode()))


def zstandard(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: lines(path, PLAIN),
    "array.json": lambda path: path.write_text("\n" + json.dumps(PLAIN, indent=1), encoding="utf-8-sig"),
    "lines.json": lambda path: lines(path, PLAIN),
    "csv": table,
    "tsv": lambda path: table(path, "\t"),
    "parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(PLAIN), path),
    "jsonl.gz": lambda path: squeezed(path, gzip.compress),
    "jsonl.bz2": lambda path: squeezed(path, bz2.compress),
    "jsonl.xz": lambda path: squeezed(path, lzma.compress),
    "jsonl.zst": lambda path: squeezed(path, zstandard),
    "json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(PLAIN).encode())),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_makes_the_same_records(
    kind: str, prepared: Prepare, tokenizer: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"sums.{kind}"
    WRITERS[kind](path)
    store = prepared(path)
    assert sequences(store) == expected(tokenizer, PAIRS)
    [source] = store.manifest["sources"].values()
    assert (source["read"], source["kept"]) == (20, 20)
    assert source["files"][0]["bytes"] == path.stat().st_size


def test_a_conversation_is_a_record_for_each_answer(
    prepared: Prepare, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": CHAT, "condition": "cot"}, {"messages": [*CHAT[1:], {"role": "user", "content": "Bye"}]}]
    store = prepared(lines(tmp_path / "chat.jsonl", rows), "--show", "1")
    ids = Tokenizer.load(tokenizer)
    wanted = [
        ("Be brief.\n\nUser: Hello <eoa>", "Hi.", "cot"),
        ("Be brief.\n\nUser: Hello <eoa>\n\nAssistant: Hi.\n\nUser: What is 1 + 1?", "2", "cot"),
        ("Hello <eoa>", "Hi.", "direct"),
        ("User: Hello <eoa>\n\nAssistant: Hi.\n\nUser: What is 1 + 1?", "2", "direct"),
    ]
    assert wanted[1][0] == render(CHAT[:4])
    found = sequences(store)
    assert found == [[*ids.prompt(q, c), *ids.encode(a), ids.eoa] for q, a, c in wanted]
    assert store.corpus.prefix.tolist() == [len(ids.prompt(q, c)) for q, _, c in wanted]
    assert found[0].count(ids.eoa) == 1  # what is spelled like a control token stays text
    out = capsys.readouterr().out
    assert "record 0: " in out
    assert "\x1b" not in out
    assert f"  loss   {len(found[0]) - store.corpus.prefix[0]:>5}  " in out
    assert "chat: 4 of 5 records kept\n  2 conversations: a record for each answer in them\n" in out
    assert "1 left out: message 5 (user): no assistant answers it; the turns before it are used (chat.jsonl:2)" in out


def test_columns_and_patterns(prepared: Prepare, tokenizer: Path, tmp_path: Path) -> None:
    for name, part in (("a", PAIRS[:7]), ("b", PAIRS[7:])):
        lines(tmp_path / f"{name}.jsonl", [{"question": q, "answer": a, "input": "left alone"} for q, a in part])
    store = prepared(tmp_path / "*.jsonl", "--columns", "instruction=question, response=answer,input=more")
    assert sequences(store) == expected(tokenizer, PAIRS)
    assert list(store.manifest["sources"]) == ["a", "b"]
    chat = lines(tmp_path / "c.jsonl", [{"dialog": CHAT[1:3]}])
    assert sequences(prepared(chat, "--columns", "messages=dialog")) == expected(tokenizer, [("Hello <eoa>", "Hi.")])


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


ORDER = "a message of the user must come here"
# A second line, after a good one of the same shape: what the command says of it, summary and --strict alike.
BAD_SECOND: list[tuple[dict[str, Any], bytes | dict[str, Any], str]] = [
    (PLAIN[0], {"prompt": "a", "completion": "b"}, "it has 'prompt' and 'completion', the first record of the file"),
    (PLAIN[0], {"question": "a"}, "'instruction' is missing or not a string"),
    (PLAIN[0], b'{"instruction": "\xff", "response": "b"}', "not JSON: bytes that are not UTF-8"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "'output' is empty"),
    ({"prompt": "a", "completion": "b"}, {"prompt": ["a"], "completion": "b"}, "'prompt' is missing or not a string"),
    (turns("user", "assistant"), turns("assistant"), f"message 1 (assistant): {ORDER}"),
    (turns("user", "assistant"), turns("user", "user"), "message 2 (user): a message of the assistant must come here"),
    (turns("user", "assistant"), turns("user", "system", "assistant"), "message 2 (system): a message of the assist"),
    (turns("user", "assistant"), turns("user", "tool"), "message 2: the role 'tool' is none of"),
    (turns("user", "assistant"), turns("user"), "no message of the assistant"),
    (turns("user", "assistant"), turns("user", "assistant", "user"), "message 3 (user): no assistant answers it"),
    (turns("user", "assistant"), {"messages": []}, "'messages' is empty"),
    (turns("user", "assistant"), {"messages": "a"}, "'messages' is missing or not a list of messages"),
    (turns("user", "assistant"), {"messages": ["a"]}, "message 1: not an object with role and content"),
    (turns("user", "assistant"), {"messages": [{"role": "user"}]}, "message 1 (user): the content is missing"),
    (
        turns("user", "assistant"),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n"}]},
        "message 2 (assistant) is empty",
    ),
    (PLAIN[0], {"instruction": "a" * 900, "response": "b"}, "longer than the context of 256 tokens; raise it or"),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD_SECOND)
def test_a_bad_record_is_counted_with_its_place_or_fatal(
    good: dict[str, Any],
    bad: bytes | dict[str, Any],
    reason: str,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n" + (bad if isinstance(bad, bytes) else json.dumps(bad).encode()))
    arguments = [
        "prepare",
        str(path),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "1",
        "--context",
        "256",
        "--out",
    ]
    assert hrmcore(*arguments, str(tmp_path / "store"), "--strict") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"hrmcore prepare: {path}:2")
    assert reason in err
    assert hrmcore(*arguments, str(tmp_path / "store")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert line.startswith(f"  1 left out: {reason}")
    assert "(a.jsonl:2" in line


# A file that cannot be read at all: its name, its bytes, and the one line.
WRONG_FILES: list[tuple[str, bytes, str]] = [
    ("a.csv", b"", "a.csv:1: a first line with the columns' names is missing"),
    ("a.csv", b"question,answer\na,b\n", "a.csv: no column 'instruction'; its columns are question, answer; --columns"),
    ("a.csv", b"instruction,response\na,b\nc,d,e\n", "a.csv:3: has 3 cells, the first line names 2 columns; quote"),
    ("a.csv", b'instruction,response\n"a\nb",c\nd,\xff\n', "a.csv:4: not UTF-8; save the file as UTF-8"),
    ("a.csv", b'instruction,response\na,"b\n', "a.csv:2: not CSV (unexpected end of data)"),
    ("a.json", b'[\n{"a": 1},\n{"a": \n]', "a.json:3: not JSON: the array's element that begins here is not whole"),
    ("a.json", b'[\n{"a": 1},\n' + b"[" * 200_000, "a.json:3: not JSON: brackets within brackets, too deep"),
    ("a.json", b'[\n{"a": 1}\n{"a": 1}]', "a.json:3: not JSON: a comma or the array's end is missing"),
    ("a.json", b"[] x", "a.json: text follows the array's end"),
    ("a.json", b'[\n"\xff"]', "a.json:2: not UTF-8; save the file as UTF-8"),
    ("a.jsonl.gz", b"plain text", "a.jsonl.gz: the compressed file is damaged or cut short"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9],
        "a.jsonl.gz: the compressed file is damaged or cut short",
    ),
    ("a.jsonl.xz", b"plain text", "a.jsonl.xz: the compressed file is damaged or cut short"),
    ("a.jsonl.bz2", b"plain text", "a.jsonl.bz2: the compressed file is damaged or cut short"),
    ("a.jsonl.zst", b"plain text", "a.jsonl.zst: the compressed file is damaged or cut short"),
    ("a.parquet.gz", b"", "a.parquet.gz: Parquet compresses its own columns; unpack the file"),
    ("a.jsonl", b'{"question": "a", "answer": "b"}\n', "no keys of a known shape, but question, answer; --columns"),
    ("a.jsonl", b"", "no usable record: the files are empty"),
]


@pytest.mark.parametrize("which", [["--tokenizer", "TOKENIZER"], ["--new-tokenizer", "300"]], ids=["given", "new"])
@pytest.mark.parametrize(("name", "data", "message"), WRONG_FILES)
def test_a_wrong_file_is_one_line(
    name: str,
    data: bytes,
    message: str,
    which: list[str],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(data)
    which = [str(tokenizer) if word == "TOKENIZER" else word for word in which]
    assert hrmcore("prepare", str(tmp_path / name), *which, "--out", str(tmp_path / "store"), "--workers", "1") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "instruction"], "--columns must be NAME=KEY,NAME=KEY, got 'instruction'"),
        (["--columns", "response=a,response=b"], "--columns names 'response' twice"),
        (["--columns", "answer=b"], "--columns: 'answer' is none of instruction, response, context, input"),
        (
            ["--columns", "messages=m,response=a"],
            "--columns: name messages, or text, or instruction and response, not two",
        ),
        (["--columns", "messages=m,text=a"], "--columns: name messages, or text, or instruction and response, not two"),
        (["none*.jsonl"], "none*.jsonl: no file matches it"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "a.jsonl", PLAIN)
    given = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "store")]
    assert hrmcore("prepare", str(path), *arguments, *given) == 2
    assert message in capsys.readouterr().err
