"""How much memory something takes at its peak, as Linux counts it: in Python, in C++ and in the libraries."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_LIBC = ctypes.CDLL(None)


class Peak:
    """A context; `taken` are the bytes by which the process's resident memory grew at the most within it.

    What was freed before goes back to the system first, so that nothing grows into it unseen. Pages of mapped files
    count. Raises OSError where the kernel does not reset the peak (CONFIG_PROC_PAGE_MONITOR).
    """

    def __enter__(self) -> Peak:
        gc.collect()
        if hasattr(_LIBC, "malloc_trim"):
            _LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _kib("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.taken = 1024 * (_kib("VmHWM") - self._before)


def _kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status does not tell {name}")
