"""A conversation as the one instruction that a model of this kind answers. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# How a turn is headed where there is more than one; a system message has no heading.
HEADINGS = {"system": "", "user": "User: ", "assistant": "Assistant: "}


def render(messages: Sequence[Mapping[str, str]]) -> str:
    """The instruction that messages ({"role", "content"}, the newest last) become.

    A lone user message is itself, unchanged. Otherwise every message is a paragraph: the system message as it is,
    a turn after `User: ` or `Assistant: `; a blank line stands between paragraphs. Raises ValueError as `check` does.
    """
    check(messages)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{HEADINGS[message['role']]}{message['content']}" for message in messages)


def check(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError that names the message, counted from 0, and what is wrong with it.

    The last message must be the user's, a system message must be the first, and only an assistant's may be blank.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of objects with role and content, got {messages!r:.50}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for index, message in enumerate(messages):
        if wrong := _wrong(message, index):
            raise ValueError(f"messages[{index}]: {wrong}")
    last = len(messages) - 1
    if messages[last]["role"] != "user":
        raise ValueError(f"messages[{last}]: the last message must be the user's, got role {messages[last]['role']!r}")


def _wrong(message: Mapping[str, str], index: int) -> str | None:
    if not isinstance(message, Mapping):
        return f"must be an object with role and content, got {message!r:.50}"
    for name in ("role", "content"):
        if name not in message:
            return f"{name} is missing"
    if unknown := [str(name) for name in message if name not in ("role", "content")]:
        return f"unknown field {unknown[0]!r}; there are: role, content"
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in HEADINGS:
        return f"role must be one of {', '.join(HEADINGS)}, got {role!r:.50}"
    if not isinstance(content, str):
        return f"content must be text, got {content!r:.50}"
    if role == "system" and index > 0:
        return "a system message must be the first"
    return "content is blank" if role != "assistant" and not content.strip() else None
