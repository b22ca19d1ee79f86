"""Records, their token form and packing. Oracles: the definitions in training.md, recomputed record by record."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pytest
import reasoning_gym
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hrmcore.data.packing import PackedBatch, epoch_batches, pack, share
from hrmcore.data.records import Corpus, Fault, KeyCounts, Record, Rejected, parse_record, read_records, tokenize
from hrmcore.data.store import load_corpus
from hrmcore.tokenizer import Tokenizer, train_tokenizer

TASKS = {"mini_sudoku": 60, "spell_backward": 60, "letter_counting": 60, "chain_sum": 60, "gcd": 60}


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for task, size in TASKS.items():
            for item in reasoning_gym.create_dataset(task, size=size, seed=3):
                file.write(json.dumps({"instruction": item["question"], "response": item["answer"]}) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(records_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = (json.loads(line)["instruction"] for line in records_file.read_text(encoding="utf-8").splitlines())
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


@pytest.fixture(scope="module")
def corpus(records_file: Path, tokenizer: Tokenizer) -> Corpus:
    rejected = Rejected()
    corpus = tokenize(read_records(records_file, rejected), tokenizer, 1024, rejected)
    assert not rejected.counts
    return corpus


def test_a_sequence_is_framed_as_designed(records_file: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
    first = json.loads(records_file.read_text(encoding="utf-8").splitlines()[0])
    sequence = corpus.tokens[: corpus.offsets[1]].tolist()
    prefix = int(corpus.prefix[0])
    assert sequence[0] == tokenizer.boq
    assert sequence[1] == tokenizer.condition_ids["direct"]
    assert sequence[prefix - 1] == tokenizer.eoq
    assert sequence[-1] == tokenizer.eoa
    assert tokenizer.decode(sequence[2 : prefix - 1]) == first["instruction"]
    assert tokenizer.decode(sequence[prefix:-1]) == first["response"]


def test_a_batch_supervises_response_and_eoa_only(tokenizer: Tokenizer, corpus: Corpus) -> None:
    chosen = [5, 0, 250]
    batch = pack(corpus, chosen)
    assert batch.records == (5, 0, 250)
    row = 0
    for number, record in enumerate(chosen):
        sequence = corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]].tolist()
        start, stop = int(batch.offsets[number]), int(batch.offsets[number + 1])
        assert batch.ids[start:stop].tolist() == sequence[:-1]
        assert batch.positions[start:stop].tolist() == list(range(len(sequence) - 1))
        assert int(batch.prefix[number]) == corpus.prefix[record]
        response = sequence[corpus.prefix[record] :]
        assert batch.targets[row : row + len(response)].tolist() == response
        # the last instruction token predicts the first response token
        assert batch.supervised[row].item() == start + corpus.prefix[record] - 1
        assert torch.equal(
            batch.supervised[row : row + len(response)] + 1, torch.arange(stop - len(response), stop) + 1
        )
        row += len(response)
    assert row == len(batch.targets) == len(batch.supervised)


def test_filling_up_adds_unsupervised_sequences_no_longer_than_a_record(corpus: Corpus) -> None:
    plain, filled = pack(corpus, [5, 0, 250]), pack(corpus, [5, 0, 250], multiple=1024)
    length, longest = len(plain.ids), int(plain.offsets.diff().max())
    added = -(-(1024 - length) // longest)
    assert added > 1
    assert len(filled.ids) == int(filled.offsets[-1]) == 1024
    assert int(filled.offsets.diff().max()) == longest
    assert torch.equal(filled.ids[:length], plain.ids)
    assert torch.equal(filled.offsets[:-added], plain.offsets)
    assert torch.equal(filled.supervised, plain.supervised)
    assert torch.equal(filled.targets, plain.targets)
    assert filled.prefix.tolist() == [*plain.prefix.tolist(), *[0] * added]


def test_real_lengths_fill_the_slots(corpus: Corpus) -> None:
    lengths = np.tile(corpus.lengths, 40)
    batches = list(epoch_batches(lengths, 4096, seed=0, epoch=0))
    used = sum(int(lengths[batch].sum()) for batch in batches[:-1])
    assert used / (4096 * (len(batches) - 1)) >= 0.99


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=300),
    capacity=st.integers(100, 400),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_record_once(lengths: list[int], capacity: int, seed: int, epoch: int) -> None:
    array = np.asarray(lengths, dtype=np.int64)
    batches = list(epoch_batches(array, capacity, seed, epoch))
    assert sorted(record for batch in batches for record in batch) == list(range(len(lengths)))
    assert all(array[batch].sum() <= capacity for batch in batches)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=60), ranks=st.integers(1, 9), data=st.data())
def test_ranks_share_a_batch(lengths: list[int], ranks: int, data: st.DataObject) -> None:
    array = np.asarray(lengths, dtype=np.int64)
    batch = data.draw(st.permutations(range(len(lengths))))
    shares = [share(array, batch, rank, ranks) for rank in range(ranks)]
    assert sorted(record for own in shares for record in own) == list(range(len(lengths)))
    assert all(own == sorted(own, key=batch.index) for own in shares)
    loads = [int(array[own].sum()) for own in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)  # of greedy choices
    if len(lengths) >= ranks:
        assert all(shares)


def test_the_longest_records_are_shared_first() -> None:
    lengths = np.asarray([1, 1, 1, 1, 4])
    assert [share(lengths, [0, 1, 2, 3, 4], rank, 2) for rank in (0, 1)] == [[4], [0, 1, 2, 3]]
    assert [share(lengths, [4], rank, 2) for rank in (0, 1)] == [[4], []]


def test_the_order_depends_on_seed_and_epoch_alone(corpus: Corpus) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(epoch_batches(corpus.lengths, 2048, seed, epoch))

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_a_record_longer_than_a_batch_is_named(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="batch_tokens is 8, but a record has"):
        next(epoch_batches(corpus.lengths, 8, seed=0, epoch=0))


BAD_LINES = {
    "{": "not JSON",
    "[1]": "not a JSON object",
    '{"instruction": "a"}': "'response' is missing or not a string",
    '{"instruction": 3, "response": "b"}': "'instruction' is missing or not a string",
    '{"instruction": "a", "response": " "}': "'response' is empty",
    '{"instruction": "a", "response": "b", "condition": 1}': "'condition' is not a string",
    '{"instruction": "a", "input": ["c"], "response": "b"}': "'input' is not a string",
    '{"instruction": "a", "context": 7, "response": "b"}': "'context' is not a string",
    '{"instruction": "a", "response": "b", "condition": "loud"}': "unknown condition 'loud'",
    '{"instruction": "' + "a " * 600 + '", "response": "b"}': "longer than the context",
    '{"instruction": "\\ud800", "response": "b"}': "surrogate",
}


# What is wrong with the JSON, and the column of the character where it is.
NOT_JSON: dict[bytes, tuple[str, int | None]] = {
    b"": ("a blank line", None),
    b" \t": ("a blank line", None),
    b'{"instruction": "a\x01", "response": "b"}': ("not JSON: an unescaped control character", 19),
    '{"instruction": "é😀\t", "response": "b"}'.encode(): (
        "not JSON: an unescaped control character",
        20,
    ),
    b'{"instruction": "a", "response": "b"': ("not JSON: expecting ',' delimiter", 37),
    b'{"instruction": "a", "response": "b': ("not JSON: unterminated string", 34),
    b'{"instruction": "\\x", "response": "b"}': ("not JSON: invalid \\escape", 18),
    b'{"instruction": "a", "response": "b"} {}': ("not JSON: extra data", 39),
    b"oops": ("not JSON: expecting value", 1),
    b"\xc3\xa9\xff\xfe": ("not JSON: bytes that are not UTF-8", 2),
    b"[" * 100_000: ("not JSON: brackets within brackets, too deep", None),
    b"1" * 5000: ("not JSON: a number of too many digits", None),
}


@pytest.mark.parametrize("line", NOT_JSON, ids=range(len(NOT_JSON)))
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=["lf", "crlf", "end"])
def test_what_is_not_json_is_named_with_its_column(line: bytes, end: bytes, tmp_path: Path) -> None:
    reason, column = NOT_JSON[line]
    assert parse_record(line + end, "file:2") == Fault(reason, column)
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"instruction": "a", "response": "b"}\n' + (line + end or b"\n"))
    rejected = Rejected()
    assert len(list(read_records(path, rejected))) == 1
    place = f"{path}:2" if column is None else f"{path}:2:{column}"
    assert rejected.report() == [f"1 left out: {reason} ({place})"]
    with pytest.raises(ValueError, match=re.escape(f"{place}: {reason}")):
        list(read_records(path, rejected, strict=True))


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_counted_and_placed(line: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "good", "response": "one"}\n' + line + "\n", encoding="utf-8")
    rejected = Rejected()
    corpus = tokenize(read_records(path, rejected), tokenizer, 256, rejected)
    assert len(corpus) == 1
    [report] = rejected.report()
    assert BAD_LINES[line] in report
    assert f"{path}:2" in report
    with pytest.raises(ValueError, match=f"{path}:2:.*{BAD_LINES[line]}"):
        tokenize(read_records(path, rejected, strict=True), tokenizer, 256, rejected, strict=True)


def test_context_and_input_follow_the_instruction_after_a_blank_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, table = tmp_path / "records.jsonl", tmp_path / "records.parquet"
    rows: list[dict[str, str | None]] = [
        {"instruction": "Translate.", "input": "un chat", "response": "a cat", "id": "1"},
        {"instruction": "When?", "context": "In 1066 he came.\n", "response": "1066"},
        {"instruction": "Both", "input": "second", "context": "first", "response": "c"},
        {"instruction": "Neither", "input": "", "context": " \n", "response": "d"},
        {"instruction": "Neither", "input": None, "context": None, "response": "d"},
    ]
    expected = ["Translate.\n\nun chat", "When?\n\nIn 1066 he came.\n", "Both\n\nfirst\n\nsecond", "Neither", "Neither"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), table)
    for file in (path, table):
        assert [record.instruction for record in read_records(file, Rejected(), strict=True)] == expected
    said: list[str] = []
    corpus, _ = load_corpus([str(path)], tokenizer, 256, said.append)
    prompt = corpus.tokens[: corpus.prefix[0]].tolist()
    assert prompt == tokenizer.prompt("Translate.\n\nun chat")
    assert said == [
        "2 have 'input': it follows the instruction after a blank line",
        "2 have 'context': it follows the instruction after a blank line",
        "not used: 'id' (1)",
    ]


def test_keys_of_every_record_its_own_do_not_pile_up() -> None:
    keys = KeyCounts()
    for number in range(1000):
        keys.add(Record("a", "b", "direct", "file:1", unused=(f"key {number}", "id")))
    assert len(keys.unused) == 64
    assert keys.unused["id"] == 1000
    assert keys.report()[0].endswith("…")


def test_a_report_stays_short() -> None:
    rejected = Rejected()
    for number in range(100):
        rejected.add(f"file:{number}", f"reason {number % 20}" if number < 60 else "the commonest")
    lines = rejected.report()
    assert lines[:2] == [
        "40 left out: the commonest (file:60, file:61, file:62…)",
        "3 left out: reason 0 (file:0, file:20, file:40)",
    ]
    assert lines[8:] == ["39 left out for 13 other reasons"]


def test_no_usable_record_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("oops\n", encoding="utf-8")
    rejected = Rejected()
    with pytest.raises(ValueError, match=f"no usable record: 1 left out: not JSON: expecting value .*{path}:1:1"):
        tokenize(read_records(path, rejected), tokenizer, 256, rejected)


def test_a_parquet_row_is_the_record_that_its_json_line_would_be(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": f"say ü {i}", "response": str(i), "condition": "cot" if i % 3 else None, "id": i}
        for i in range(3000)
    ]
    rows[1]["response"] = " "
    rows[2]["instruction"] = None
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    given = ({name: value for name, value in row.items() if value is not None} for row in rows)
    lines.write_text("".join(json.dumps(row) + "\n" for row in given))
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=700)
    expected, found = Rejected(), Rejected()
    theirs = list(read_records(lines, expected))
    ours = list(read_records(table, found))
    assert [dataclasses.replace(r, source=r.source.replace(".parquet", ".jsonl")) for r in ours] == theirs
    assert len(ours) == 2998
    assert ours[0].source == f"{table}:1"
    assert found.counts == expected.counts
    with pytest.raises(ValueError, match=r"a\.parquet:2: 'response' is empty"):
        list(read_records(table, Rejected(), strict=True))


def test_a_parquet_file_that_holds_no_records_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(FileNotFoundError, match=r"a\.parquet"):
        list(read_records(path, Rejected()))
    path.write_bytes(b"not a table" * 100)
    with pytest.raises(ValueError, match=r"a\.parquet: .*[Pp]arquet"):
        list(read_records(path, Rejected()))
    parquet.write_table(pyarrow.table({"instruction": ["a"], "answer": ["b"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'response'; its columns are instruction, answer"):
        list(read_records(path, Rejected()))
    parquet.write_table(pyarrow.table({"instruction": [b"a"], "response": [1]}), path)
    rejected = Rejected()
    assert not list(read_records(path, rejected))
    assert rejected.counts == {"'instruction' is missing or not a string": 1}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: pyarrow is not installed; `pip install hrmcore\[parquet\]`"):
        list(read_records(path, Rejected()))


def test_a_batch_goes_to_a_gpu_through_pinned_memory() -> None:
    """No copy waits, since none is from pageable memory."""
    fields = {
        name: mock.Mock(device=torch.device("cpu")) for name in PackedBatch.__dataclass_fields__ if name != "records"
    }
    moved = PackedBatch(**fields, records=(3,)).to(torch.device("cuda", 1))
    for name, tensor in fields.items():
        assert getattr(moved, name) is tensor.pin_memory.return_value.to.return_value
        tensor.pin_memory.return_value.to.assert_called_once_with(torch.device("cuda", 1), non_blocking=True)
        tensor.to.assert_not_called()
    assert moved.records == (3,)
