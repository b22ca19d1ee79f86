"""One answer on its way: the request, its token ids, its text, and the strings that stop it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hrmcore.engine.sampling import Sampler
from hrmcore.tokenizer import PieceDecoder

# Why an answer is over: the model ended it, a stop string, max_new_tokens, the end of the context, close().
Finish = Literal["end", "stop", "length", "context", "closed"]


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine: what was asked, and how far the answer has come."""

    ids: list[int]
    prefix_length: int
    limit: int  # tokens to generate at most
    at_limit: Finish
    ends: frozenset[int]
    sampler: Sampler
    handle: int = -1
    last: int = -1
    count: int = 0
    finish: Finish | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens the sequence can come to hold."""
        return len(self.ids) + self.limit

    def take(self, token: int) -> bool:
        """Append the next token; False when it is the one that ends the answer."""
        self.last = token
        if self.last in self.ends:
            self.finish = "end"
            return False
        self.count += 1
        if self.count == self.limit:
            self.finish = self.at_limit
        return True


class Tokens(Iterator[int]):
    """The token ids of one answer, as they come."""

    def __init__(self, request: Request, run: Generator[int, None, None]) -> None:
        self.request = request
        self._run = run

    def __next__(self) -> int:
        token = next(self._run)
        if self.request.finish == "closed":  # by another thread, while this one was inside the generator
            self.close()
            raise StopIteration
        return token

    def close(self) -> None:
        """Cancel: release what the request holds. Nothing more comes.

        Another thread may call it while one waits for a token: the wait ends, even in the middle of a long prefill.
        """
        self.request.finish = self.request.finish or "closed"
        try:
            self._run.close()
        except ValueError as error:
            if str(error) != "generator already executing":
                raise  # else whoever is inside the generator sees `finish` when it leaves it


class Answer(Iterator[str]):
    """The pieces of one answer, as they come. `finish` tells why it is over (None while it is not)."""

    def __init__(self, tokens: Tokens, decoder: PieceDecoder, stops: StopFilter) -> None:
        self.request = tokens.request
        self.ids: list[int] = []  # the tokens generated so far
        self._tokens = tokens
        self._decoder = decoder
        self._stops = stops
        self._flushed = False

    @property
    def finish(self) -> Finish | None:
        """Why the answer is over: end, stop, length, context or closed."""
        return self.request.finish

    @property
    def token_count(self) -> int:
        """Tokens generated so far."""
        return self.request.count

    def __next__(self) -> str:
        for token in self._tokens:
            if piece := self.push(token):
                return piece
        if rest := self.flush():
            return rest
        raise StopIteration

    def close(self) -> None:
        """Cancel, as `Tokens.close` does."""
        self._flushed = True
        self._tokens.close()

    def push(self, token: int) -> str:
        """The text that may be shown after this token; sets `finish` when a stop string is complete."""
        self.ids.append(token)
        return self._pass(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, once no token follows."""
        if self._flushed:
            return ""
        self._flushed = True
        return self._pass(self._decoder.finish()) + self._stops.rest()

    def _pass(self, text: str) -> str:
        text = self._stops.push(text)
        if self._stops.stopped:
            self.request.finish = "stop"
        return text


class StopFilter:
    """Lets text through up to the stop string that is complete first, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown: all but a stop string, or the possible beginning of one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown = min(found)[1]
            self._held = ""
        else:
            shown = len(text) - self._beginning(text)
            self._held = text[shown:]
        return text[:shown]

    def rest(self) -> str:
        """What was held back, when nothing follows."""
        rest, self._held = self._held, ""
        return rest

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
