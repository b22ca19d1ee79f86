"""Training steps of small models as CUDA graphs: one launch for a step that is launches above all.

Batches are filled up to buckets (hrmcore/data/packing.py), so that few shapes come. The first batch of a shape runs as
it is, the second is captured, and from then on only the batch is copied and the graph replayed. Has not run on a GPU:
the tests replay by running again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrmcore.data.packing import Bucket, PackedBatch, pad
from hrmcore.graphs import CudaGraphs, Graphs, Run
from hrmcore.model import HRM
from hrmcore.ops.cross_entropy import check_rows


@dataclass(frozen=True)
class _Captured:
    """A graph, where it reads its batch, and where it leaves loss and gradients."""

    batch: PackedBatch
    count: Tensor
    results: list[Tensor | None]
    replay: Callable[[], None]


class CapturedSteps:
    """Gradients of one model by graphs. Its parameters must stay where they are; a model that grew needs another."""

    def __init__(
        self,
        model: HRM,
        batch_tokens: int,
        recompute: str,
        precision: Callable[[], AbstractContextManager[Any]],
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model
        self._parameters = list(model.parameters())
        self._batch_tokens, self._recompute, self._precision = batch_tokens, recompute, precision
        self._graphs: Graphs = CudaGraphs(self._parameters[0].device) if graphs is None else graphs
        self._steps: dict[tuple[Bucket, int], _Captured | None] = {}
        if model.xpos_log_decay is not None:
            model.reset_positions(model.config.context)

    def backward(self, batch: PackedBatch, horizon: int, count: int) -> Tensor:
        """Add the gradients of a batch's loss over `count` to the parameters'; returns that loss.

        Raises ValueError on a wrong supervised row.
        """
        check_rows(batch.supervised, len(batch.ids))
        key = Bucket.of(batch, self._batch_tokens), horizon
        padded = pad(batch, key[0])
        if key not in self._steps:
            self._steps[key] = None
            return self._add(self._graphs.warm(self._run_of(*self._brought(padded, count), horizon)))
        step = self._steps[key]
        if step is None:
            brought = self._brought(padded, count)
            step = self._steps[key] = _Captured(*brought, *self._graphs.capture(self._run_of(*brought, horizon)))
        else:
            _fill(step, padded, count)
        for parameter, result in zip(self._parameters, step.results[1:], strict=True):
            if result is not None and parameter.grad is result:  # which the graph is about to write over
                parameter.grad = result.clone()
        step.replay()
        return self._add(step.results)

    def _brought(self, batch: PackedBatch, count: int) -> tuple[PackedBatch, Tensor]:
        device = self._parameters[0].device
        return batch.to(device), torch.full((), float(count), device=device)

    def _run_of(self, batch: PackedBatch, count: Tensor, horizon: int) -> Run:
        return partial(self._run, batch, count, horizon)

    def _run(self, batch: PackedBatch, count: Tensor, horizon: int) -> list[Tensor | None]:
        with self._precision():
            loss = self.model.padded_loss(batch, horizon, self._recompute) / count
        return [loss.detach(), *torch.autograd.grad(loss, self._parameters, allow_unused=True)]

    def _add(self, results: list[Tensor | None]) -> Tensor:
        loss, *gradients = results
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        assert loss is not None
        return loss.clone()


def _fill(step: _Captured, batch: PackedBatch, count: int) -> None:
    brought = batch.to(step.count.device)
    for name, place in vars(step.batch).items():
        if name != "records":
            place.copy_(getattr(brought, name), non_blocking=True)
    step.count.fill_(float(count))
