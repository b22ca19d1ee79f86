"""Lines of records to token ids, here or in worker processes. Imports no torch, so that these stay small."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrmcore.data.files import Row
from hrmcore.data.records import Fault, KeyCounts, Record, encode_pieces, parse_records, template_of
from hrmcore.data.shapes import Layout
from hrmcore.tokenizer import Tokenizer


@dataclass(frozen=True)
class Lines:
    """Consecutive rows of a file."""

    path: Path
    rows: list[Row]
    layout: Layout | None


@dataclass(frozen=True)
class Encoded:
    """What became of such lines, in their order."""

    tokens: np.ndarray
    lengths: np.ndarray
    prefix: np.ndarray
    conditions: list[str]
    rejected: list[tuple[int, Fault]]  # with the line's number
    keys: KeyCounts
    conversations: int
    texts: int


class _Encoder:
    """Turns lines into ids; the same in this process and in a worker."""

    def __init__(self, tokenizer: Path, context: int) -> None:
        self._tokenizer = Tokenizer.load(tokenizer)
        self._template = template_of(self._tokenizer)
        self._context = context

    def __call__(self, batch: Lines) -> Encoded:
        tokens: list[int] = []
        lengths: list[int] = []
        prefix: list[int] = []
        conditions: list[str] = []
        rejected: list[tuple[int, Fault]] = []
        keys = KeyCounts()
        conversations = texts = 0
        for number, line in batch.rows:
            records = parse_records(line, f"{batch.path}:{number}", batch.layout)
            is_conversation = batch.layout is not None and batch.layout.messages is not None
            conversations += is_conversation and any(isinstance(record, Record) for record in records)
            for record in records:
                if not isinstance(record, Record):
                    rejected.append((number, record))
                    continue
                try:
                    pieces = encode_pieces(record, self._tokenizer, self._context, self._template)
                except ValueError as error:
                    rejected.append((number, Fault(str(error))))
                    continue
                keys.add(record)
                texts += record.is_text
                for ids, length in pieces:
                    tokens += ids
                    lengths.append(len(ids))
                    prefix.append(length)
                    conditions.append(record.condition)
        arrays = [np.asarray(values, dtype=np.int32) for values in (tokens, lengths, prefix)]
        return Encoded(arrays[0], arrays[1], arrays[2], conditions, rejected, keys, conversations, texts)


_OrderedMap = Callable[[Iterator[Lines]], Iterator[tuple[Lines, Encoded]]]


@contextmanager
def mapper(tokenizer: Path, context: int, workers: int) -> Iterator[_OrderedMap]:
    """A map over batches that keeps their order: here, or in as many processes as there are workers."""
    if workers == 1:
        encoder = _Encoder(tokenizer, context)
        yield lambda batches: ((batch, encoder(batch)) for batch in batches)
        return
    # spawn: forking a process that runs threads, as torch and tqdm do, can deadlock the child
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, context))
    try:
        with _ctrl_c_ignored():
            for _ in range(workers):
                pool.submit(os.getpid)  # anything: a task too many for the processes there are starts another
        yield lambda batches: _ahead(pool, batches, 3 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ProcessPoolExecutor, batches: Iterator[Lines], depth: int) -> Iterator[tuple[Lines, Encoded]]:
    """Results in the order of the batches, at most `depth` of them under way: memory stays small."""
    waiting: deque[tuple[Lines, Future[Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_in_worker, batch)))
        if len(waiting) >= depth:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that start meanwhile ignore Ctrl-C from their first moment: it is for the parent, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


_worker_encoder: _Encoder


def _start_worker(tokenizer: Path, context: int) -> None:
    global _worker_encoder
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_encoder = _Encoder(tokenizer, context)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for it forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Lines) -> Encoded:
    return _worker_encoder(batch)
