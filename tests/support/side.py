"""What stands for a stream that copies beside the computation, where there is no GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from hrmcore.checkpoint.host_copies import Pair


class Late:
    """Copies as late as it may: when a computation holds for them, or the host says that it has nothing left to do.

    Its memory begins as NaNs, so that what is read too early shows.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fault: Exception | None = None
        self._pairs: list[Pair] = []
        self._landed = threading.Event()

    def memory(self, size: int) -> Tensor:
        self.calls.append("memory")
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def begin(self, pairs: Sequence[Pair]) -> None:
        self.calls.append("begin")
        self._pairs = list(pairs)
        self._landed.clear()

    def hold(self) -> None:
        self.calls.append("hold")
        self.land()

    def wait(self) -> None:
        assert self._landed.wait(60), "nobody holds for the copies and nobody waits"
        if self.fault is not None:
            raise self.fault

    def land(self) -> None:
        """Whatever was enqueued is through."""
        for place, tensor in self._pairs:
            place.copy_(tensor)
        self._pairs = []
        self._landed.set()
