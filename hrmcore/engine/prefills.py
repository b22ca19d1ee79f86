"""Prefills of instructions that were answered already, for when one of them is asked again. Imports no torch.

An instruction is a bidirectional prefix: only the whole of it, token for token, has the same keys and values.
"""

from __future__ import annotations

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
        self._kept: OrderedDict[Instruction, Kept] = OrderedDict()  # the one used last at the end

    @property
    def tokens(self) -> int:
        """Tokens of the KV cache that are held here."""
        return sum(kept.tokens for kept in list(self._kept.values()))

    def keep(self, request: Request, row: NDArray[np.float32]) -> Kept:
        """The prefill of a request that has just begun, and the logits (V) after it. It is the caller's, to be put."""
        tokens = -(-len(request.ids) // PAGE) * PAGE
        return Kept(self._runner.keep(request.handle), row.copy(), tokens)

    def take(self, instruction: Instruction) -> Kept | None:
        """The prefill of an instruction, if there is one; it is the caller's, to be put back."""
        return self._kept.pop(instruction, None)

    def put(self, instruction: Instruction, kept: Kept) -> None:
        """Hold a prefill, at the cost of those that were used longest ago."""
        other = self._kept.pop(instruction, None)
        self._kept[instruction] = kept
        if other is not None:  # another thread's
            self._runner.close(other.handle)
        self.shrink(self._most_tokens)

    def shrink(self, tokens: int) -> bool:
        """Give up those that were used longest ago until at most `tokens` are held; whether there was one."""
        gave_up = False
        while self.tokens > max(tokens, 0):
            try:
                _, kept = self._kept.popitem(last=False)
            except KeyError:  # another thread has taken the last one
                break
            self._runner.close(kept.handle)
            gave_up = True
        return gave_up
