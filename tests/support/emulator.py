"""The tests' library of emulated CUDA kernels, which the build leaves beside the compiled module."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

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
library.hrmcore_test_seed.argtypes = library.hrmcore_test_shared_bytes.argtypes = [ctypes.c_uint64]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Kernels run under another schedule in this context."""
    library.hrmcore_test_seed(seed)
    try:
        yield
    finally:
        library.hrmcore_test_seed(0)


@contextlib.contextmanager
def device_with(shared_kib: int) -> Iterator[None]:
    """The emulated device has so much shared memory a block in this context, instead of 99 KiB."""
    library.hrmcore_test_shared_bytes(shared_kib << 10)
    try:
        yield
    finally:
        library.hrmcore_test_shared_bytes(99 << 10)


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


def counters() -> dict[str, int]:
    """What all launches since the last call did."""
    names = ("launches", "bytes_read", "bytes_written", "block_barriers", "grid_barriers", "bytes_read_first")
    numbers = (ctypes.c_uint64 * len(names))()
    library.hrmcore_test_counters(numbers)
    return dict(zip(names, numbers, strict=True))
