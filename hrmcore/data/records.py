"""Instruction-response records and their token form.

A record is one JSON object a line: {"instruction": str, "response": str, "condition": "direct"}. Text under "context"
and "input" follows the instruction, in this order, each after a blank line; other keys are left alone. Other shapes
and kinds of files: hrmcore/data/shapes.py and files.py. Its sequence is
`<boq> condition… instruction <eoq> response <eoa>`: the instruction is the bidirectional prefix, the loss is on
response and eoa. Imports no torch.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hrmcore.data.shapes import JOINED, PLAIN, Layout, layout_of, plain_records, read_shaped
from hrmcore.limits import MOST_PARSED
from hrmcore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hrmcore.engine.chat_template import ChatTemplate

# A file of which every record has keys of its own, or a fault of its own, must not fill the memory.
_UNUSED_NAMES = 64
_REASONS = 256
_REASON_CHARACTERS = 400


@dataclass(frozen=True)
class Record:
    """One instruction-response pair and where it stands (file:line). A plain text is the answer to no instruction.

    `joined` are the keys whose text the instruction ends with, `unused` those that nothing is taken from. `messages`
    are the turns that the instruction renders.
    """

    instruction: str
    response: str
    condition: str
    source: str
    joined: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text."""
        return not self.instruction


@dataclass(frozen=True)
class Fault:
    """Why a line is no record, and the column of the character where it goes wrong (the first is 1), if there is one.

    Lines are counted by reason, so that names no place.
    """

    reason: str
    column: int | None = None

    def place(self, source: str) -> str:
        """Where it stands: file:line, or file:line:column."""
        return source if self.column is None else f"{source}:{self.column}"


@dataclass
class Rejected:
    """Lines that were left out, counted by reason; the first few of each are kept to be shown."""

    shown_per_reason: int = 3
    shown_reasons: int = 8
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, reason: str) -> None:
        if len(reason) > _REASON_CHARACTERS:
            reason = f"{reason[:_REASON_CHARACTERS]}…"
        if reason not in self.counts and len(self.counts) >= _REASONS:
            reason = "other reasons"
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
                raise ValueError(f"{record.place(source)}: {record.reason}")
            else:
                rejected.add(record.place(source), record.reason)


def parse_records(line: bytes, source: str, layout: Layout | None) -> list[Record | Fault]:
    """The records of a JSON line: one, or for a conversation one for each answer; or what is wrong instead.

    `source` says where it stands; without a `layout` no key is known.
    """
    values = _parse_json(line)
    return [values] if isinstance(values, Fault) else _records_of(values, source, layout)


def parse_record(line: bytes, source: str) -> Record | Fault:
    """The record of a JSON line, or the reason why it is none. `source` says where it stands."""
    values = _parse_json(line)
    if isinstance(values, Fault):
        return values
    found = _records_of(values, source, layout_of(values))
    return found[0] if len(found) == 1 else Fault("it holds several records: parse_records gives them")


def _parse_json(line: bytes) -> dict[str, Any] | Fault:
    """The object that a JSON line says, or the Fault in it."""
    if len(line) > MOST_PARSED:
        return Fault(f"longer than the {MOST_PARSED} bytes that a record may have")
    if not line.strip():
        return Fault("a blank line")
    try:
        values = json.loads(line.rstrip(b"\r\n"))
    except json.JSONDecodeError as error:
        if error.msg.startswith("Invalid control character"):
            return Fault("not JSON: an unescaped control character", error.pos + 1)
        what = error.msg.removesuffix(" at").removesuffix(" starting")
        return Fault(f"not JSON: {what[0].lower()}{what[1:]}", error.pos + 1)
    except UnicodeDecodeError as error:
        before = line[: error.start].decode(error.encoding, "replace")
        return Fault(f"not JSON: bytes that are not {error.encoding.upper()}", len(before) + 1)
    except RecursionError:
        return Fault("not JSON: brackets within brackets, too deep")
    except ValueError:  # Python converts no number that is so long
        return Fault("not JSON: a number of too many digits")
    return values if isinstance(values, dict) else Fault("not a JSON object")


def _records_of(values: dict[str, Any], source: str, layout: Layout | None) -> list[Record | Fault]:
    used = () if layout is None else layout.keys
    unused = tuple(key for key in values if key not in used)
    found: list[Record | Fault] = []
    for plain in plain_records(values, layout):
        try:
            found.append(Fault(plain) if isinstance(plain, str) else _record(plain, source, layout or PLAIN, unused))
        except ValueError as error:
            found.append(Fault(str(error)))
    return found


