"""CUDA graphs of what runs again and again over tensors that stay where they are: training steps, prefills.

Has not run on a GPU: the tests replay by running again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[], list[Tensor | None]]


class Graphs(Protocol):
    """What captures a computation over tensors that stay where they are."""

    def warm(self, run: Run) -> list[Tensor | None]:
        """Run as it is, where capturing will run."""
        ...

    def capture(self, run: Run) -> tuple[list[Tensor | None], Callable[[], None]]:
        """Record what `run` does; returns where its results will be, and what computes them anew."""
        ...


class CudaGraphs:
    """torch's, of computations on one device, all in one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm(self, run: Run) -> list[Tensor | None]:
        """On the stream that captures, for what libraries allocate at first."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = run()
        current.wait_stream(self._stream)
        for result in results:
            if result is not None:
                result.record_stream(current)
        return results

    def capture(self, run: Run) -> tuple[list[Tensor | None], Callable[[], None]]:
        """Nothing runs yet."""
        graph = torch.cuda.CUDAGraph()
        # torch waits for the device in use before it records
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            results = run()
        return results, graph.replay
