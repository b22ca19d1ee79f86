"""Prefills in few shapes, so that each is captured as a CUDA graph: one launch instead of some 1,660 from Python.

New sequences are filled up to a bucket of tokens and sequences: one more sequence holds the rest, whose keys and values
are not kept. What a real token computes does not depend on it. The first prefill of a bucket runs as it is, the second
is captured, later ones copy their numbers and replay.

Shapes: T tokens and S sequences of the bucket, V vocabulary, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.engine.cuda_cache import store_int8
from hrmcore.graphs import Graphs
from hrmcore.model import HRM, ForwardContext, Layout
from hrmcore.ops.backend import runs_on_cuda, stream_of
from hrmcore.ops.rope import rope

TOKENS = (64, 128, 256, 512, 1024, 2048)
SEQUENCES = (1, 2, 4, 8)


@dataclass(frozen=True)
class _Numbers:
    """What a prefill reads beside weights and cache; the last of the S + 1 sequences is the filling."""

    ids: Tensor  # (T) int64
    positions: Tensor  # (T) int32
    rows: Tensor  # (T) int64: where in the cache each token's keys and values go; -1 of the filling
    offsets: Tensor  # (S + 2) int32
    prefix: Tensor  # (S + 1) int32
    last: Tensor  # (S) int64: the last token of each sequence

    def copy_from(self, other: _Numbers) -> None:
        for name, place in vars(self).items():
            place.copy_(getattr(other, name), non_blocking=True)

    def to(self, device: torch.device) -> _Numbers:
        return _Numbers(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class _NewKeys:
    """The cache (model.Cache) of sequences that begin: keys and values are those of this call, which it stores."""

    def __init__(self, kv: Tensor, numbers: _Numbers) -> None:
        self._kv, self._rows = kv, numbers.rows
        self.key_offsets = numbers.offsets

    def extend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        cache = self._kv[context.slot]
        in_int8 = cache.dtype == torch.uint8
        if not (runs_on_cuda(q) and q.dtype == torch.bfloat16):
            q, k = rope(q, k, context.table, context.positions)
            kept = self._rows >= 0
            if in_int8:
                store_int8(cache, self._rows[kept], k[kept], v[kept])
            else:
                cache[:, self._rows[kept]] = torch.stack((k[kept], v[kept]))
            return q, k, v
        keys, values = (cache, cache) if in_int8 else cache.unbind()
        rotated = torch.empty(2, *q.shape, dtype=q.dtype, device=q.device)
        angles = {"table": context.table, "positions": context.positions}
        operands = {"q": q, "k": k, "v": v, **angles, "rows": self._rows}
        written = {"q_out": rotated[0], "k_out": rotated[1], "keys": keys, "values": values}
        capsules = {name: to_dlpack(tensor) for name, tensor in (operands | written).items()}
        _C.cuda_rotate_append(**capsules, stream=stream_of(q))
        return rotated[0], rotated[1], v


@dataclass(frozen=True)
class _Captured:
    numbers: _Numbers
    results: list[Tensor | None]
    replay: Callable[[], None]


class BucketedPrefill:
    """Prefills of one model into one cache, whose graphs begin anew where the cache moves."""

    def __init__(self, model: HRM, graphs: Graphs) -> None:
        self._model = model
        self._graphs = graphs
        self._captured: dict[tuple[int, int], _Captured | None] = {}
        self._cache: int | None = None  # the address that they write to
        if model.xpos_log_decay is not None:
            model.reset_positions(model.config.context)  # the tables stay where they are

    def takes(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether there is a bucket for these, whose filling is no longer than a sequence may be."""
        tokens = sum(map(len, prompts))
        if tokens > TOKENS[-1] or len(prompts) > SEQUENCES[-1]:
            return False
        return bucket_of(prompts)[0] - tokens <= self._model.config.context

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[int],
        rows: Sequence[Tensor],
        kv: Tensor,
    ) -> Tensor:
        """The logits (prompts, V) float32 after each prompt; its keys and values go to its `rows` of kv.

        kv is as cuda_cache.empty_cache makes it.
        """
        if self._cache != kv.data_ptr():
            self._captured.clear()
            self._cache = kv.data_ptr()
        bucket = bucket_of(prompts)
        numbers = _filled(prompts, prefixes, rows, bucket, kv.device)
        logits = self._logits(bucket, numbers, kv)
        return logits[: len(prompts)].to(torch.float32, copy=True)  # the graph writes over its own

    def _logits(self, bucket: tuple[int, int], numbers: _Numbers, kv: Tensor) -> Tensor:
        if bucket not in self._captured:
            self._captured[bucket] = None
            return _only(self._graphs.warm(partial(self._run, numbers.to(kv.device), kv)))
        captured = self._captured[bucket]
        if captured is None:
            brought = numbers.to(kv.device)
            captured = _Captured(brought, *self._graphs.capture(partial(self._run, brought, kv)))
            self._captured[bucket] = captured
        else:
            captured.numbers.copy_from(numbers)
        captured.replay()
        return _only(captured.results)

    def _run(self, numbers: _Numbers, kv: Tensor) -> list[Tensor | None]:
        layout = Layout(numbers.offsets, numbers.prefix, numbers.positions, longest=0)
        states = self._model.hidden(numbers.ids, layout, _NewKeys(kv, numbers), rows=numbers.last)
        return [self._model.lm_head(states)]


def bucket_of(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The smallest bucket that holds these prompts: its tokens and its sequences."""
    tokens = sum(map(len, prompts))
    return next(n for n in TOKENS if n >= tokens), next(n for n in SEQUENCES if n >= len(prompts))


def _filled(
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[int],
    rows: Sequence[Tensor],
    bucket: tuple[int, int],
    device: torch.device,
) -> _Numbers:
    """Prompts filled up to their bucket, on the host: empty sequences, and one of tokens 0."""
    tokens, sequences = bucket
    lengths = [len(prompt) for prompt in prompts] + [0] * (sequences - len(prompts))
    filling = tokens - sum(lengths)
    offsets = torch.tensor([0, *lengths, filling], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = [torch.arange(length, dtype=torch.int32) for length in (*lengths, filling)]
    numbers = _Numbers(
        ids=torch.tensor([*chain.from_iterable(prompts), *[0] * filling]),
        positions=torch.cat(positions),
        rows=torch.cat([*rows, torch.full((filling,), -1)]),
        offsets=offsets,
        prefix=torch.tensor([*prefixes, *[0] * (sequences + 1 - len(prompts))], dtype=torch.int32),
        last=(offsets[1:-1].long() - 1).clamp(min=0),
    )
    if device.type != "cuda":
        return numbers
    return _Numbers(**{name: tensor.pin_memory() for name, tensor in vars(numbers).items()})


def _only(results: list[Tensor | None]) -> Tensor:
    (logits,) = results
    assert logits is not None
    return logits
