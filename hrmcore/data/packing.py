"""Packed PrefixLM batches: which records share one, and the tensors of it.

Imports torch only to build a batch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hrmcore.data.records import Corpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid one after the other. T input tokens, S sequences, R supervised positions."""

    ids: Tensor  # (T) int64
    offsets: Tensor  # (S+1) int32
    prefix: Tensor  # (S) int32
    positions: Tensor  # (T) int32, counted from each sequence's first token
    supervised: Tensor  # (R) int64, positions whose next token is predicted
    targets: Tensor  # (R) int64, that next token
    records: tuple[int, ...]  # which records these are

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on a device; to a GPU they go without a wait, through pinned memory."""
        move = _bring if device.type == "cuda" else _move
        moved: dict[str, Any] = {name: move(x, device) for name, x in vars(self).items() if name != "records"}
        return replace(self, **moved)


def _move(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device)


def _bring(x: Tensor, device: torch.device) -> Tensor:
    """From pageable memory torch would wait for the copy, and so for all that the device has still to do."""
    if x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def pack(corpus: Corpus, records: Sequence[int], multiple: int = 1) -> PackedBatch:
    """The batch of these records, in this order. The last instruction token predicts the first response token.

    Unsupervised padding sequences of token 0, no longer than the longest record, bring T up to a multiple of
    `multiple`. Matrix libraries that compile a kernel for each shape (oneDNN in bfloat16) would otherwise compile one
    in every step.
    """
    import torch

    ids, positions, supervised, targets = [], [], [], []
    offsets = [0]
    for record in records:
        sequence = corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]]
        length, prefix = len(sequence) - 1, int(corpus.prefix[record])
        ids.append(sequence[:-1])
        positions.append(np.arange(length, dtype=np.int32))
        supervised.append(np.arange(prefix - 1, length) + offsets[-1])
        targets.append(sequence[prefix:])
        offsets.append(offsets[-1] + length)
    prefixes = corpus.prefix[list(records)]
    longest = max(map(len, ids))  # no model has fewer positions
    while padding := min(-offsets[-1] % multiple, longest):
        ids.append(np.zeros(padding, dtype=np.int32))
        positions.append(np.arange(padding, dtype=np.int32))
        prefixes = np.append(prefixes, np.int32(0))
        offsets.append(offsets[-1] + padding)
    return PackedBatch(
        ids=torch.from_numpy(np.concatenate(ids, dtype=np.int64)),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        prefix=torch.from_numpy(prefixes),
        positions=torch.from_numpy(np.concatenate(positions)),
        supervised=torch.from_numpy(np.concatenate(supervised, dtype=np.int64)),
        targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        records=tuple(int(record) for record in records),
    )


_PIECE = 64  # tokens of a padding sequence: a tile of attention


@dataclass(frozen=True)
class Bucket:
    """The sizes that `pad` fills a batch up to, so that many batches have one shape."""

    tokens: int  # T
    sequences: int  # S
    supervised: int  # R

    @classmethod
    def of(cls, batch: PackedBatch, batch_tokens: int) -> Bucket:
        """The smallest that holds a batch of a stream of `batch_tokens`: T in eighths of that, R in sixteenths of T."""
        tokens = _up(len(batch.ids), _up(batch_tokens, 8 * _PIECE) // 8)
        pieces = -(-(tokens - len(batch.ids)) // _piece(batch))
        sequences = max(16, len(batch.prefix) + pieces)
        supervised = _up(max(1, len(batch.supervised)), _up(max(1, tokens // 16), _PIECE))
        return cls(tokens, 1 << (sequences - 1).bit_length(), supervised)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _piece(batch: PackedBatch) -> int:
    return min(_PIECE, int(batch.offsets.diff().max()))  # no longer than what the model takes


def pad(batch: PackedBatch, bucket: Bucket) -> PackedBatch:
    """A batch filled up to the sizes of a bucket, for `HRM.padded_loss`: that is the batch's loss, but for rounding.

    Tokens 0 in unsupervised sequences of at most 64, empty sequences, and positions 0 whose target is NO_TARGET. Raises
    ValueError when the batch does not fit.
    """
    import torch

    from hrmcore.ops.cross_entropy import NO_TARGET

    tokens, piece = bucket.tokens - len(batch.ids), _piece(batch)
    lengths = [piece] * (tokens // piece) + [tokens % piece] * (tokens % piece > 0)
    empty = bucket.sequences - len(batch.prefix) - len(lengths)
    rows = bucket.supervised - len(batch.supervised)
    if min(tokens, empty, rows) < 0:
        have = Bucket(len(batch.ids), len(batch.prefix), len(batch.supervised))
        raise ValueError(f"the batch does not fit: {have} in {bucket}")
    lengths += [0] * empty
    ends = batch.offsets[-1] + torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = [torch.arange(length, dtype=torch.int32) for length in lengths]
    return PackedBatch(
        ids=torch.cat([batch.ids, batch.ids.new_zeros(tokens)]),
        offsets=torch.cat([batch.offsets, ends]),
        prefix=torch.cat([batch.prefix, batch.prefix.new_zeros(len(lengths))]),
        positions=torch.cat([batch.positions, *positions]),
        supervised=torch.cat([batch.supervised, batch.supervised.new_zeros(rows)]),
        targets=torch.cat([batch.targets, batch.targets.new_full((rows,), NO_TARGET)]),
        records=batch.records,
    )


def _check_room(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) and (longest := int(lengths.max())) > capacity:
        raise ValueError(f"batch_tokens is {capacity}, but a record has {longest} tokens; raise it to at least that")


_WINDOW_BATCHES = 32  # records of so many batches are packed together: enough choice to fill every batch


def epoch_batches(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Record numbers of each batch of an epoch: every record once, at most `capacity` tokens a batch.

    The order depends on seed and epoch alone. A batch takes records in the shuffled order, whatever their length: no
    batch is all of one task. Only its last gap is filled out of order, with the longest record of the window that fits.
    Records left over at the end of a window open the next one. Raises ValueError when a record is longer than
    `capacity`.
    """
    _check_room(lengths, capacity)
    windows = _windows(lengths, capacity, seed, epoch, EPOCH_START)
    return itertools.chain.from_iterable(batches for _, batches in windows)


