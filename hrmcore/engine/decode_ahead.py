"""Decoding on CUDA one step ahead of the host: the next token is fed back where it was drawn, and read a step late.

`DecodeAhead.draw` enqueues the step after the one that it is asked for before it reads the latter's tokens, so that the
device never waits for the host. What a step ahead brought counts once it is asked for; until then it has only written
keys and values beyond its sequences' ends. One whose sequence ends first is thrown away.

All work is enqueued on the device's current stream, in whose order pages are given back and taken again.
Shapes: B requests of a step, V vocabulary, C pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hrmcore.engine.cuda_sampling import SamplerSlots
from hrmcore.engine.sampling import Sampler
from hrmcore.engine.torch_runner import upload


class Decoder(Protocol):
    """What is asked of the runner: its sequences, their pages, and the step."""

    def length_of(self, handle: int) -> int:
        """How many tokens a sequence holds."""
        ...

    def pages_of(self, handles: Sequence[int]) -> tuple[int, ...]:
        """How many pages each of these sequences has."""
        ...

    def reserve(self, handles: Sequence[int], tokens: int) -> None:
        """Give each of these sequences pages for so many more tokens."""
        ...

    def page_tables(self, handles: Sequence[int]) -> Tensor:
        """The numbers of each sequence's pages, in order: (B, C) int32 on the device."""
        ...

    def decode(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Run tokens (B) int32 at positions (B) int32; the logits (B, V) float32 that follow."""
        ...


@dataclass(frozen=True)
class _Tables:
    """The page tables of a batch, and the number of pages by which they are known to be the same."""

    handles: tuple[int, ...]
    pages: tuple[int, ...]
    tables: Tensor


@dataclass(frozen=True, eq=False)
class _Flight:
    """A step that has been enqueued. Tensors lie on the device, and may not be there yet."""

    tables: _Tables
    slots: Tensor  # (B) int32
    positions: Tensor  # (B) int32, after the step
    logits: Tensor  # (B, V)
    drawn: Tensor  # (B) int32
    read: LateTokens


@dataclass(frozen=True)
class _Ahead:
    """A sequence's row of a step that nobody has asked for yet, and what it was made of."""

    flight: _Flight
    row: int
    token: int
    length: int
    sampler: Sampler


class LateTokens:
    """Tokens (B) int32 on their way to the host, beside what is enqueued after them."""

    def __init__(self, tokens: Tensor, side: torch.cuda.Stream | None) -> None:
        self._arrived: torch.cuda.Event | None = None
        if side is None:
            self._host = tokens.clone()
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            self._host.copy_(tokens, non_blocking=True)
            self._arrived = side.record_event()
        tokens.record_stream(side)

    def wait(self) -> list[int]:
        """The tokens, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class DecodeAhead:
    """The steps ahead of a runner's sequences. Whoever calls holds the runner's lock."""

    def __init__(self, decoder: Decoder, vocabulary: int, device: torch.device) -> None:
        self._decoder = decoder
        self._device = device
        self._samplers = SamplerSlots(vocabulary, device)
        self._slots: dict[int, int] = {}  # by handle
        self._free: list[int] = []
        self._ahead: dict[int, _Ahead] = {}  # by handle
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def steps_ahead(self) -> int:
        """For how many sequences a step is enqueued that nobody has asked for yet."""
        return len(self._ahead)

    def draw(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler], left: Sequence[int]
    ) -> list[int]:
        """The token that each sampler draws after its sequence's `tokens` entry is appended; it counts as drawn.

        A sequence of which `left` says that more tokens may be asked for is run one step ahead. The caller appends.
        Raises ArithmeticError on logits that are not finite, and then no token counts as drawn.
        """
        rows = self._rows(handles, tokens, samplers)
        ahead = self._enqueue_ahead(handles, rows, left)
        flights = {id(flight): flight for flight, _ in rows}
        arrived = {key: flight.read.wait() for key, flight in flights.items()}
        drawn = [arrived[id(flight)][row] for flight, row in rows]
        for token, (flight, row) in zip(drawn, rows, strict=True):
            if token < 0:
                self.forget(handles)
                value = float(flight.logits[row, -1 - token])
                raise ArithmeticError(f"the model's logits are not finite: {value} for token {-1 - token}")
        self.forget(handles)
        for handle, token, sampler in zip(handles, drawn, samplers, strict=True):
            sampler.core.accept(token)
            if (found := ahead.get(handle)) is not None:
                length = self._decoder.length_of(handle) + 1
                self._ahead[handle] = _Ahead(*found, token, length, sampler)
        return drawn

    def forget(self, handles: Sequence[int]) -> None:
        """Throw away what is ahead of these sequences."""
        for handle in handles:
            self._ahead.pop(handle, None)

    def close(self, handle: int) -> None:
        """Release what a sequence holds here."""
        self.forget([handle])
        if (slot := self._slots.pop(handle, None)) is not None:
            self._free.append(slot)

    def _rows(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler]
    ) -> list[tuple[_Flight, int]]:
        """Where each sequence's next token is drawn: in a step that is under way, or in one that begins now."""
        found: dict[int, tuple[_Flight, int]] = {}
        for handle, token, sampler in zip(handles, tokens, samplers, strict=True):
            ahead = self._ahead.get(handle)
            if ahead is None or ahead.token != token or ahead.length != self._decoder.length_of(handle):
                continue
            if ahead.sampler is sampler:
                found[handle] = ahead.flight, ahead.row
        new = [i for i, handle in enumerate(handles) if handle not in found]
        if new:
            flight = self._begin([handles[i] for i in new], [tokens[i] for i in new], [samplers[i] for i in new])
            found |= {handles[i]: (flight, row) for row, i in enumerate(new)}
        return [found[handle] for handle in handles]

    def _begin(self, handles: list[int], tokens: list[int], samplers: list[Sampler]) -> _Flight:
        """A step of sequences that stand where the host knows."""
        self._decoder.reserve(handles, 1)
        slots = [self._slot(handle) for handle in handles]
        self._samplers.put(dict(zip(slots, samplers, strict=True)))
        lengths = [self._decoder.length_of(handle) for handle in handles]
        fed, positions, at = (upload(numbers, self._device) for numbers in (tokens, lengths, slots))
        return self._enqueue(self._tables(handles, None), fed, positions, at)

    def _enqueue_ahead(
        self, handles: Sequence[int], rows: list[tuple[_Flight, int]], left: Sequence[int]
    ) -> dict[int, tuple[_Flight, int]]:
        """The step after this one, of those that may be asked for more; without room for it, none."""
        going_on = [i for i, more in enumerate(left) if more > 0]
        if not going_on:
            return {}
        chosen = [handles[i] for i in going_on]
        try:
            self._decoder.reserve(chosen, 2)
            flight = self._follow(chosen, [rows[i] for i in going_on])
        except (MemoryError, torch.OutOfMemoryError):
            return {}
        return {handle: (flight, row) for row, handle in enumerate(chosen)}

    def _follow(self, handles: list[int], rows: list[tuple[_Flight, int]]) -> _Flight:
        """A step of sequences that stand where these rows leave them."""
        flights = list({id(flight): flight for flight, _ in rows}.values())
        first = flights[0]
        if len(flights) == 1 and [row for _, row in rows] == list(range(len(first.drawn))):
            return self._enqueue(self._tables(handles, first.tables), first.drawn, first.positions, first.slots)
        starts, count = {}, 0
        for flight in flights:
            starts[id(flight)] = count
            count += len(flight.drawn)
        index = upload([starts[id(flight)] + row for flight, row in rows], self._device)
        drawn, positions, slots = (
            torch.cat([getattr(flight, name) for flight in flights]).index_select(0, index)
            for name in ("drawn", "positions", "slots")
        )
        return self._enqueue(self._tables(handles, None), drawn, positions, slots)

    def _enqueue(self, tables: _Tables, tokens: Tensor, positions: Tensor, slots: Tensor) -> _Flight:
        logits = self._decoder.decode(tokens, positions, tables.tables)
        drawn = self._samplers.draw(logits, tokens, slots, positions)
        return _Flight(tables, slots, positions, logits, drawn, LateTokens(drawn, self._side))

    def _tables(self, handles: list[int], last: _Tables | None) -> _Tables:
        """The page tables of these sequences: the last ones where no page has come since."""
        pages = self._decoder.pages_of(handles)
        if last is not None and last.handles == tuple(handles) and last.pages == pages:
            return last
        return _Tables(tuple(handles), pages, self._decoder.page_tables(handles))

    def _slot(self, handle: int) -> int:
        if handle not in self._slots:
            self._slots[handle] = self._free.pop() if self._free else len(self._slots)
        return self._slots[handle]
