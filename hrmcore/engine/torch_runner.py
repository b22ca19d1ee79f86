"""The reference runner: the model in torch, with a paged KV cache.

Shapes: T tokens, S sequences, H heads, d head_dim, V vocabulary, C pages of the longest sequence.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_cache import bytes_per_token, empty_cache, grown, page_count, pages_of, store_int8
from hrmcore.engine.runner import PAGE, Prefill, Rows, WholePrefill
from hrmcore.lens import look
from hrmcore.model import HRM, ForwardContext, Layout
from hrmcore.ops.rope import rope

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass
class _Sequence:
    prefix: int
    length: int = 0
    pages: list[int] = field(default_factory=list)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows of the pool that hold the tokens from start to stop."""
        position = torch.arange(start, stop)
        return torch.tensor(self.pages)[position // PAGE] * PAGE + position % PAGE


class _Pool:
    """Keys and values of all sequences (cuda_cache.empty_cache), handed out in pages. Grows, never shrinks.

    `dtype` is that of the cache's tensor: uint8 is an int8 cache.
    """

    def __init__(self, config: HRMConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.kv = empty_cache(config, dtype, device)
        self._free: list[int] = []  # highest page first, so that a lone sequence gets neighbouring pages
        self._shared: Counter[int] = Counter()  # pages that several sequences hold: how many hold them beyond the first

    def reserve(self, sequence: _Sequence, length: int) -> None:
        """Give a sequence enough pages for this many tokens."""
        missing = -(-length // PAGE) - len(sequence.pages)
        if missing > len(self._free):
            self._grow(missing)
        sequence.pages += [self._free.pop() for _ in range(missing)]

    def copy(self, sequence: _Sequence) -> _Sequence:
        """A sequence that holds the same: the full pages are shared, the last one is copied if it is not full."""
        full = sequence.length // PAGE
        copied = _Sequence(sequence.prefix, sequence.length, sequence.pages[:full])
        self._shared.update(copied.pages)
        self.reserve(copied, sequence.length)
        if full * PAGE < sequence.length:
            old, new = sequence.pages[full], copied.pages[full]
            pages_of(self.kv, new, 1).copy_(pages_of(self.kv, old, 1))
        return copied

    def release(self, sequence: _Sequence) -> None:
        """Take a sequence's pages back."""
        last = [page for page in sequence.pages if not self._shared[page]]
        self._shared.subtract(page for page in sequence.pages if self._shared[page])
        self._free = sorted([*self._free, *last], reverse=True)
        sequence.pages = []

    def _grow(self, pages: int) -> None:
        before = page_count(self.kv)
        after = before + max(pages, before)
        self.kv = grown(self.kv, after)
        self._free = sorted([*self._free, *range(before, after)], reverse=True)


class _CacheView:
    """What one packed forward sees of the pool (model.Cache): where its new tokens go, and what they attend to.

    Over an int8 cache sequences must be new: their tokens see each other's keys and values as they are.
    """

    def __init__(self, kv: Tensor, sequences: Sequence[_Sequence], counts: Sequence[int]) -> None:
        lengths = [s.length + n for s, n in zip(sequences, counts, strict=True)]
        self._kv = kv
        slot_mapping = torch.cat([s.rows(s.length, n) for s, n in zip(sequences, lengths, strict=True)])
        rows = torch.cat([s.rows(0, n) for s, n in zip(sequences, lengths, strict=True)])
        contiguous = bool((rows.diff() == 1).all())
        self._slice = slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else None
        self._slot_mapping, self._rows = slot_mapping.to(kv.device), rows.to(kv.device)
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._key_offsets = offsets.to(kv.device)

    @property
    def key_offsets(self) -> Tensor:
        return self._key_offsets

    def extend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rope(q, k, context.table, context.positions)
        if self._kv.dtype == torch.uint8:
            store_int8(self._kv[context.slot], self._slot_mapping, k, v)
            return q, k, v
        keys, values = self._kv[context.slot].unbind()
        keys.index_copy_(0, self._slot_mapping, k)
        values.index_copy_(0, self._slot_mapping, v)
        if self._slice is not None:  # a view, without a copy
            return q, keys[self._slice], values[self._slice]
        return q, keys.index_select(0, self._rows), values.index_select(0, self._rows)


def one_at_a_time(method: Method) -> Method:
    """A runner's method that waits until no other thread is in one, and raises MemoryError when torch has no memory."""

    @functools.wraps(method)
    def locked(self: TorchRunner, *arguments: Any) -> Any:
        with self._lock:
            try:
                return method(self, *arguments)
            except torch.OutOfMemoryError:
                pass  # the error holds on to the call's tensors: it goes before another one is raised
        raise MemoryError(f"{self._device} has no memory for this step; close requests, or take shorter ones")

    return cast(Method, locked)


def upload(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers as int32 on the device; on CUDA without waiting for what is enqueued there."""
    on_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=on_cuda).to(device, non_blocking=on_cuda)


class TorchRunner:
    """The reference runner: HRM.hidden over packed sequences. The cache has a slot for each (visit, layer).

    `cache_dtype` is that of the cache's tensor, None the weights'.
    """

    def __init__(self, model: HRM, cache_dtype: torch.dtype | None = None) -> None:
        self.config = model.config
        self.parameters = sum(p.numel() for p in model.parameters()) + model.z_L_init.numel()
        dtype = model.embed_tokens.weight.dtype
        self.dtype = str(dtype).removeprefix("torch.")
        cache_dtype = cache_dtype or dtype
        self.cache_bytes_per_token = bytes_per_token(self.config, cache_dtype)
        self._model = model.eval()
        self._device = model.embed_tokens.weight.device
        self._pool = _Pool(self.config, cache_dtype, self._device)
        self._sequences: dict[int, _Sequence] = {}
        self._kept: dict[int, _Sequence] = {}
        self._handles = itertools.count()
        self._lock = threading.RLock()

    @property
    def open_sequences(self) -> int:
        return len(self._sequences)

    @property
    def kv(self) -> Tensor:
        """The keys and values of all sequences (cuda_cache.empty_cache). Replaced when the pool grows."""
        return self._pool.kv

    @one_at_a_time
    def open(
        self,
        prompts: Sequence[Sequence[int]],
        prefix_lengths: Sequence[int],
        stop: Callable[[], bool] | None = None,
    ) -> tuple[list[int], Rows]:
        sequences = [_Sequence(prefix if self.config.prefix_lm else 0) for prefix in prefix_lengths]
        handles = [next(self._handles) for _ in sequences]
        self._sequences.update(zip(handles, sequences, strict=True))
        try:
            return handles, self._advance(sequences, prompts)
        except BaseException:
            for handle in handles:
                self.close(handle)
            raise

    def begin(self, prompts: Sequence[Sequence[int]], prefix_lengths: Sequence[int]) -> Prefill:
        return WholePrefill(self, prompts, prefix_lengths)

    @one_at_a_time
    @torch.inference_mode()
    def keep(self, handle: int) -> int:
        kept = next(self._handles)
        self._kept[kept] = self._pool.copy(self._sequences[handle])
        return kept

    @one_at_a_time
    @torch.inference_mode()
    def fork(self, kept: int) -> int:
        handle = next(self._handles)
        self._sequences[handle] = self._pool.copy(self._kept[kept])
        return handle

    @one_at_a_time
    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        return self._advance([self._sequences[handle] for handle in handles], [[token] for token in tokens])

    @one_at_a_time
    def close(self, handle: int) -> None:
        found = self._kept if handle in self._kept else self._sequences
        self._pool.release(found.pop(handle))

    def reserve(self, handles: Sequence[int], tokens: int) -> None:
        """Give each of these sequences pages for so many more tokens."""
        for handle in handles:
            sequence = self._sequences[handle]
            self._pool.reserve(sequence, sequence.length + tokens)

    def page_tables(self, handles: Sequence[int]) -> Tensor:
        """The numbers of each sequence's pages in `kv`, in order: (S, C) int32, filled up with zeros."""
        pages = [self._sequences[handle].pages for handle in handles]
        longest = max(map(len, pages))
        return upload([row + [0] * (longest - len(row)) for row in pages], self._device)

    @one_at_a_time
    @torch.inference_mode()
    def logits(self, ids: Sequence[int], prefix_length: int) -> Rows:
        return self._model(torch.tensor([list(ids)], device=self._device), prefix_length)[0].cpu().numpy()

    @one_at_a_time
    def layers(self, ids: Sequence[int], prefix_length: int, stop: Callable[[], bool] | None = None) -> Rows:
        return look(self._model, ids, prefix_length).logits.cpu().numpy()

    @torch.inference_mode()
    def _advance(self, sequences: Sequence[_Sequence], added: Sequence[Sequence[int]]) -> Rows:
        """Run the added tokens of each sequence; logits after the last of each. An interrupted call changes nothing."""
        counts = [len(tokens) for tokens in added]
        for sequence, count in zip(sequences, counts, strict=True):
            self._pool.reserve(sequence, sequence.length + count)
        prefixes, starts = [s.prefix for s in sequences], [s.length for s in sequences]
        layout = Layout.of(counts, prefixes, starts, self._device)
        cache = _CacheView(self._pool.kv, sequences, counts)
        ids = torch.tensor(list(itertools.chain.from_iterable(added)), device=self._device)
        final = self._model.hidden(ids, layout, cache)
        logits = self._model.lm_head(final[layout.offsets[1:].long() - 1]).float()
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.length += count
        return logits.cpu().numpy()
