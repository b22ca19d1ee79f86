"""The tensors of a training state in main memory, copied there beside the computation.

A GPU goes on with the next step while they travel: its forward and backward pass only read them. The update waits for
the copies on the device; the host does not wait. Has not run on a GPU: in the tests a queue stands for the stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

ALIGNED = 64  # bytes; where a tensor starts in the memory that all share

Pair = tuple[Tensor, Tensor]  # where to, and what


class Side(Protocol):
    """What copies beside the computation."""

    def memory(self, size: int) -> Tensor:
        """Main memory for copies, (size) uint8; what an earlier call gave is given back."""
        ...

    def begin(self, pairs: Sequence[Pair]) -> None:
        """Enqueue copies of tensors as they will be after the computation that is enqueued now."""
        ...

    def hold(self) -> None:
        """The computation that is enqueued from now on begins after these copies."""
        ...

    def wait(self) -> None:
        """Return when they are there. For any thread."""
        ...


class HostCopies:
    """Copies of one state at a time. They keep their memory: as many bytes as the state, and 63 a tensor at most."""

    def __init__(self, side: Side) -> None:
        self.hold, self.wait = side.hold, side.wait
        self._side = side
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes_held(self) -> int:
        """Of main memory."""
        return len(self._memory)

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enqueue copies, contiguous ones; they hold numbers once `wait` has returned, until the next `begin`.

        The caller calls `hold` before it changes a tensor, and `wait` before it lets one go.
        """
        size = sum(_room(tensor) for tensor in tensors.values())
        if size > len(self._memory):
            self._memory = self._memory.new_empty(0)
            self._memory = self._side.memory(size)
        places = dict(zip(tensors, _places(self._memory, tensors.values()), strict=True))
        self._side.begin([(places[name], tensor.detach()) for name, tensor in tensors.items()])
        return places


class CudaSide:
    """A stream of the device, and page-locked memory: a copy to any other stops the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied: torch.cuda.Event | None = None
        self._unlock: weakref.finalize[..., CudaSide] | None = None

    def memory(self, size: int) -> Tensor:
        """Exactly so much; torch's own page-locked memory comes in powers of two."""
        if self._unlock is not None:
            self._unlock()
        memory, runtime = torch.empty(size, dtype=torch.uint8), torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)) == 0:  # else the copies are right, and slow
            self._unlock = weakref.finalize(self, _unlock, memory)
        return memory

    def begin(self, pairs: Sequence[Pair]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, tensor in pairs:
                place.copy_(tensor, non_blocking=True)
            self._copied = self._stream.record_event()

    def hold(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


def _unlock(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED


def _places(memory: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    at = 0
    for tensor in tensors:
        used = tensor.numel() * tensor.element_size()
        yield memory[at : at + used].view(tensor.dtype).view(tensor.shape)
        at += _room(tensor)