class Bookmark(NamedTuple):
    """Where a window of an epoch begins: its first batch, its place in the shuffled order, the records left before."""

    batch: int
    start: int
    left: tuple[int, ...]


EPOCH_START = Bookmark(0, 0, ())


def _windows(
    lengths: np.ndarray, capacity: int, seed: int, epoch: int, bookmark: Bookmark
) -> Iterator[tuple[Bookmark, list[list[int]]]]:
    """The windows of an epoch from a bookmark on, each with the batches that it gives."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    number, start, left = bookmark.batch, bookmark.start, np.asarray(bookmark.left, dtype=order.dtype)
    while start < len(order):
        mark = Bookmark(number, start, tuple(left.tolist()))
        used = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, used + _WINDOW_BATCHES * capacity - lengths[left].sum(), side="right"))
        stop = max(stop, start + 1)
        window, start = np.concatenate([left, order[start:stop]]), stop
        batches = _fill(window, lengths, capacity)
        left = np.asarray(batches.pop() if start < len(order) and len(batches) > 1 else [], dtype=order.dtype)
        number += len(batches)
        yield mark, batches


def share(lengths: np.ndarray, records: Sequence[int], rank: int, ranks: int) -> list[int]:
    """One rank's records of a batch, in the batch's order; none where there are fewer records than ranks.

    The longest record comes first. Each goes to the rank with the fewest tokens so far (LPT), the lowest of equals.
    """
    tokens = [0] * ranks
    chosen = set()
    for record in sorted(records, key=lambda record: (-int(lengths[record]), record)):
        least = tokens.index(min(tokens))
        tokens[least] += int(lengths[record])
        if least == rank:
            chosen.add(record)
    return [record for record in records if record in chosen]


class Ahead:
    """A BatchStream of which a thread packs the next batch while the last one is used.

    `position` and `bookmark` are as if it did not. Raises in `next` what packing raised. `close` ends the thread.
    """

    def __init__(self, stream: BatchStream) -> None:
        self.position, self.bookmark = stream.position, stream.bookmark
        self._stream = stream
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._packer.submit(self._pack)

    def __next__(self) -> PackedBatch:
        batch, self.position, self.bookmark = self._next.result()
        self._next = self._packer.submit(self._pack)
        return batch

    def close(self) -> None:
        """Wait for the batch under way; no other is packed."""
        self._packer.shutdown(cancel_futures=True)

    def _pack(self) -> tuple[PackedBatch, tuple[int, int], Bookmark]:
        return next(self._stream), self._stream.position, self._stream.bookmark


class BatchStream:
    """The packed batches, epoch after epoch without end; `position` is (epoch, batch) of the next one.

    Order and contents depend on the arguments alone: a stream made with the position of another one continues it. With
    that one's `bookmark` it does so at once; without, it works out what lies before in the epoch, seconds for each
    million of records.
    """

    MULTIPLE = 64  # tokens of a batch are rounded up to it, see pack()

    def __init__(
        self,
        corpus: Corpus,
        capacity: int,
        seed: int,
        position: tuple[int, int] = (0, 0),
        bookmark: Bookmark = EPOCH_START,
    ) -> None:
        self.position = position
        self.bookmark = bookmark  # of the window that the next batch lies in, or one before it
        self._corpus = corpus
        self._order = (capacity, seed)
        self._epoch = self._records(position)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> PackedBatch:
        epoch, index = self.position
        records = next(self._epoch, None)
        if records is None:
            epoch, index = epoch + 1, 0
            self.bookmark = EPOCH_START
            self._epoch = self._records((epoch, index))
            records = next(self._epoch)
        self.position = (epoch, index + 1)
        return pack(self._corpus, records, self.MULTIPLE)

    def _records(self, position: tuple[int, int]) -> Iterator[list[int]]:
        epoch, index = position
        _check_room(self._corpus.lengths, self._order[0])
        for bookmark, batches in _windows(self._corpus.lengths, *self._order, epoch, self.bookmark):
            self.bookmark = bookmark
            yield from batches[max(0, index - bookmark.batch) :]


def _fill(window: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack the records of a window in order, gaps filled out of order; only the last batch may be far from full."""
    by_length = sorted((int(lengths[record]), int(record)) for record in window)
    waiting = dict.fromkeys(int(record) for record in window)
    batches: list[list[int]] = []
    while waiting:
        room = capacity
        batch: list[int] = []
        while by_length and by_length[0][0] <= room:
            following = next(iter(waiting))
            key = (int(lengths[following]), following)
            if key[0] > room:
                key = by_length[bisect.bisect_right(by_length, (room, len(lengths))) - 1]
            by_length.pop(bisect.bisect_left(by_length, key))
            del waiting[key[1]]
            batch.append(key[1])
            room -= key[0]
        batches.append(batch)
    return batches