def _record(values: dict[str, Any], source: str, layout: Layout, unused: tuple[str, ...]) -> Record:
    """The record of plain values. Raises ValueError, naming the key as the file does."""
    for name in ("text",) if layout.text else ("instruction", "response"):
        if not isinstance(values.get(name), str):
            raise ValueError(f"{getattr(layout, name)!r} is missing or not a string")
        if not values[name].strip():
            raise ValueError(f"{getattr(layout, name)!r} is empty")
    condition = values.get("condition", "direct") or "direct"
    if not isinstance(condition, str):
        raise ValueError(f"{layout.condition!r} is not a string")
    if layout.text:
        return Record("", values["text"], condition, source, (), unused)
    joined = []
    for name in JOINED:
        if not isinstance(text := values.get(name) or "", str):
            raise ValueError(f"{getattr(layout, name)!r} is not a string")
        if text.strip():
            joined.append(name)
    instruction = "\n\n".join([values["instruction"], *(values[name] for name in joined)])
    names = tuple(getattr(layout, name) for name in joined)
    return Record(instruction, values["response"], condition, source, names, unused, values.get("messages", ()))


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


def template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template beside a tokenizer, which `Engine.chat` renders conversations with; None without one."""
    from hrmcore.engine.chat_template import ChatTemplate

    return ChatTemplate.find(tokenizer.source.parent)


def encode(
    record: Record, tokenizer: Tokenizer, context: int, template: ChatTemplate | None = None
) -> tuple[list[int], int]:
    """A record's sequence, eoa included, and the length of its prefix; a conversation's goes through `template`.

    Raises ValueError on an unknown condition, a text that is none, or more than `context` input tokens.
    """
    if template is not None and record.messages:
        from hrmcore.engine.chat_template import Conversation

        prompt = Conversation(template, record.messages).ids(tokenizer, record.condition)
    else:
        prompt = tokenizer.prompt(record.instruction, record.condition)
    ids = [*prompt, *tokenizer.encode(record.response), tokenizer.eoa]
    if len(ids) - 1 > context:
        raise ValueError(f"longer than the context of {context} tokens; raise it or shorten the record")
    return ids, len(prompt)


def encode_pieces(
    record: Record, tokenizer: Tokenizer, context: int, template: ChatTemplate | None = None
) -> list[tuple[list[int], int]]:
    """The sequences of a record, each with the length of its prefix: one, or of a text as many as the context takes.

    A text follows an empty instruction. The pieces of a long one are about equally long, and each of its tokens is
    predicted once; eoa ends the last. Raises ValueError as `encode` does, but for the length of a text.
    """
    if not record.is_text:
        return [encode(record, tokenizer, context, template)]
    prompt = [tokenizer.boq, *tokenizer.conditions(record.condition), tokenizer.eoq]
    ids, room = [*tokenizer.encode(record.response), tokenizer.eoa], context + 1 - len(prompt)
    if room < 2:
        raise ValueError(f"the context of {context} tokens has no room for a text; raise it")
    count = -(-len(ids) // room)
    bounds = [len(ids) * number // count for number in range(count + 1)]
    return [([*prompt, *ids[start:stop]], len(prompt)) for start, stop in itertools.pairwise(bounds)]


def tokenize(
    records: Iterator[Record], tokenizer: Tokenizer, context: int, rejected: Rejected, strict: bool = False
) -> Corpus:
    """Tokenise records; one longer than `context` or of an unknown condition is counted in `rejected`, or fatal."""
    pieces: list[np.ndarray] = []
    prefixes: list[int] = []
    files: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    template = template_of(tokenizer)
    for record in records:
        try:
            encoded = encode_pieces(record, tokenizer, context, template)
        except ValueError as error:
            if strict:
                raise ValueError(f"{record.source}: {error}") from None
            rejected.add(record.source, str(error))
            continue
        file, _, line = record.source.rpartition(":")
        for ids, prefix in encoded:
            pieces.append(np.asarray(ids, dtype=np.int32))
            prefixes.append(prefix)
            places.append((files.setdefault(file, len(files)), int(line)))
    if not pieces:
        raise ValueError("no usable record: " + ("; ".join(rejected.report()) or "the files are empty"))
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    return Corpus(
        np.concatenate(pieces), offsets, np.asarray(prefixes, dtype=np.int32), tuple(files), np.asarray(places)
    )
