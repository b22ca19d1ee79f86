"""What is read is held piece by piece: long lines, arrays on one line, quotes that nothing closes, endless faults."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from hrmcore.data import files
from hrmcore.data.files import read_rows
from hrmcore.data.prepare import prepare
from hrmcore.data.records import Rejected, read_records
from hrmcore.durable import sha256_of
from hrmcore.limits import MOST_PARSED, read_bounded
from hrmcore.tokenizer import train_tokenizer

GOOD = {"instruction": "what is 3?", "response": "three"}


def test_a_line_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    train_tokenizer([f"what is {n}? three" for n in range(200)], tmp_path / "tokenizer", vocab_size=290)
    short = json.dumps(GOOD).encode() + b"\n"
    for name, pack in (("a.jsonl", bytes), ("b.jsonl.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(short + b'{"instruction": "' + b"a" * MOST_PARSED + b'"}\n' + short))
        rejected = Rejected()
        found = [record.source for record in read_records(path, rejected)]
        assert found == [f"{path}:1", f"{path}:3"]
        assert rejected.report() == [f"1 left out: longer than the 4194304 bytes that a record may have ({path}:2)"]
        store = prepare([path], tmp_path / f"store {name}", tokenizer=tmp_path / "tokenizer", workers=1)
        assert store.manifest["records"] == 2
        source = store.manifest["sources"][name[0]]
        assert source["files"] == [{"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}]


def test_an_array_is_read_as_a_whole_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    path = tmp_path / "a.json"
    for _ in range(60):
        values = [
            chance.choice([1234567, -1.5e3, True, None, "é\U0001f600]", [[], {}], {"a": ["x" * chance.randrange(40)]}])
            for _ in range(chance.randrange(8))
        ]
        text = json.dumps(values, indent=chance.choice([None, 0, 3]), ensure_ascii=chance.random() < 0.5)
        path.write_text("\n" * chance.randrange(3) + text + chance.choice(["", "\n "]), encoding="utf-8-sig")
        monkeypatch.setattr(files, "_CHUNK", chance.choice([3, 7, 64]))
        rows = list(read_rows(path))
        assert [json.loads(row.line) for row in rows] == values
        whole = path.read_text(encoding="utf-8-sig")
        for row in rows:  # it begins on the line that it says
            start = whole.split("\n")[row.number - 1 :]
            assert row.line.decode() in "\n".join(start)
        assert [row.number for row in rows] == sorted(row.number for row in rows)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'["' + b"a" * (2 * MOST_PARSED), "a.json:1: not JSON: the array's element that begins here is not"),
        (
            "a.csv",
            b'instruction,response\na,b\n"' + b"a\n" * MOST_PARSED,
            "a.csv:3: the row that begins here is",
        ),
        ("a.csv", b"a" * (MOST_PARSED + 9), "a.csv:1: a line of more than 4194304 bytes"),
    ],
)
def test_what_does_not_end_is_one_error(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name, Rejected()))


def test_faults_without_end_are_counted_together() -> None:
    rejected = Rejected()
    for number in range(5000):
        rejected.add("a:1", f"fault {number}" + "x" * 1000)
    assert len(rejected.counts) < 300
    assert sum(rejected.counts.values()) == 5000
    assert max(map(len, rejected.counts)) < 500


def test_a_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * 11)
    assert read_bounded(path, 11) == b" " * 11
    with pytest.raises(ValueError, match=r"config\.json: larger than the 10 bytes"):
        read_bounded(path, 10)
