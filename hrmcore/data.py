"""Instruction-response records, their token form, and packed PrefixLM batches.

A record is one JSON object a line: {"instruction": str, "response": str, "condition": "direct"}; other keys are left
alone. Or a row of a .parquet file with columns of these names. Its sequence is
`<boq> condition… instruction <eoq> response <eoa>`: the instruction is the bidirectional prefix, the loss is on
response and eoa. Imports torch only to build a batch.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hrmcore.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    except ValueError:
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


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid one after the other. T input tokens, S sequences, R supervised positions."""

    ids: Tensor  # (T) int64
    offsets: Tensor  # (S+1) int32
    prefix: Tensor  # (S) int32
    positions: Tensor  # (T) int32, counted from each sequence's first token
    supervised: Tensor  # (R) int64, positions whose next token is predicted
    targets: Tensor  # (R) int64, that next token
    records: tuple[int, ...]  # which records these are

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "records"}
        return replace(self, **moved)


def pack(corpus: Corpus, records: Sequence[int], multiple: int = 1) -> PackedBatch:
    """The batch of these records, in this order. The last instruction token predicts the first response token.

    A last, unsupervised sequence of token 0 brings T up to a multiple of `multiple`: matrix libraries that compile a
    kernel for each shape (oneDNN in bfloat16) would otherwise compile in every step.
    """
    import torch

    ids, positions, supervised, targets = [], [], [], []
    offsets = [0]
    for record in records:
        sequence = corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]]
        length, prefix = len(sequence) - 1, int(corpus.prefix[record])
        ids.append(sequence[:-1])
        positions.append(np.arange(length, dtype=np.int32))
        supervised.append(np.arange(prefix - 1, length) + offsets[-1])
        targets.append(sequence[prefix:])
        offsets.append(offsets[-1] + length)
    prefixes = corpus.prefix[list(records)]
    if fill := -offsets[-1] % multiple:
        ids.append(np.zeros(fill, dtype=np.int32))
        positions.append(np.arange(fill, dtype=np.int32))
        prefixes = np.append(prefixes, np.int32(0))
        offsets.append(offsets[-1] + fill)
    return PackedBatch(
        ids=torch.from_numpy(np.concatenate(ids, dtype=np.int64)),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        prefix=torch.from_numpy(prefixes),
        positions=torch.from_numpy(np.concatenate(positions)),
        supervised=torch.from_numpy(np.concatenate(supervised, dtype=np.int64)),
        targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        records=tuple(int(record) for record in records),
    )


_WINDOW_BATCHES = 32  # records of so many batches are packed together: enough choice to fill every batch


def epoch_batches(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Record numbers of each batch of an epoch: every record once, at most `capacity` tokens a batch.

    The order depends on seed and epoch alone. A batch takes records as the shuffle brings them, whatever their length,
    so that no batch is all of one task; only its last gap is filled with the longest record of the window that fits.
    What is left at a window's end opens the next one. Raises ValueError when a record is longer than `capacity`.
    """
    if len(lengths) and (longest := int(lengths.max())) > capacity:
        raise ValueError(f"batch_tokens is {capacity}, but a record has {longest} tokens; raise it to at least that")
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    start, left = 0, np.empty(0, dtype=order.dtype)
    while start < len(order):
        used = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, used + _WINDOW_BATCHES * capacity - lengths[left].sum(), side="right"))
        stop = max(stop, start + 1)
        window, start = np.concatenate([left, order[start:stop]]), stop
        batches = _fill(window, lengths, capacity)
        left = np.asarray(batches.pop() if start < len(order) and len(batches) > 1 else [], dtype=order.dtype)
        yield from batches


def share(lengths: np.ndarray, records: Sequence[int], rank: int, ranks: int) -> list[int]:
    """One rank's records of a batch, in the batch's order; none where there are fewer records than ranks.

    The longest record first, each goes to the rank that has the fewest tokens by then (LPT), the lowest of equals.
    """
    tokens = [0] * ranks
    chosen = set()
    for record in sorted(records, key=lambda record: (-int(lengths[record]), record)):
        least = tokens.index(min(tokens))
        tokens[least] += int(lengths[record])
        if least == rank:
            chosen.add(record)
    return [record for record in records if record in chosen]


class BatchStream:
    """The packed batches, epoch after epoch without end; `position` says where the next one stands.

    Order and contents depend on the arguments alone: a stream made with another's position goes on as it would have.
    """

    MULTIPLE = 64  # tokens of a batch are rounded up to it, see pack()

    def __init__(self, corpus: Corpus, capacity: int, seed: int, position: tuple[int, int] = (0, 0)) -> None:
        self.position = position
        self._corpus = corpus
        self._order = (capacity, seed)
        self._epoch = self._records(position)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> PackedBatch:
        epoch, index = self.position
        records = next(self._epoch, None)
        if records is None:
            epoch, index = epoch + 1, 0
            self._epoch = self._records((epoch, index))
            records = next(self._epoch)
        self.position = (epoch, index + 1)
        return pack(self._corpus, records, self.MULTIPLE)

    def _records(self, position: tuple[int, int]) -> Iterator[list[int]]:
        epoch, index = position
        return itertools.islice(epoch_batches(self._corpus.lengths, *self._order, epoch), index, None)


def _fill(window: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack the records of a window, in their order but for the gaps; only the last batch may be far from full."""
    by_length = sorted((int(lengths[record]), int(record)) for record in window)
    waiting = dict.fromkeys(int(record) for record in window)
    batches: list[list[int]] = []
    while waiting:
        room = capacity
        batch: list[int] = []
        while by_length and by_length[0][0] <= room:
            following = next(iter(waiting))
            key = (int(lengths[following]), following)
            if key[0] > room:
                key = by_length[bisect.bisect_right(by_length, (room, len(lengths))) - 1]
            by_length.pop(bisect.bisect_left(by_length, key))
            del waiting[key[1]]
            batch.append(key[1])
            room -= key[0]
        batches.append(batch)
    return batches
