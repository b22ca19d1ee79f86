"""OpenAI's chat completions and completions: what a request asks for, and the JSON of answers and errors.

Source: the API reference at platform.openai.com. Nothing that would change an answer is ignored: a field that we do not
serve is refused by its name, unless its value is the one that changes nothing.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrmcore.chat import check, check_tools
from hrmcore.engine.engine import TextOptions
from hrmcore.engine.sampling import is_integer
from hrmcore.engine.streams import Finish, TokenLogprob
from hrmcore.serving.logprobs import asked_for, in_chat, in_completion

MOST_CHOICES = 64  # answers to one request: prompts × n
MOST_STOPS = 16

# Fields that go to Engine.stream as they are; what is left out has its default there.
OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "condition", "stop", "seed")
_COMMON = {"model", "stream", "stream_options", "n", "max_tokens", "logprobs", "return_token_ids", *OPTIONS}
_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
_FIELDS = {True: _CHAT | _COMMON, False: {"prompt", *_COMMON}}
# About the caller, not about the answer.
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Fields that we do not serve, and the values (besides null) that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}


class Refused(Exception):  # noqa: N818 - an answer, too
    """A request that gets an error instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `n` answers to its conversation, or to each of its prompts."""

    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompts: list[str]
    n: int
    stream: bool
    include_usage: bool
    token_ids: bool
    options: TextOptions = field(repr=False)
    logprobs: int | None = None  # how many of the most probable tokens beside each; None: not even its own

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return self.messages is not None

    def choice_options(self, choice: int) -> TextOptions:
        """The options of the n-th answer to a prompt: the seed goes up by one with each, so that they differ."""
        seed = self.options.get("seed")
        return self.options if seed is None or choice == 0 else {**self.options, "seed": (seed + choice) % (1 << 64)}


def parse(body: bytes, chat: bool, model: str) -> Asked:
    """The body of a request to /v1/chat/completions, or else to /v1/completions. Raises Refused."""
    given = json_object(body)
    _check_fields(given, chat)
    check_model(given, model)
    messages, prompts = (read_messages(given), []) if chat else (None, _prompts(given))
    n = whole_number(given, "n", 1)
    if (choices := n * max(len(prompts), 1)) > MOST_CHOICES:
        raise Refused(400, f"at most {MOST_CHOICES} answers to one request, got {choices}", "n")
    stream = _flag(given, "stream")
    options: dict[str, Any] = {name: given[name] for name in OPTIONS if name in given}
    if isinstance(options.get("stop"), list) and len(options["stop"]) > MOST_STOPS:
        raise Refused(400, f"stop must hold at most {MOST_STOPS} texts, got {len(options['stop'])}", "stop")
    limits = {name: whole_number(given, name, 0) for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(set(limits.values())) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    if limits:
        options["max_new_tokens"] = next(iter(limits.values()))
    usage = _stream_options(given, stream)
    try:
        logprobs = asked_for(given, chat)
    except ValueError as error:
        raise Refused(400, str(error), str(error).partition(" ")[0]) from None
    token_ids = _flag(given, "return_token_ids")
    tools = read_tools(given) if chat else None
    return Asked(messages, tools, prompts, n, stream, usage, token_ids, options, logprobs)  # type: ignore[arg-type]


def check_model(given: Mapping[str, Any], model: str) -> None:
    """Raise Refused when a request names another model."""
    if "model" in given and given["model"] != model:
        message = f"there is no model {shown(given['model'])}; this server has {model!r}"
        raise Refused(404, message, "model", "model_not_found")


def json_object(body: bytes) -> dict[str, Any]:
    """The fields of a request that are not null. Raises Refused."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body must be a JSON object")
    fields = {name: value for name, value in given.items() if value is not None}
    if not isinstance(fields.get("condition", ""), str):
        raise Refused(400, f"condition must be text, got {shown(fields['condition'])}", "condition")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _check_fields(given: Mapping[str, Any], chat: bool) -> None:
    for name, value in given.items():
        if name in _FIELDS[chat] or name in _IGNORED:
            continue
        if name in _NEUTRAL:
            if not any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]
            ):
                raise Refused(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        else:
            raise Refused(400, f"unknown field {shown(name)}", name[:64], "unknown_parameter")


def read_messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request, in the form that `Engine.conversation` takes. Raises Refused."""
    if "messages" not in given:
        raise Refused(400, "messages is missing", "messages")
    messages = given["messages"]
    try:
        if isinstance(messages, list):
            messages = [_message(message, index) for index, message in enumerate(messages)]
        check(messages, tools=True)
        return list(messages)
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None


def _message(message: Any, index: int) -> Any:
    """A message in the engine's form: text parts joined, `developer` as `system`, nothing null, arguments parsed."""
    if not isinstance(message, dict):
        return message
    plain = {name: value for name, value in message.items() if value is not None}
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if plain.get("role") == "assistant":
        plain.setdefault("content", "")
    if isinstance(parts := plain.get("content"), list):
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"messages[{index}]: a part of content must be text, got {shown(kind)}")
        plain["content"] = "".join(part["text"] for part in parts)
    if isinstance(calls := plain.get("tool_calls"), list):
        plain["tool_calls"] = [_call(call, f"messages[{index}]: tool_calls[{n}]") for n, call in enumerate(calls)]
    return plain


