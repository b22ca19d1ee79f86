"""What the engine asks of whatever runs the recurrence. Imports no torch.

Shapes: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hrmcore import _C
from hrmcore.config import HRMConfig

if TYPE_CHECKING:
    from hrmcore.engine.sampling import Sampler

# What weights may be held as; a runner may take fewer.
DTYPES = ("float32", "bfloat16", "int8", "int4")

# Tokens in one page of the KV cache, in every runner: the kernels of csrc/kv and csrc/decode are built for it.
PAGE: int = _C.page_tokens

Rows = NDArray[np.float32]


class Prefill(Protocol):
    """New sequences while their prompts are read; once all is done, `handles` names them."""

    handles: list[int]

    def advance(self, tokens: int | None, stop: Callable[[], bool] | None = None) -> Rows | None:
        """Do a part of the work; the logits (S, V) float32 after the last tokens once all is done, else None.

        The part is about as much as a step of so many tokens is; None is all. A runner may call `stop` meanwhile; when
        it returns True, the runner raises Interrupted. After an error only `close` may be called.
        """
        ...

    def close(self) -> None:
        """Give the prefill up and close its sequences; for one that is not done."""
        ...


class Runner(Protocol):
    """Sequences that are opened with a prompt, advance by one token together, and are closed.

    The engine has checked every argument: token ids are in the vocabulary, no sequence grows beyond the context, every
    handle is open. A sequence's logits must not depend on which others are open, or advance in the same call.
    Runners may be called from several threads, and work on one call at a time. What Python runs inside a step of
    CpuRunner (a signal's handler, a finaliser, `stop`) may open and close, and gets RuntimeError when it steps.

    A call that raises has changed nothing: the sequences that were open still are, at the length they had, and none was
    added. MemoryError says that the KV cache has no room; OSError, that the weights' file can no longer be read. The
    rows that a call returns belong to the caller.

    `dtype` is how the weights are held, one of DTYPES; `parameters` counts the weights; `cache_bytes_per_token` is what
    one token adds to the KV cache, by which the engine decides how many requests run together.
    """

    config: HRMConfig
    dtype: str
    parameters: int
    cache_bytes_per_token: int

    @property
    def open_sequences(self) -> int:
        """How many sequences are open."""
        ...

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        prefix_lengths: Sequence[int],
        stop: Callable[[], bool] | None = None,
    ) -> tuple[list[int], Rows]:
        """Prefill new sequences; returns a handle for each, and the logits (S, V) float32 after their last tokens.

        The first `prefix_lengths[i]` tokens of a prompt see each other both ways; a model without prefix_lm ignores
        that. A handle is not used again while its sequence is open. A runner may call `stop` during the prefill; when
        it returns True, the runner raises Interrupted.
        """
        ...

    def begin(self, prompts: Sequence[Sequence[int]], prefix_lengths: Sequence[int]) -> Prefill:
        """`open` in parts, between which other sequences may advance. The logits are the same."""
        ...

    def keep(self, handle: int) -> int:
        """What a sequence holds now, to be forked and closed, under a handle of its own. It does not count as open."""
        ...

    def fork(self, kept: int) -> int:
        """A new sequence that holds what was kept: its logits are what those of the first would be."""
        ...

    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Append one token to each of these sequences; returns the logits (S, V) float32 that follow, in their order.

        No handle comes twice; sequences that are not named wait.
        """
        ...

    def close(self, handle: int) -> None:
        """Release what a sequence holds. The handle must not be used any more."""
        ...

    def logits(self, ids: Sequence[int], prefix_length: int) -> Rows:
        """The logits (T, V) float32 after every token of one sequence, which leaves nothing open."""
        ...

    def layers(self, ids: Sequence[int], prefix_length: int, stop: Callable[[], bool] | None = None) -> Rows:
        """The logits (cache_slots, V) float32 after the last token of one sequence, which leaves nothing open.

        As the head would read them after each layer of each visit, if the recurrence ended there; the last row is the
        model's. `stop` is as in `open`.
        """
        ...


@runtime_checkable
class Verifier(Protocol):
    """A runner whose logits have the same bits however many tokens a sequence advances by, and which can go back.

    `verifies` says whether this one does.
    """

    verifies: bool

    def verify(self, handles: Sequence[int], tokens: Sequence[Sequence[int]]) -> Rows:
        """Append some tokens to each of these sequences; the logits float32 after every one, sequence by sequence."""
        ...

    def rewind(self, handle: int, length: int) -> None:
        """Take back a sequence's last tokens, so that `length` are left; never any that it was opened with."""
        ...


@runtime_checkable
class Drawer(Protocol):
    """A runner that draws tokens where their logits lie, and so hands over a token instead of a row of them."""

    def draw(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler], left: Sequence[int]
    ) -> list[int]:
        """Append one token to each of these sequences; the token that each sampler draws next, which counts as drawn.

        They are the tokens that `sampling.sample` draws from the logits of `step`, but for rounding. `left` is how many
        tokens each may be asked for after that: the runner may begin with those that are. Raises ArithmeticError as
        `sample` does; then nothing has changed.
        """
        ...


class WholePrefill:
    """The prefill of a runner that does it in one piece, whatever part is asked for."""

    def __init__(self, runner: Runner, prompts: Sequence[Sequence[int]], prefix_lengths: Sequence[int]) -> None:
        self.handles: list[int] = []
        self._open = functools.partial(runner.open, prompts, prefix_lengths)

    def advance(self, tokens: int | None, stop: Callable[[], bool] | None = None) -> Rows | None:
        self.handles, rows = self._open(stop)
        return rows

    def close(self) -> None:
        pass  # a call that raises leaves nothing open


class Interrupted(Exception):  # noqa: N818 - not an error: someone asked for it
    """A call ended early because `stop` returned True; it has changed nothing."""
