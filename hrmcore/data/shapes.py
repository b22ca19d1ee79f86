"""The shapes in which people keep records, and the plain one that each of them becomes. Imports no torch.

A shape is told by its keys: instruction and response; instruction, input and output (Alpaca); prompt and completion;
`messages` ({"role", "content"}) or `conversations` ({"from", "value"}); `text`. A file has one shape, that of its first
record. A conversation becomes one record for each assistant turn: the turns before it are its instruction, as
`hrmcore.chat.render` writes them, or the chat template beside the tokenizer. A text is the answer to an empty
instruction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrmcore.chat import render
from hrmcore.data.files import Row, read_rows
from hrmcore.limits import MOST_PARSED

JOINED = ("context", "input")  # keys whose text belongs to the instruction, in this order
TARGETS = ("instruction", "response", *JOINED, "condition", "messages", "text")  # what --columns may name
_ROLES = {"human": "user", "gpt": "assistant"}  # of "conversations", beside the usual ones


@dataclass(frozen=True)
class Layout:
    """Which key of a record holds what. `messages` is the key of a conversation, `text` that of a text, or None."""

    instruction: str = "instruction"
    response: str = "response"
    context: str = "context"
    input: str = "input"
    condition: str = "condition"
    messages: str | None = None
    text: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """The keys that a record must have."""
        whole = self.messages or self.text
        return (whole,) if whole else (self.instruction, self.response)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        joined = () if self.messages or self.text else (self.context, self.input)
        return (*self.needed, *joined, self.condition)

    def __str__(self) -> str:
        return " and ".join(repr(key) for key in self.needed)


PLAIN = Layout()
_KNOWN = (
    PLAIN,
    Layout(messages="messages"),
    Layout(messages="conversations"),
    Layout(response="output"),
    Layout(instruction="prompt", response="completion"),
    Layout(text="text"),
)


def layout_of(keys: Sequence[str] | Mapping[str, Any]) -> Layout | None:
    """The layout whose needed keys are all there; None when there is none."""
    return next((layout for layout in _KNOWN if all(key in keys for key in layout.needed)), None)


def named_layout(columns: Mapping[str, str]) -> Layout | None:
    """The layout of `--columns`, or None where nothing is named. Raises ValueError on a name that means nothing."""
    if unknown := sorted(set(columns) - set(TARGETS)):
        raise ValueError(f"--columns: {unknown[0]!r} is none of {', '.join(TARGETS)}")
    if len({"messages", "text"} & set(columns)) + bool({"instruction", "response", *JOINED} & set(columns)) > 1:
        raise ValueError("--columns: name messages, or text, or instruction and response, not two of them")
    return Layout(**columns) if columns else None


def read_shaped(path: str | Path, layout: Layout | None = None) -> Iterator[tuple[Row, Layout | None]]:
    """The rows of a file, each with the file's layout: `layout`, or that of its first record that has a known one.

    Raises ValueError, naming the file, when it is a table that lacks a column, and as `read_rows` does.
    """

    def choose(names: Sequence[str]) -> Sequence[str]:
        nonlocal layout
        layout = layout or layout_of(names)
        if missing := [name for name in (layout or PLAIN).needed if name not in names]:
            named = "" if layout else "; --columns instruction=NAME,response=NAME says which they are"
            raise ValueError(f"no column {missing[0]!r}; its columns are {', '.join(names)}{named}")
        return [name for name in (layout or PLAIN).keys if name in names]

    for row in read_rows(path, choose):
        if layout is None and isinstance(values := _loaded(row.line), dict):
            layout = layout_of(values)
        yield row, layout


def _loaded(line: bytes) -> Any:
    try:
        return json.loads(line) if len(line) <= MOST_PARSED else None
    except (ValueError, RecursionError):
        return None


def plain_records(values: Mapping[str, Any], layout: Layout | None) -> list[dict[str, Any] | str]:
    """The records of one row in the plain shape, or instead of one the reason why it cannot be used."""
    own = layout_of(values)
    if layout is None or (own and own != layout and not all(key in values for key in layout.needed)):
        return [_stranger(values, layout, own)]
    if layout.messages is None:
        names = ("text",) if layout.text else ("instruction", "response", *JOINED)
        names = (*names, "condition")
        return [{name: values[key] for name in names if (key := getattr(layout, name)) in values}]
    try:
        messages = [_message(number, given) for number, given in enumerate(_listed(values, layout.messages), start=1)]
        records: list[dict[str, Any] | str] = list(_answers(messages))
    except ValueError as error:
        return [str(error)]
    if layout.condition in values:
        for record in records:
            if isinstance(record, dict):
                record["condition"] = values[layout.condition]
    return records


def _stranger(values: Mapping[str, Any], layout: Layout | None, own: Layout | None) -> str:
    """Why a row without the keys of the file's layout, or of any, cannot be used."""
    if layout is not None:
        return f"it has {own}, the first record of the file {layout}; put records of one shape into a file"
    for name in PLAIN.needed:
        if name not in values and any(key in values for key in PLAIN.needed):
            return f"{name!r} is missing or not a string"
    keys = ", ".join(list(values)[:6]) + (", …" if len(values) > 6 else "")
    return f"no keys of a known shape, but {keys or 'none'}; --columns instruction=KEY,response=KEY says which they are"


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    messages = values.get(key)
    if isinstance(messages, str):  # a cell of a table
        messages = _loaded(messages.encode("utf-8", "surrogatepass"))
    if not isinstance(messages, list):
        raise ValueError(f"{key!r} is missing or not a list of messages")
    if not messages:
        raise ValueError(f"{key!r} is empty")
    return messages


def _message(number: int, given: Any) -> dict[str, str]:
    """A message with the usual names. An empty system message stays, for its number's sake."""
    if not isinstance(given, dict):
        raise ValueError(f"message {number}: not an object with role and content")
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message {number}: the role {role!r} is none of system, user and assistant")
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}): the content is missing or not text")
    return {"role": role, "content": content}


def _answers(messages: Sequence[dict[str, str]]) -> Iterator[dict[str, Any] | str]:
    """A record for each assistant turn. Raises ValueError, naming the message, on an order that makes no sense."""
    expected = "user"
    begin = 1 if messages[0]["role"] == "system" and not messages[0]["content"].strip() else 0
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if number == 1 and role == "system":
            continue
        if role != expected:
            raise ValueError(f"message {number} ({role}): a message of the {expected} must come here")
        if not message["content"].strip():
            raise ValueError(f"message {number} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message of the assistant")
    for place in answers:
        turns = tuple(messages[begin:place])
        yield {"instruction": render(turns), "response": messages[place]["content"], "messages": turns}
    if messages[-1]["role"] == "user":
        yield f"message {len(messages)} (user): no assistant answers it; the turns before it are used"
