"""Guesses of the next tokens, for a step to verify several at once: what followed the last few tokens before.

A step of a few rows takes no longer than one of a single row where its time goes into reading the weights. The idea is
prompt lookup (Saxena, 2023), the verification that of arXiv 2211.17192 without its rejection sampling: a guess counts
only when it is the token that the sampler draws. Imports nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3  # tokens that are looked up
MOST = 3  # tokens that are guessed
PAUSE = 8  # tokens without a guess after guesses that failed, the first time


class Drafts:
    """The guesses for one sequence. They come as long as they pay: longer after success, then none for a while.

    `ids` is the prompt. Tokens of the answer are given with each call, all of them, the newest last.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.length = 2  # of the next guess
        self._pause = PAUSE
        self._waited = 0
        self._tokens = list(ids)
        self._prompt = len(self._tokens)
        self._follows: dict[tuple[int, ...], int] = {}  # where the token stands that followed these the last time
        self._known = 0  # tokens that _follows knows what they follow

    def propose(self, answer: Sequence[int], most: int) -> list[int]:
        """What may follow, at most `most` tokens; often nothing."""
        self._tokens += answer[len(self._tokens) - self._prompt :]
        if self.length == 0:
            self._waited += 1
            if self._waited < self._pause:
                return []
            self.length, self._waited = 1, 0
        self._learn()
        if (at := self._last_time()) is None:
            return []
        period = len(self._tokens) - at  # what ends here goes on as what repeats itself
        return [self._tokens[at + index % period] for index in range(min(self.length, most))]

    def verified(self, guessed: int, right: int) -> None:
        """How many tokens of the last guess were right, from the first on."""
        if right == guessed:
            self.length, self._pause = min(2 * max(self.length, 1), MOST), PAUSE
        elif right == 0:
            self.length //= 2
            if self.length == 0:
                self._pause *= 2
        else:
            self.length = right

    def _learn(self) -> None:
        tokens = self._tokens
        for place in range(max(self._known, 1), len(tokens)):
            for size in range(1, min(LONGEST, place) + 1):
                self._follows[tuple(tokens[place - size : place])] = place
        self._known = len(tokens)

    def _last_time(self) -> int | None:
        """Where the token stands that followed the longest end of the sequence that has come before."""
        for size in range(min(LONGEST, len(self._tokens)), 0, -1):
            if (place := self._follows.get(tuple(self._tokens[-size:]))) is not None:
                return place
        return None
