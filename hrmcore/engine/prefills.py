"""Prefills of instructions that were answered already, for when one of them is asked again. Imports no torch.

An instruction is a bidirectional prefix: only the whole of it, token for token, has the same keys and values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrmcore.engine.runner import PAGE, Runner
from hrmcore.engine.streams import Instruction, Request


@dataclass(frozen=True)
class Kept:
    """A prefill: `handle` to fork, the logits (V) after its last token, and the tokens of its pages."""

    handle: int
    row: NDArray[np.float32]
    tokens: int


class Prefills:
    """The prefills that were used last, as many as `most_tokens` of the KV cache hold.

    Any thread may call. What is taken is the caller's until it is put back: nobody else can close it meanwhile.
    """

    def __init__(self, runner: Runner, most_tokens: int) -> None:
        self.reused = 0
        self._runner = runner
        self._most_tokens = most_tokens
        self._lock = threading.RLock()  # of what follows; a finaliser may come here on the same thread
        self._kept: OrderedDict[Instruction, Kept] = OrderedDict()  # the one used last at the end
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens of the KV cache that are held here."""
        return self._tokens

    def keep(self, request: Request, row: NDArray[np.float32]) -> Kept:
        """The prefill of a request that has just begun, and the logits (V) after it. It is the caller's, to be put."""
        tokens = -(-len(request.ids) // PAGE) * PAGE
        return Kept(self._runner.keep(request.handle), row.copy(), tokens)

    def take(self, instruction: Instruction) -> Kept | None:
        """The prefill of an instruction, if there is one; it is the caller's, to be put back."""
        with self._lock:
            if (kept := self._kept.pop(instruction, None)) is not None:
                self._tokens -= kept.tokens
            return kept

    def put(self, instruction: Instruction, kept: Kept) -> None:
        """Hold a prefill, at the cost of those that were used longest ago."""
        with self._lock:
            other = self.take(instruction)  # another thread's
            self._kept[instruction] = kept
            self._tokens += kept.tokens
        if other is not None:
            self._runner.close(other.handle)
        self.shrink(self._most_tokens)

    def shrink(self, tokens: int) -> bool:
        """Give up those that were used longest ago until at most `tokens` are held; whether there was one."""
        given_up: list[Kept] = []
        with self._lock:
            while self._kept and self._tokens > max(tokens, 0):
                kept = self._kept.popitem(last=False)[1]
                self._tokens -= kept.tokens
                given_up.append(kept)
        for kept in given_up:
            self._runner.close(kept.handle)
        return bool(given_up)
