"""The lens over HTTP: how one token of an answer formed, layer by layer and visit by visit (`hrmcore.lens`).

It reads what the engine that serves would have said, from the same weights. One look is a prefill of the prompt and the
answer up to the token. Shapes: T tokens, S layers of all visits, V vocabulary.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrmcore.engine.async_engine import AsyncEngine, EngineClosed, QueueFull
from hrmcore.engine.engine import Engine
from hrmcore.engine.sampling import is_integer
from hrmcore.lens_names import places, token_name, visit_name
from hrmcore.serving.protocol import Refused, check_model, json_object, read_messages, read_tools, shown
from hrmcore.serving.waits import deadline

CONTENDERS = 4  # tokens besides the answer's whose probability is told at every step
_FIELDS = ("model", "messages", "tools", "tool_choice", "condition", "answer", "token")


@dataclass(frozen=True)
class LensAsked:
    """A request: the conversation, the token ids of the answer to it, and which of them to look at."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    condition: str
    answer: list[int]
    token: int

    def ids(self, engine: Engine) -> tuple[list[int], int]:
        """The tokens (T) before the one to look at, and how many of them are the prompt. Raises ValueError."""
        vocabulary = engine.config.vocab_size
        for index in self.answer:
            if not 0 <= index < vocabulary:
                raise ValueError(f"answer must hold token ids below {vocabulary}, got {index}")
        prompt = engine.prompt_ids(engine.conversation(self.messages, self.tools), self.condition)
        ids = [*prompt, *self.answer[: self.token]]
        if len(ids) > engine.config.context:
            most = engine.config.context
            raise ValueError(f"prompt and answer have {len(ids)} tokens; there is no room in the context of {most}")
        return ids, len(prompt)


def parse_lens(body: bytes, model: str) -> LensAsked:
    """The body of a request to /v1/lens. Raises Refused."""
    given = json_object(body)
    if unknown := [name for name in given if name not in _FIELDS]:
        raise Refused(400, f"unknown field {shown(unknown[0])}", unknown[0][:64], "unknown_parameter")
    check_model(given, model)
    messages, answer, token = read_messages(given), given.get("answer", []), given.get("token", 0)
    if not isinstance(answer, list) or not all(is_integer(index) for index in answer):
        raise Refused(400, "answer must be a list of token ids, as return_token_ids brings them", "answer")
    if not is_integer(token) or not 0 <= token <= len(answer):
        raise Refused(400, f"token must be from 0 to the {len(answer)} of the answer, got {shown(token)}", "token")
    return LensAsked(messages, read_tools(given), given.get("condition", "direct"), answer, token)


class Looks:
    """Looks into one engine: one at a time, the others wait in the engine's queue with the answers."""

    def __init__(self, served: AsyncEngine) -> None:
        self.waiting = 0
        self.closing = False
        self._served = served
        self._turn = asyncio.Semaphore(1)

    async def look(self, asked: LensAsked, ids: Sequence[int], prompt: int, timeout: float | None) -> dict[str, Any]:
        """What `seen` tells. Raises QueueFull, EngineClosed, TimeoutError. Cancelled, the engine stops soon."""
        self._check_open()
        if self.waiting + self._served.waiting >= self._served.max_queue:
            raise QueueFull(f"{self._served.max_queue} requests are waiting already; try again later")
        self.waiting += 1
        try:
            async with deadline(timeout), self._turn:
                self._check_open()
                return await _in_a_thread(self._served.engine, asked, ids, prompt)
        finally:
            self.waiting -= 1

    def _check_open(self) -> None:
        if self.closing:
            raise EngineClosed("the engine is shutting down")


async def _in_a_thread(engine: Engine, asked: LensAsked, ids: Sequence[int], prompt: int) -> dict[str, Any]:
    stop = threading.Event()

    def work() -> dict[str, Any]:
        return seen(engine, asked, engine.layers(ids, prompt, stop.is_set))

    working = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(working)
    finally:
        stop.set()  # where the caller is cancelled; the next look waits until the engine has let go
        await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # nobody else asks for it


def seen(engine: Engine, asked: LensAsked, logits: NDArray[np.float32]) -> dict[str, Any]:
    """What logits (S, V) say, as JSON holds it. Probabilities are of one step; `kl` is in nats, from the last step.

    `answer` is the token that the answer has there, or would have: its `probabilities` are those of every step, as are
    those of its `contenders`, the tokens that were most probable besides.
    """
    tokenizer, config = engine.text_tokenizer(), engine.config
    answer = asked.answer[asked.token] if asked.token < len(asked.answer) else int(logits[-1].argmax())
    norms = np.array([_log_sum_exp(row) for row in logits])
    last = logits[-1] - norms[-1]
    steps, sums = [], np.zeros(logits.shape[1])
    for (h, l, stack, layer), row, norm in zip(places(config), logits, norms, strict=True):  # noqa: E741
        logs, leader = row - norm, int(row.argmax())
        sums += np.exp(logs)
        steps.append(
            {
                "visit": visit_name(h, stack, l),
                "stack": stack,
                "layer": layer,
                "token": leader,
                "text": token_name(tokenizer, leader),
                "probability": _rounded(np.exp(logs[leader])),
                "kl": _rounded(np.sum(np.exp(last) * (last - logs))),
            }
        )

    def followed(token: int) -> dict[str, Any]:
        shares = [_rounded(share) for share in np.exp(logits[:, token] - norms)]
        return {"token": token, "text": token_name(tokenizer, token), "probabilities": shares}

    contenders = [int(token) for token in np.argsort(-sums, kind="stable")[: CONTENDERS + 1] if token != answer]
    return {
        "object": "lens",
        "tokens": [token_name(tokenizer, index) for index in asked.answer],
        "token": asked.token,
        "answer": followed(answer),
        "contenders": [followed(token) for token in contenders[:CONTENDERS]],
        "steps": steps,
    }


def _log_sum_exp(row: NDArray[np.float32]) -> np.float64:
    most = np.float64(row.max())
    return most + np.log(np.exp(row.astype(np.float64) - most).sum())


def _rounded(value: float) -> float:
    return round(max(float(value), 0.0), 6)
