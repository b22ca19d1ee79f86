"""Instruction-response records and their token form.

A record is one JSON object a line: {"instruction": str, "response": str, "condition": "direct"}. Text under "context"
and "input" follows the instruction, in this order, each after a blank line; other keys are left alone. Other shapes
and kinds of files: hrmcore/data/shapes.py and files.py. Its sequence is
`<boq> condition… instruction <eoq> response <eoa>`: the instruction is the bidirectional prefix, the loss is on
response and eoa. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hrmcore.data.shapes import JOINED, PLAIN, Layout, layout_of, plain_records, read_shaped
from hrmcore.tokenizer import Tokenizer

_UNUSED_NAMES = 64  # a file of which every record has keys of its own must not fill the memory


@dataclass(frozen=True)
class Record:
    """One instruction-response pair and where it stands (file:line).

    `joined` are the keys whose text the instruction ends with, `unused` those that nothing is taken from.
    """

    instruction: str
    response: str
    condition: str
    source: str
    joined: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


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


def read_records(
    path: str | Path, rejected: Rejected, strict: bool = False, layout: Layout | None = None
) -> Iterator[Record]:
    """Records of a file of any shape and kind. One that is bad is counted in `rejected`, or a ValueError if `strict`.

    `layout` says which keys hold what where it cannot be told from their names. Raises as
    `hrmcore.data.shapes.read_shaped` does.
    """
    for row, found in read_shaped(path, layout):
        source = f"{path}:{row.number}"
        for record in parse_records(row.line, source, found):
            if isinstance(record, Record):
                yield record
            elif strict:
                raise ValueError(f"{source}: {record}")
            else:
                rejected.add(source, record)


def parse_records(line: bytes, source: str, layout: Layout | None) -> list[Record | str]:
    """The records of a JSON line: one, or for a conversation one for each answer; or reasons why there is none.

    `source` says where it stands; without a `layout` no key is known.
    """
    values = _values(line)
    if isinstance(values, str):
        return [values]
    used = () if layout is None else layout.keys
    unused = tuple(key for key in values if key not in used)
    found = []
    for plain in plain_records(values, layout):
        found.append(plain if isinstance(plain, str) else _record_of(plain, source, layout or PLAIN, unused))
    return found


def parse_record(line: bytes, source: str) -> Record | str:
    """The record of a JSON line, or the reason why it is none. `source` says where it stands."""
    values = _values(line)
    found = parse_records(line, source, None if isinstance(values, str) else layout_of(values))
    return found[0] if len(found) == 1 else "it holds several records: parse_records gives them"


def _values(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8; save the file as UTF-8"
    if not text.strip():
        return "an empty line"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    return values if isinstance(values, dict) else "not a JSON object"


def _record_of(values: dict[str, Any], source: str, layout: Layout, unused: tuple[str, ...]) -> Record | str:
    """The record of plain values, whose reasons name the keys as the file does."""
    for name in ("instruction", "response"):
        if not isinstance(values.get(name), str):
            return f"{getattr(layout, name)!r} is missing or not a string"
        if not values[name].strip():
            return f"{getattr(layout, name)!r} is empty"
    condition = values.get("condition", "direct") or "direct"
    if not isinstance(condition, str):
        return f"{layout.condition!r} is not a string"
    joined = []
    for name in JOINED:
        if not isinstance(text := values.get(name) or "", str):
            return f"{getattr(layout, name)!r} is not a string"
        if text.strip():
            joined.append(name)
    instruction = "\n\n".join([values["instruction"], *(values[name] for name in joined)])
    names = tuple(getattr(layout, name) for name in joined)
    return Record(instruction, values["response"], condition, source, names, unused)


class KeyCounts:
    """How many records have each joined key, and each unused one; `joined` and `unused`, by name."""

    def __init__(self) -> None:
        self.joined: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        self.joined.update(record.joined)
        self._add_unused(Counter(record.unused))

    def update(self, other: KeyCounts) -> None:
        self.joined.update(other.joined)
        self._add_unused(other.unused)

    def _add_unused(self, counts: Counter[str]) -> None:
        for name, count in counts.items():
            if name in self.unused or len(self.unused) < _UNUSED_NAMES:
                self.unused[name] += count

    def report(self) -> list[str]:
        """A line a joined key, and one for the unused ones."""
        lines = [f"{n} have {key!r}: it follows the instruction after a blank line" for key, n in self.joined.items()]
        if self.unused:
            names = ", ".join(f"{key!r} ({n})" for key, n in self.unused.most_common(8))
            lines.append(f"not used: {names}" + (", …" if len(self.unused) > 8 else ""))
        return lines


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
        raise ValueError(f"longer than the context of {context} tokens; raise it or shorten the record")
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
