"""Requests that decode together: they join and leave between steps, and share the prefill of an equal instruction.

A prefill beside other requests is made in slices, one after each of their steps. One prefill is under way at a time.
Imports no torch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from hrmcore.engine.prefills import Kept, Prefills
from hrmcore.engine.runner import Drawer, Interrupted, Prefill, Rows, Runner, Verifier
from hrmcore.engine.sampling import Scores, sample, score
from hrmcore.engine.streams import Instruction, Request

# A slice of a prefill is at most the work of a step of so many tokens, though half a layer at least; and of so many for
# each request beside it, or else prefills would come slower than answers end, and places in the steps stay empty.
SLICE_TOKENS = 32
SLICE_TOKENS_A_REQUEST = 4
# Rows of a step of few requests, guesses included: so many take no longer than one (bench/speed/verify.py).
VERIFIED_ROWS = 4

Key = TypeVar("Key")  # what a caller knows a request by
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """How many requests run together at most, the tokens that they may come to hold, and those of one prefill."""

    requests: int
    tokens: int
    prefill_tokens: int  # a longer prompt goes alone


@dataclass(frozen=True)
class _Drawn(Generic[Key]):
    key: Key
    request: Request
    token: int
    scores: Scores | None


@dataclass
class _Joining(Generic[Key]):
    """Requests whose prefill is under way: the first of each instruction, and those that wait for the same."""

    first: list[tuple[Key, Request]] = field(default_factory=list)
    alike: list[tuple[Key, Request]] = field(default_factory=list)
    prefill: Prefill | None = None

    @property
    def entries(self) -> list[tuple[Key, Request]]:
        return [*self.first, *self.alike]

    def stop(self) -> bool:
        """Whether one of those that are being read has been ended."""
        return any(request.finish for _, request in self.first)


class Scheduler(Generic[Key]):
    """One run over what waits; other threads may append to `waiting` and remove from it meanwhile."""

    def __init__(self, runner: Runner, waiting: deque[tuple[Key, Request]], limits: Limits, prefills: Prefills) -> None:
        self._runner = runner
        self._verifier = runner if isinstance(runner, Verifier) and runner.verifies else None
        self._drawer = runner if isinstance(runner, Drawer) else None
        self._waiting = waiting
        self._limits = limits
        self._prefills = prefills
        self._active: list[tuple[Key, Request]] = []
        self._joining: _Joining[Key] = _Joining()

    def run(self) -> Generator[list[tuple[Key, int | None]], None, None]:
        """What each step brings: (key, token) of all requests, then (key, None) of those that have left.

        A request whose `finish` is set, by anyone, leaves before the next step. Closing the generator ends all.
        """
        try:
            while self._waiting or self._active or self._joining.first:
                for drawn in self._step():
                    # One by one: whoever gets a token may end its request before it takes the next.
                    taken = [d for d in drawn if not d.request.finish and d.request.take(d.token, d.scores)]
                    tokens: list[tuple[Key, int | None]] = [(d.key, d.token) for d in taken]
                    if tokens:
                        yield tokens
                if gone := [entry for entry in self._active if entry[1].finish]:
                    self._active = [entry for entry in self._active if not entry[1].finish]
                    for _, request in gone:
                        self._runner.close(request.handle)
                    yield [(key, None) for key, _ in gone]
        finally:
            if self._joining.prefill:
                self._joining.prefill.close()
            for _, request in self._active:
                self._runner.close(request.handle)

    def _step(self) -> list[list[_Drawn[Key]]]:
        """The next token of every request that has one, and then those of guesses that were right."""
        fresh: list[_Drawn[Key]] = []
        running = list(self._active)
        self._admit(fresh)
        later: list[list[_Drawn[Key]]] = []
        if running:
            first, *later = self._decode(running)
            fresh[:0] = first
        if self._joining.first:
            fresh += self._advance(beside=len(running))
        return [fresh, *later]

    def _decode(self, running: Sequence[tuple[Key, Request]]) -> list[list[_Drawn[Key]]]:
        requests = [request for _, request in running]
        handles, last = [r.handle for r in requests], [r.last for r in requests]
        guesses = self._guess(requests)
        if self._verifier is None or not any(guesses):
            if self._drawer is not None and all(request.top is None for request in requests):
                return [self._draw_there(self._drawer, running)]
            return [_draw(running, self._with_room(lambda: self._runner.step(handles, last)))]
        verifier, tokens = self._verifier, [[r.last, *guess] for r, guess in zip(requests, guesses, strict=True)]
        rows = self._with_room(lambda: verifier.verify(handles, tokens))
        starts = list(itertools.accumulate(map(len, tokens), initial=0))[:-1]
        rounds = [_draw(running, rows[starts])]
        latest, right, going_on = [drawn.token for drawn in rounds[0]], [0] * len(running), list(range(len(running)))
        while going_on := [i for i in going_on if guesses[i][right[i] : right[i] + 1] == [latest[i]]]:
            for i in going_on:
                right[i] += 1
            rounds.append(_draw([running[i] for i in going_on], rows[[starts[i] + right[i] for i in going_on]]))
            for i, drawn in zip(going_on, rounds[-1], strict=True):
                latest[i] = drawn.token
        for request, guess, count in zip(requests, guesses, right, strict=True):
            if guess:
                request.drafts.verified(len(guess), count)
                verifier.rewind(request.handle, len(request.ids) + request.count + count)
        return rounds

    def _draw_there(self, drawer: Drawer, running: Sequence[tuple[Key, Request]]) -> list[_Drawn[Key]]:
        """The next token of each request, drawn by the runner."""
        requests = [request for _, request in running]
        handles, last, samplers = zip(*((r.handle, r.last, r.sampler) for r in requests), strict=True)
        left = [r.limit - r.count - 1 for r in requests]
        tokens = self._with_room(lambda: drawer.draw(handles, last, samplers, left))
        return [_Drawn(key, request, token, None) for (key, request), token in zip(running, tokens, strict=True)]

    def _guess(self, requests: Sequence[Request]) -> list[list[int]]:
        """What each request's next tokens may be, as many as are verified at little cost; often nothing."""
        most = VERIFIED_ROWS // len(requests) - 1
        if self._verifier is None or most < 1:
            return [[] for _ in requests]
        return [r.drafts.propose(r.answer, min(most, r.limit - r.count - 1)) for r in requests]

    def _admit(self, drawn: list[_Drawn[Key]]) -> None:
        """Take from the queue what fits; at least one when there is nothing else. Tokens that are there go to drawn."""
        joining = self._joining
        others = [request for _, request in [*self._active, *joining.entries]]
        room = self._limits.tokens - sum(request.most_tokens for request in others)
        prefill = self._limits.prefill_tokens
        count, instructions = len(others), {request.instruction for _, request in joining.first}
        while self._waiting and count < self._limits.requests:
            try:
                entry = self._waiting.popleft()
            except IndexError:  # another thread has withdrawn the last one
                break
            request = entry[1]
            if request.finish:
                continue
            instruction = request.instruction
            kept = self._prefills.take(instruction)
            reads = kept is None and instruction not in instructions
            room -= request.most_tokens
            if reads:
                prefill -= len(request.ids)
            fits = room >= 0 or not count
            if not fits or (reads and (joining.prefill is not None or (prefill < 0 and joining.first))):
                self._waiting.appendleft(entry)
                if kept:
                    self._prefills.put(instruction, kept)
                break
            self._prefills.shrink(room)
            count += 1
            if kept:
                drawn += self._fork([entry], instruction, kept)
            elif reads:
                joining.first.append(entry)
                instructions.add(instruction)
            else:
                joining.alike.append(entry)
        if joining.first and joining.prefill is None:
            self._begin()

    def _begin(self) -> None:
        requests = [request for _, request in self._joining.first]
        prompts, prefixes = [r.ids for r in requests], [r.prefix_length for r in requests]
        try:
            prefill = self._with_room(lambda: self._runner.begin(prompts, prefixes))
        except BaseException:
            self._joining = _Joining()
            raise
        self._joining.prefill = prefill

    def _advance(self, beside: int) -> list[_Drawn[Key]]:
        """The next slice of the prefill, or all of it where nobody waits beside it; the first tokens at its end."""
        joining, prefill = self._joining, self._joining.prefill
        assert prefill is not None
        try:
            if joining.stop():  # a slice is too short to ask
                raise Interrupted
            slice_tokens = max(SLICE_TOKENS, SLICE_TOKENS_A_REQUEST * beside) if beside else None
            rows = prefill.advance(slice_tokens, joining.stop)
        except BaseException as error:
            self._joining = _Joining()
            prefill.close()
            if not isinstance(error, Interrupted):
                raise
            self._waiting.extendleft(reversed(joining.entries))
            return []
        if rows is None:
            return []
        self._joining = _Joining()
        for (_, request), handle in zip(joining.first, prefill.handles, strict=True):
            request.handle = handle
        self._active += joining.first
        drawn = _draw(joining.first, rows)
        for (_, request), row in zip(joining.first, rows, strict=True):
            instruction = request.instruction
            alike = [entry for entry in joining.alike if entry[1].instruction == instruction and not entry[1].finish]
            drawn += self._fork(alike, instruction, self._prefills.keep(request, row))
        return drawn

    def _fork(self, entries: Sequence[tuple[Key, Request]], instruction: Instruction, kept: Kept) -> list[_Drawn[Key]]:
        """Requests begin where a prefill ended; their first tokens."""
        try:
            for entry in entries:
                entry[1].handle = self._with_room(lambda: self._runner.fork(kept.handle))
                self._active.append(entry)
                self._prefills.reused += 1
        finally:
            self._prefills.put(instruction, kept)
        return _draw(entries, np.tile(kept.row, (len(entries), 1))) if entries else []

    def _with_room(self, call: Callable[[], Result]) -> Result:
        """A call of the runner; without room for it, once more without the kept prefills."""
        try:
            return call()
        except MemoryError:
            if not self._prefills.shrink(0):
                raise
        return call()  # out of the handler: a second error must not hold on to what the first call held


def _draw(entries: Sequence[tuple[Key, Request]], rows: Rows) -> list[_Drawn[Key]]:
    """Each request's token from its row of logits (S, V)."""
    tokens = sample([request.sampler for _, request in entries], rows)
    scores = score(tokens, [request.top for _, request in entries], rows)
    drawn = zip(entries, tokens, scores, strict=True)
    return [_Drawn(key, request, token, scored) for (key, request), token, scored in drawn]
