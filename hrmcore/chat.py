"""A conversation as the one instruction that a model of this kind answers. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# How a turn is headed where there is more than one; a system message has no heading.
HEADINGS = {"system": "", "user": "User: ", "assistant": "Assistant: "}

# What a message may hold: the first two always, the others where a chat template knows tools.
FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


def render(messages: Sequence[Mapping[str, Any]]) -> str:
    """The instruction that messages ({"role", "content"}, the newest last) become.

    A lone user message is itself, unchanged. Otherwise every message is a paragraph: the system message as it is,
    a turn after `User: ` or `Assistant: `; a blank line stands between paragraphs. Raises ValueError as `check` does.
    """
    check(messages)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{HEADINGS[message['role']]}{message['content']}" for message in messages)


def check(messages: Sequence[Mapping[str, Any]], tools: bool = False) -> None:
    """Raise ValueError that names the message, counted from 0, and what is wrong with it.

    The last message must be the user's, a system message must be the first, and only an assistant's may be blank. With
    `tools` an assistant may have called some, and messages may bring what they gave: FIELDS.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of objects with role and content, got {messages!r:.50}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for index, message in enumerate(messages):
        if wrong := _wrong(message, index, tools):
            raise ValueError(f"messages[{index}]: {wrong}")
    last = len(messages) - 1
    if messages[last]["role"] not in ("user", "tool"):
        raise ValueError(f"messages[{last}]: the last message must be the user's, got role {messages[last]['role']!r}")


def _wrong(message: Mapping[str, Any], index: int, tools: bool) -> str | None:
    if not isinstance(message, Mapping):
        return f"must be an object with role and content, got {message!r:.50}"
    for name in ("role", "content"):
        if name not in message:
            return f"{name} is missing"
    role, content = message["role"], message["content"]
    if not tools and (role == "tool" or "tool_calls" in message):
        return "tools need a model that brings a chat template"
    fields, roles = (FIELDS, [*HEADINGS, "tool"]) if tools else (FIELDS[:2], [*HEADINGS])
    if unknown := [str(name) for name in message if name not in fields]:
        return f"unknown field {unknown[0]!r}; there are: {', '.join(fields)}"
    if not isinstance(role, str) or role not in roles:
        return f"role must be one of {', '.join(roles)}, got {role!r:.50}"
    if not isinstance(content, str):
        return f"content must be text, got {content!r:.50}"
    if role == "system" and index > 0:
        return "a system message must be the first"
    for name in ("name", "tool_call_id"):
        if name in message and not isinstance(message[name], str):
            return f"{name} must be text, got {message[name]!r:.50}"
    if "tool_calls" in message:
        return "only an assistant calls tools" if role != "assistant" else _wrong_calls(message["tool_calls"])
    return "content is blank" if role in ("system", "user") and not content.strip() else None


def _wrong_calls(calls: Any) -> str | None:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        return f"tool_calls must be a list, got {calls!r:.50}"
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        good = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if function is None or not good or not isinstance(function.get("arguments"), Mapping):
            return f"tool_calls[{number}] must hold a function with a name and an object of arguments"
    return None


def check_tools(tools: Any) -> None:
    """Raise ValueError unless tools is a list of {"type": "function", "function": {"name", …}}."""
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list, got {tools!r:.50}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{index}] must be an object of type 'function' that holds a function with a name")
