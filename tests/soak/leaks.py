"""Call kernels rightly and wrongly, many times; print by how many KiB the process has grown.

Run by tests/test_core.py, and by `make sanitize` under LeakSanitizer, for which it stays clear of torch.
"""

import contextlib
import resource
import sys
from pathlib import Path

import numpy as np

from hrmcore import _C


def calls() -> None:
    x, y = np.ones((37, 64), dtype=np.float32), np.empty((37, 64), dtype=np.float32)
    wrong = [
        lambda: _C.rms_norm_forward([1.0], None, y, None, 1e-6),
        lambda: _C.rms_norm_forward(x, None, y[:3], None, 1e-6),
        lambda: _C.rms_norm_forward(x.astype(">f4"), None, y, None, 1e-6),
        lambda: _C.set_isa("mmx"),
        lambda: _C.set_num_threads(0),
    ]
    _C.rms_norm_forward(x, None, y, None, 1e-6)
    _C.swiglu_forward(x, y[:, :32])
    for call in wrong:
        with contextlib.suppress(ValueError):
            call()


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def main() -> None:
    for _ in range(200):
        calls()
    before = resident_kib()
    for _ in range(int(sys.argv[1])):
        calls()
    print(resident_kib() - before)


if __name__ == "__main__":
    main()