def _call(call: Any, place: str) -> Any:
    """A call of a tool whose arguments, a text in OpenAI's form, are the object that the text says."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        raise ValueError(f"{place}: the arguments are not JSON") from None


def read_tools(given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a request offers the model; None for none of them. Raises Refused."""
    tools, choice = given.get("tools", []), given.get("tool_choice", "auto")
    try:
        check_tools(tools)
    except ValueError as error:
        raise Refused(400, str(error), "tools") from None
    if choice not in ("auto", "none"):
        message = f"tool_choice must be auto or none: no call can be forced, got {shown(choice)}"
        raise Refused(400, message, "tool_choice", "unsupported_parameter")
    return tools if tools and choice == "auto" else None


def _prompts(given: Mapping[str, Any]) -> list[str]:
    prompt = given.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise Refused(400, "prompt must be text or a list of texts; token ids are not supported", "prompt")
    return prompts


def whole_number(given: Mapping[str, Any], name: str, default: int) -> int:
    """A field that must be a whole number of at least 1, where it is given. Raises Refused."""
    value = given.get(name, default)
    if not is_integer(value) or (name in given and value < 1):
        raise Refused(400, f"{name} must be a whole number of at least 1, got {shown(value)}", name)
    return int(value)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, f"{name} must be true or false, got {shown(value)}", name)
    return value


def _stream_options(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise Refused(400, "stream_options must be an object with include_usage and nothing else", "stream_options")
    if options and not stream:
        raise Refused(400, "stream_options goes with stream", "stream_options")
    return _flag({name: value for name, value in options.items() if value is not None}, "include_usage")


def shown(value: object) -> str:
    """A value of the caller in a message: short, and in ASCII."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def finish_reason(finish: Finish | None) -> str:
    """OpenAI's word for why an answer is over: `length` when it was cut."""
    return "length" if finish in ("length", "context") else "stop"


class Writer:
    """The JSON of one answered request; `model` is the name that the server knows its model by."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._offsets: Counter[int] = Counter()  # characters of each choice's tokens so far
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self,
        answers: Sequence[tuple[str, Sequence[int], Finish | None, Sequence[TokenLogprob]]],
        used: dict[str, int],
    ) -> dict[str, Any]:
        """All choices at once: (text, token ids, finish, log probabilities)."""
        choices = []
        for index, (text, ids, finish, scored) in enumerate(answers):
            said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
            said |= self._ids(ids)
            logprobs = self._logprobs(index, scored)
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason(finish)})
        name = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": used}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first piece."""
        return self._chunk(index, {"role": "assistant", "content": ""}, (), None) if self._asked.chat else None

    def piece(self, index: int, text: str, ids: Sequence[int], scored: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """A chunk with text, the tokens since the chunk before, and the log probabilities of those behind the text."""
        return self._chunk(index, {"content": text}, ids, None, scored)

    def end(
        self, index: int, ids: Sequence[int], finish: Finish | None, scored: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        """A choice's last chunk."""
        return self._chunk(index, {}, ids, finish_reason(finish), scored)

    def used(self, used: dict[str, int]) -> dict[str, Any]:
        """The last chunk of all, where the usage was asked for."""
        return {**self._head, "object": self._object, "choices": [], "usage": used}

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _logprobs(self, index: int, scored: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The tokens that follow those of the choice so far."""
        if self._asked.logprobs is None:
            return None
        if self._asked.chat:
            return in_chat(scored)
        offset = self._offsets[index]
        self._offsets[index] += sum(len(one.text) for one in scored)
        return in_completion(scored, offset)

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self._asked.token_ids else {}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        ids: Sequence[int],
        reason: str | None,
        scored: Sequence[TokenLogprob] = (),
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._asked.chat else {"text": delta.get("content", "")}
        said |= self._ids(ids)
        logprobs = self._logprobs(index, scored) if scored else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        extra = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "object": self._object, "choices": [choice], **extra}
