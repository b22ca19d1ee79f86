"""One answer on its way: the request, its token ids, its text, and the strings that stop it."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hrmcore.engine.drafts import Drafts
from hrmcore.engine.sampling import Sampler, Scores
from hrmcore.tokenizer import PieceDecoder, Tokenizer

# Why an answer is over: the model ended it, a stop string, max_new_tokens, the end of the context, close().
Finish = Literal["end", "stop", "length", "context", "closed"]

Instruction = tuple[int, tuple[int, ...]]  # the length of the prefix, and all tokens


@dataclass(frozen=True)
class TokenScore:
    """A token, the text that it stands for, and the natural logarithm of its probability."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TokenScore):
    """A token of an answer; `top` are the most probable ones in its place, in descending order."""

    top: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Scored:
    """A whole answer: its text, why it is over, and the log probabilities of its tokens."""

    text: str
    finish: Finish | None
    logprobs: list[TokenLogprob]


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine: what was asked, and how far the answer has come."""

    ids: list[int]
    prefix_length: int
    limit: int  # tokens to generate at most
    at_limit: Finish
    ends: frozenset[int]
    sampler: Sampler
    top: int | None = None  # log probabilities to report beside that of each token; None: not even that
    scores: list[Scores] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    handle: int = -1
    last: int = -1
    count: int = 0
    finish: Finish | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens the sequence can come to hold."""
        return len(self.ids) + self.limit

    @functools.cached_property
    def drafts(self) -> Drafts:
        """Guesses of what comes next."""
        return Drafts(self.ids)

    @functools.cached_property
    def instruction(self) -> Instruction:
        """What must be equal for two requests to share a prefill."""
        return self.prefix_length, tuple(self.ids)

    def take(self, token: int, scores: Scores | None = None) -> bool:
        """Append the next token; False when it is the one that ends the answer."""
        self.last = token
        if self.last in self.ends:
            self.finish = "end"
            return False
        if scores is not None:
            self.scores.append(scores)
        self.count += 1
        self.answer.append(token)
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

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, stops: StopFilter) -> None:
        self.request = tokens.request
        self.ids: list[int] = []  # the tokens generated so far
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._decoder = PieceDecoder(tokenizer)
        self._stops = stops
        self._flushed = False
        self._starts: list[int] = []  # of each token: characters of text before it
        self._decoded = self._shown = 0  # characters

    @property
    def finish(self) -> Finish | None:
        """Why the answer is over: end, stop, length, context or closed."""
        return self.request.finish

    @property
    def token_count(self) -> int:
        """Tokens generated so far."""
        return self.request.count

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log probabilities of the tokens generated so far, if they were asked for.

        They are those of the model, before repetition penalty, temperature and filters. The token that ends the answer,
        and tokens of a stop string alone, are not among them.
        """
        return self.logprobs_from(0)

    def logprobs_from(self, first: int, last: int | None = None) -> list[TokenLogprob]:
        """Those from the `first` on, up to the `last`."""
        scores = self.request.scores[:last]
        if self._stops.stopped:
            scores = scores[: sum(start < self._shown for start in self._starts)]
        return [self._logprob(one) for one in scores[first:]]

    def _logprob(self, scores: Scores) -> TokenLogprob:
        drawn, *top = [TokenScore(token, self._tokenizer.token_text(token), value) for token, value in scores]
        return TokenLogprob(drawn.token, drawn.text, drawn.logprob, tuple(top))

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
        self._starts.append(self._decoded)
        text = self._decoder.push(token)
        self._decoded += len(text)
        return self._pass(text)

    def flush(self) -> str:
        """What was held back, once no token follows."""
        if self._flushed:
            return ""
        self._flushed = True
        return self._pass(self._decoder.finish()) + self._stops.rest()

    def _pass(self, text: str) -> str:
        text = self._stops.push(text)
        self._shown += len(text)
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
