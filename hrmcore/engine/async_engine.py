"""One engine for many callers on event loops: their requests decode together, and join and leave between steps.

One thread runs the engine. It takes requests in the order in which they came, as many as the KV cache can hold when
each of them runs to its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hrmcore.engine.chat_template import Conversation
from hrmcore.engine.engine import Engine, TextOptions
from hrmcore.engine.sampling import is_integer, is_number, require
from hrmcore.engine.streams import Answer, Finish, Request, TokenLogprob

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11; only type checkers come here


class QueueFull(Exception):  # noqa: N818 - as in the queues of the standard library
    """As many requests wait as may; nothing was begun."""


class EngineClosed(Exception):  # noqa: N818 - it names a state
    """The engine takes no requests any more, or has ended this one."""


class AsyncEngine:
    """Answers from one Engine to any number of callers, each what `Engine.generate` would give it, token for token.

    At most `max_queue` requests wait. The methods that begin an answer raise ValueError on what Engine.stream refuses,
    QueueFull, and EngineClosed; they are for coroutines, on any loop. `timeout` is in seconds from that moment: an
    answer that is not complete by then raises TimeoutError.
    """

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        require(is_integer(max_queue) and max_queue >= 1, "max_queue", "a whole number of at least 1", max_queue)
        self.engine = engine
        self.max_queue = max_queue
        self._wake = threading.Condition()  # also guards what follows
        self._waiting: deque[tuple[_Job, Request]] = deque()
        self._open: set[_Job] = set()  # those that wait and those that run
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait to begin."""
        return len(self._waiting)

    @property
    def open_answers(self) -> int:
        """How many answers wait or are on their way."""
        return len(self._open)

    def stream(
        self,
        prompt: str | Conversation,
        *,
        timeout: float | None = None,
        logprobs: int | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncAnswer:
        """Answer a prompt piece by piece, with the options of `Engine.stream`.

        Whoever stops to iterate calls `close`; a task that is cancelled while it waits for a piece does so by itself.
        """
        good = timeout is None or (is_number(timeout) and timeout > 0)
        require(good, "timeout", "above 0, in seconds, or None", timeout)
        job = _Job(self, self.engine.stream(prompt, logprobs=logprobs, **options))
        with self._wake:
            if self._closing:
                raise EngineClosed("the engine is shutting down")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests are waiting already; try again later")
            self._open.add(job)
            self._waiting.append((job, job.answer.request))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hrmcore-engine", daemon=True)
                self._thread.start()
            self._wake.notify()
        if timeout is not None:
            job.timer = job.loop.call_later(timeout, job.fail, TimeoutError(f"no complete answer in {timeout} seconds"))
        return AsyncAnswer(job)

    async def generate(self, prompt: str, *, timeout: float | None = None, **options: Unpack[TextOptions]) -> str:
        """Answer a prompt."""
        return "".join([piece async for piece in self.stream(prompt, timeout=timeout, **options)])

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncAnswer:
        """Answer the last of messages, as `Engine.stream_chat` does."""
        return self.stream(self.engine.conversation(messages, tools), timeout=timeout, **options)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[TextOptions],
    ) -> str:
        """Answer the last of messages, as `Engine.chat` does."""
        return "".join([piece async for piece in self.stream_chat(messages, tools, timeout=timeout, **options)])

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, refuse those that wait, and give those that run `grace` seconds to end.

        What is refused or does not end raises EngineClosed where it is awaited. A second call may shorten the grace.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        waiting = [job for job, _ in self._waiting.copy()]  # whose items the engine's thread takes meanwhile
        for job in waiting:
            job.fail(EngineClosed("the engine is shutting down"))
        if self._thread is None:
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self._thread.join, grace)
        finally:
            with self._wake:
                running = list(self._open)
            for job in running:
                job.fail(EngineClosed("the engine has shut down before the answer was complete"))
        await loop.run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _work(self) -> None:
        while self._has_work():
            try:
                with contextlib.closing(self.engine.decode(self._waiting)) as run:
                    for step in run:
                        _deliver([(job, item) for job, token in step for item in job.take(token)])
            except Exception as error:  # such as MemoryError: whoever was being answered learns of it, and others go on
                with self._wake:
                    begun = self._open - {job for job, _ in self._waiting.copy()}
                for job in begun:
                    job.fail(error)

    def _has_work(self) -> bool:
        """Wait for a request; False when there is none and there will be none."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closing)
            return bool(self._waiting)

    def _forget(self, job: _Job, withdraw: bool) -> None:
        with self._wake:
            self._open.discard(job)
            if withdraw:
                with contextlib.suppress(ValueError, IndexError):  # it has begun, or just begins
                    self._waiting.remove((job, job.answer.request))


@dataclass(frozen=True)
class _Piece:
    text: str
    tokens: int  # with log probabilities, so far


_Item = _Piece | BaseException | None  # None: the answer is complete


class _Job:
    """One answer between the engine's thread, which fills it, and the caller's event loop, which empties it."""

    def __init__(self, home: AsyncEngine, answer: Answer) -> None:
        self.answer = answer
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[_Item] = asyncio.Queue()
        self.timer: asyncio.TimerHandle | None = None
        self._home = home
        self._over = False

    def take(self, token: int | None) -> list[_Item]:
        """What the engine's next token brings the caller; None when the request has left."""
        text = self.answer.flush() if token is None else self.answer.push(token)
        items: list[_Item] = [_Piece(text, len(self.answer.request.scores))] if text else []
        if token is None:
            self._home._forget(self, withdraw=False)
            items.append(None)
        return items

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, from any thread."""
        self._leave(error)

    def cancel(self) -> None:
        """End the answer without a word, from any thread."""
        self._leave(None)

    def abandon(self) -> None:
        """`cancel`, for a finaliser: it takes no lock."""
        self.answer.request.finish = self.answer.request.finish or "closed"
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.cancel)

    def _leave(self, last: BaseException | None) -> None:
        self.answer.request.finish = self.answer.request.finish or "closed"
        self._home._forget(self, withdraw=True)
        _deliver([(self, last)])

    def receive(self, item: _Item) -> None:
        """On the caller's loop: what `take` gave, or an error."""
        if self._over:
            return
        self.pieces.put_nowait(item)
        if not isinstance(item, _Piece):
            self._over = True
            if self.timer is not None:
                self.timer.cancel()


