"""A checkpoint's own chat template, in Jinja, as the transformers library reads it. Needs jinja2 (extra `serve`).

The template writes control tokens into its text. Those that a message spells out stay ordinary text: each is marked
before the template sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hrmcore.chat import check, check_tools, render
from hrmcore.limits import read_bounded
from hrmcore.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"

_MARK = "\ufdd0"  # Unicode sets this code point aside for such a use; no text has a meaning for it


@dataclass(frozen=True)
class ChatTemplate:
    """A template: its text, the file that it came from, and the tokens that the tokenizer's configuration names.

    `tool_text` is another one for conversations with tools, where a checkpoint brings two.
    """

    text: str
    source: Path
    tokens: Mapping[str, str] = field(default_factory=dict)
    tool_text: str | None = None

    @property
    def knows_tools(self) -> bool:
        """Whether it does anything with tools."""
        return "tools" in (self.tool_text or self.text)

    @classmethod
    def find(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint, None when it brings none. Raises ValueError on a broken file."""
        config: Any = {}
        if (path := folder / CONFIG_FILE).is_file():
            try:
                config = json.loads(_text(path))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: not JSON ({error})") from None
            if not isinstance(config, dict):
                raise ValueError(f"{path}: not a JSON object")
        tokens = {name: _content(config[name]) for name in config if name.endswith("_token")}
        found = {name: text for name, text in tokens.items() if isinstance(text, str)}
        if (own := folder / TEMPLATE_FILE).is_file():
            return cls(_text(own), own, found)
        text, tool_text = config.get("chat_template"), None
        if isinstance(text, list):
            text, tool_text = (_named(text, name) for name in ("default", "tool_use"))
        if not isinstance(text, str | None) or not isinstance(tool_text, str | None):
            raise ValueError(f"{path}: chat_template is no text")
        return None if text is None else cls(text, path, found, tool_text)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation.

        Raises ValueError when the template fails, refuses it or comes to no end, and without jinja2.
        """
        try:
            import jinja2

            from hrmcore.engine.jinja2 import Sandbox
        except ImportError:
            raise ValueError(f"{self.source}: a chat template needs jinja2: pip install 'hrmcore[serve]'") from None

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        environment = Sandbox()
        environment.filters["tojson"] = lambda value, **given: json.dumps(value, **{"ensure_ascii": False, **given})
        environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
        given = {**self.tokens, **variables, "messages": messages, "add_generation_prompt": True}
        try:
            text = self.tool_text if self.tool_text and given.get("tools") else self.text
            return environment.render(text, given)
        except Exception as error:  # a template may do anything that the sandbox allows
            raise ValueError(f"{self.source}: {type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that may be called, on their way through a template. Raises ValueError as `check` does.

    Both are in OpenAI's form, but for the arguments of a call: they are an object, as transformers gives them.
    """

    template: ChatTemplate
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        check(self.messages, tools=True)
        if self.tools is not None:
            check_tools(self.tools)

    def ids(self, tokenizer: Tokenizer, condition: str) -> list[int]:
        """The bidirectional prefix: the template's text, its control tokens as such; it may use `condition`."""
        tokenizer.conditions(condition)
        controls = {token: index for token, index in tokenizer.control_tokens().items() if len(token) > 1}
        messages, tools = _marked(list(self.messages), controls), _marked(self.tools, controls)
        text = self.template.render(messages, condition=condition, tools=tools)
        if not text.strip():
            raise ValueError(f"{self.template.source}: the chat template gave no text")
        ids: list[int] = []
        for part in re.split(f"({_any(controls)})", text):
            if part in controls:
                ids.append(controls[part])
            elif plain := part.replace(_MARK, ""):
                ids += tokenizer.encode(plain)
        return ids


def conversation(
    template: ChatTemplate | None, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str | Conversation:
    """The prompt that messages become: through a checkpoint's own template, without one through `hrmcore.chat.render`.

    Raises ValueError on messages that are none, and on tools without a template.
    """
    tools = tools or None
    if template is not None and tools is not None and not template.knows_tools:
        raise ValueError("tools are not known to this model's chat template")
    if template is not None:
        return Conversation(template, messages, tools)
    if tools is not None:
        raise ValueError("tools need a model that brings a chat template, and this one does not")
    return render(messages)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Conversation, condition: str) -> list[int]:
    """The bidirectional prefix that a prompt becomes. Raises ValueError as `Tokenizer.prompt` and a template do."""
    return prompt.ids(tokenizer, condition) if isinstance(prompt, Conversation) else tokenizer.prompt(prompt, condition)


def _named(templates: Sequence[Any], name: str) -> Any:
    """The last template of that name in a list of them, or None."""
    found = [entry.get("template") for entry in templates if isinstance(entry, dict) and entry.get("name") == name]
    return found[-1] if found else None


def _text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _any(tokens: Mapping[str, int]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"


def _marked(value: Any, controls: Mapping[str, int]) -> Any:
    """The same JSON with every text marked."""
    if isinstance(value, str):
        return _mark(value, controls)
    if isinstance(value, Mapping):
        return {_marked(key, controls): _marked(inner, controls) for key, inner in value.items()}
    return [_marked(inner, controls) for inner in value] if isinstance(value, list | tuple) else value


def _mark(text: str, controls: Mapping[str, int]) -> str:
    """A text in which no control token is whole, nor begun at the end, where the template goes on."""
    text = re.sub(_any(controls), lambda found: found[0][0] + _MARK + found[0][1:], text)
    for token in controls:
        for size in range(min(len(token) - 1, len(text)), 0, -1):
            if text.endswith(token[:size]):
                return text[: len(text) - size + 1] + _MARK + text[len(text) - size + 1 :]
    return text
