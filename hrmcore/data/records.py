"""Instruction-response records and their token form.

A record is one JSON object a line: {"instruction": str, "response": str, "condition": "direct"}; other keys are left
alone. Or a row of a .parquet file with columns of these names. Its sequence is
`<boq> condition… instruction <eoq> response <eoa>`: the instruction is the bidirectional prefix, the loss is on
response and eoa. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hrmcore.tokenizer import Tokenizer

PARQUET = ".parquet"  # the suffix of such a file's name
_ROWS = 1024  # rows of it that are held at once


@dataclass(frozen=True)
class Record:
    """One instruction-response pair and where it stands (file:line)."""

    instruction: str
    response: str
    condition: str
    source: str


@dataclass
class Rejected:
    """Lines that were left out, counted by reason; the first few of each are kept to be shown."""

    shown_per_reason: int = 3
    shown_reasons: int = 8
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= self.shown_per_reason:
            self.examples.setdefault(reason, []).append(source)

    def report(self) -> list[str]:
        """One line a reason, the commonest first: how many, why, and where the first ones stand."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        lines = []
        for reason, n in ordered[: self.shown_reasons]:
            places = ", ".join(self.examples[reason]) + ("…" if n > len(self.examples[reason]) else "")
            lines.append(f"{n} left out: {reason} ({places})")
        if rest := ordered[self.shown_reasons :]:
            lines.append(f"{sum(n for _, n in rest)} left out for {len(rest)} other reasons")
        return lines


def read_records(path: str | Path, rejected: Rejected, strict: bool = False) -> Iterator[Record]:
    """Records of a JSON-lines or Parquet file. A bad line or row is counted in `rejected`, or a ValueError if `strict`.

    Raises as `read_lines` does.
    """
    for number, line in enumerate(read_lines(path), start=1):
        source = f"{path}:{number}"
        record = parse_record(line, source)
        if isinstance(record, Record):
            yield record
        elif strict:
            raise ValueError(f"{source}: {record}")
        else:
            rejected.add(source, record)


def read_lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a JSON-lines file; of a .parquet file the rows, each as the JSON line that it would be.

    Raises FileNotFoundError when there is no such file; for Parquet ValueError when it is none, lacks a
    column or pyarrow is not installed.
    """
    if Path(path).suffix == PARQUET:
        yield from _parquet_lines(Path(path))
        return
    with Path(path).open("rb") as file:
        yield from file


def _parquet_lines(path: Path) -> Iterator[bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: pyarrow is not installed; `pip install hrmcore[parquet]` brings it") from error
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            if missing := [name for name in ("instruction", "response") if name not in found]:
                raise ValueError(f"no column {missing[0]!r}; its columns are {', '.join(found)}")
            columns = [name for name in ("instruction", "response", "condition") if name in found]
            for batch in file.iter_batches(_ROWS, columns=columns):
                for row in batch.to_pylist():
                    given = {name: value for name, value in row.items() if value is not None}
                    yield json.dumps(given, default=lambda _: None).encode()  # what JSON lacks is no string either
    except (ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from None


def parse_record(line: bytes, source: str) -> Record | str:
    """The record of a JSON line, or the reason why it is none. `source` says where it stands."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(values, dict):
        return "not a JSON object"
    for key in ("instruction", "response"):
        if not isinstance(values.get(key), str):
            return f"{key!r} is missing or not a string"
        if not values[key].strip():
            return f"{key!r} is empty"
    condition = values.get("condition", "direct")
    if not isinstance(condition, str):
        return "'condition' is not a string"
    return Record(values["instruction"], values["response"], condition, source)


@dataclass(frozen=True)
class Corpus:
    """Tokenised records, one after the other.

    `tokens` of any integer type, all sequences with eoa; `offsets` (N+1) int64; `prefix` (N) int32, the length of each
    instruction. Where they come from: `files`, and `places` (N, 2) int64, which file and line; a store does not know.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prefix: np.ndarray
    files: tuple[str, ...] = ()
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prefix)

    @property
    def lengths(self) -> np.ndarray:
        """(N) input tokens of each sequence: the last token is only ever a target."""
        return np.diff(self.offsets) - 1

    def with_loss_on_all(self) -> Corpus:
        """The same records with loss on every token after the first, instructions too: no prefix is longer than that.

        Only for a causal model: one that sees the prefix both ways would see what it is to predict.
        """
        return replace(self, prefix=np.ones_like(self.prefix))

    def describe(self, record: int) -> str:
        """A record's number, with its file and line where they are known."""
        if self.places is None:
            return str(record)
        file, line = self.places[record]
        return f"{record} ({self.files[file]}:{line})"


def encode(record: Record, tokenizer: Tokenizer, context: int) -> tuple[list[int], int]:
    """A record's sequence, eoa included, and the length of its prefix.

    Raises ValueError on an unknown condition, a text that is none, or more than `context` input tokens.
    """
    prompt = tokenizer.prompt(record.instruction, record.condition)
    ids = [*prompt, *tokenizer.encode(record.response), tokenizer.eoa]
    if len(ids) - 1 > context:
        raise ValueError(f"longer than the context of {context} tokens")
    return ids, len(prompt)


def tokenize(
    records: Iterator[Record], tokenizer: Tokenizer, context: int, rejected: Rejected, strict: bool = False
) -> Corpus:
    """Tokenise records; one longer than `context` or of an unknown condition is counted in `rejected`, or fatal."""
    pieces: list[np.ndarray] = []
    prefixes: list[int] = []
    files: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    for record in records:
        try:
            ids, prefix = encode(record, tokenizer, context)
        except ValueError as error:
            if strict:
                raise ValueError(f"{record.source}: {error}") from None
            rejected.add(record.source, str(error))
        else:
            pieces.append(np.asarray(ids, dtype=np.int32))
            prefixes.append(prefix)
            file, _, line = record.source.rpartition(":")
            places.append((files.setdefault(file, len(files)), int(line)))
    if not pieces:
        raise ValueError("no usable record: " + ("; ".join(rejected.report()) or "the files are empty"))
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    return Corpus(
        np.concatenate(pieces), offsets, np.asarray(prefixes, dtype=np.int32), tuple(files), np.asarray(places)
    )