def _deliver(items: Sequence[tuple[_Job, _Item]]) -> None:
    """Hand each job its item, on its loop, which is woken once: a wake-up costs as much as a small model's step."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Job, _Item]]] = {}
    for job, item in items:
        loops.setdefault(job.loop, []).append((job, item))
    for loop, batch in loops.items():
        try:
            loop.call_soon_threadsafe(_receive, batch)
        except RuntimeError:  # the loop is closed: nobody waits any more
            for job, _ in batch:
                job.answer.request.finish = job.answer.request.finish or "closed"


def _receive(batch: Sequence[tuple[_Job, _Item]]) -> None:
    for job, item in batch:
        job.receive(item)


class AsyncAnswer(AsyncIterator[str]):
    """The pieces of one answer, as they come. `finish` tells why it is over (None while it is not)."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._over = False
        self._scored: int | None = 0  # tokens of the pieces so far

    @property
    def finish(self) -> Finish | None:
        """Why the answer is over: end, stop, length, context or closed."""
        return self._job.answer.finish

    @property
    def token_count(self) -> int:
        """Tokens generated so far."""
        return self._job.answer.token_count

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log probabilities of the tokens behind the pieces so far, as `Answer.logprobs`."""
        return self.logprobs_from(0)

    def logprobs_from(self, first: int) -> list[TokenLogprob]:
        """Those from the `first` on."""
        return self._job.answer.logprobs_from(first, self._scored)

    @property
    def ids(self) -> list[int]:
        """The tokens generated so far: those of the pieces that came, and of some that are to come."""
        return self._job.answer.ids

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, framing included."""
        return len(self._job.answer.request.ids)

    async def __anext__(self) -> str:
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._job.pieces.get()
        except BaseException:  # the task was cancelled
            self.close()
            raise
        if isinstance(item, _Piece):
            self._scored = item.tokens
            return item.text
        self._over = True
        self._scored = None
        if item is None:
            raise StopAsyncIteration
        raise item

    def close(self) -> None:
        """Cancel: nothing more comes, and the request leaves before the engine's next step."""
        if not self._over:
            self._over = True
            self._job.cancel()

    def __del__(self) -> None:
        if not self._over:  # nobody listens any more
            self._job.abandon()
