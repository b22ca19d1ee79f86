"""What the engine asks of whatever runs the recurrence. Imports no torch.

Shapes: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrmcore.config import HRMConfig

Rows = NDArray[np.float32]


class Runner(Protocol):
    """Sequences that join, advance by one token together, and leave. Arguments have been checked by the engine."""

    config: HRMConfig
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

        May ask `stop` meanwhile, and raise `hrmcore.engine.runner.Interrupted`, nothing being left, when it says True.
        """
        ...

    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Append one token to each of these sequences; returns the logits (S, V) float32 that follow."""
        ...

    def close(self, handle: int) -> None:
        """Release what a sequence holds."""
        ...

    def logits(self, ids: Sequence[int], prefix_length: int) -> Rows:
        """The logits (T, V) float32 of every position, without a cache."""
        ...


class Interrupted(Exception):  # noqa: N818 - not an error: someone asked for it
    """A step that `stop` ended before its time; nothing has happened."""
