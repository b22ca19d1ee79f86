"""The tests' library of emulated CUDA kernels, which the build leaves beside the compiled module."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C

PATH = Path(_C.__file__).with_name("_C_emulated.so")
assert PATH.exists(), f"{PATH} is missing: build with -DHRMCORE_EMULATOR=ON, as editable installs do"
library = ctypes.CDLL(str(PATH))
library.hrmcore_test_planted.restype = ctypes.c_char_p
library.hrmcore_test_planted.argtypes = [
    *(ctypes.c_char_p, ctypes.c_uint, ctypes.c_bool),
    *(ctypes.c_void_p, ctypes.c_void_p),
]
library.hrmcore_test_mma.restype = library.hrmcore_test_ldmatrix.restype = ctypes.c_char_p
library.hrmcore_test_seed.argtypes = [ctypes.c_uint64]
library.hrmcore_test_shared_bytes.argtypes = [ctypes.c_int, ctypes.c_uint64]
library.hrmcore_test_launches_on.restype = ctypes.c_uint64

_struct_of = ctypes.pythonapi.PyCapsule_GetPointer
_struct_of.restype, _struct_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_DEVICE_NUMBER = 12  # bytes into DLTensor (dlpack.h): behind the data's address and the kind of device


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Kernels run under another schedule in this context."""
    library.hrmcore_test_seed(seed)
    try:
        yield
    finally:
        library.hrmcore_test_seed(0)


def bits_in_any_company(run: Callable[[Any, int, int, int], tuple[Tensor, Tensor]]) -> Tensor:
    """The logits (32, V) of 32 requests in steps of 8, whose bits every other step of some of them must have.

    `run(form, blocks, first, last)` steps requests first to last; it gives their logits and the cache after it, which
    must be the same however all 32 came to it.
    """
    alone = torch.cat([run("persistent", 3, first, first + 8)[0] for first in (0, 8, 16, 24)])
    caches = []
    cases = [
        ("persistent", 3, 5, 6),
        ("persistent", 5, 2, 11),
        ("graph", 2, 16, 32),
        ("persistent", 11, 7, 24),
        ("persistent", 4, 0, 32),
    ]
    for seed, (form, blocks, first, last) in enumerate([*cases, ("graph", 7, 0, 32)]):
        with seeded(seed):
            logits, cache = run(form, blocks, first, last)
        assert torch.equal(logits, alone[first:last])
        if last - first == 32:
            caches.append(cache.view(torch.uint8))
    assert torch.equal(*caches)
    return alone


@contextlib.contextmanager
def device_with(shared_kib: int, number: int = 0) -> Iterator[None]:
    """The emulated device has so much shared memory a block in this context, instead of 99 KiB."""
    library.hrmcore_test_shared_bytes(number, shared_kib << 10)
    try:
        yield
    finally:
        library.hrmcore_test_shared_bytes(number, 99 << 10)


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Ops run their CUDA kernels, emulated, on CPU tensors in this context; an op without any raises RuntimeError."""
    _C.emulate_cuda(str(PATH))
    try:
        yield
    finally:
        _C.emulate_cuda("")


def same_bits_for_every_schedule(compute: Callable[[], Sequence[Tensor]]) -> bool:
    """True when five schedules of the emulator give identical results."""
    results = []
    with emulated_cuda():
        for seed in range(5):
            with seeded(seed):
                results.append(compute())
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def launches_by_device() -> list[int]:
    """How many launches went to each of the two emulated devices since the last call."""
    return [library.hrmcore_test_launches_on(number) for number in range(2)]


def on_device(tensor: Tensor, number: int) -> Any:
    """A tensor's capsule as `to_dlpack` gives it, which says that it lies on the emulated device of this number."""
    capsule = to_dlpack(tensor)
    ctypes.c_int32.from_address(_struct_of(capsule, b"dltensor") + _DEVICE_NUMBER).value = number
    return capsule


def counters() -> dict[str, int]:
    """What all launches since the last call did."""
    names = ("launches", "bytes_read", "bytes_written", "block_barriers", "grid_barriers", "bytes_read_first")
    numbers = (ctypes.c_uint64 * len(names))()
    library.hrmcore_test_counters(numbers)
    return dict(zip(names, numbers, strict=True))
