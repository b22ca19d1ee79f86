"""Cuts a packed file short while the engine reads it; tests/engine/test_packed.py runs this in a process of its own.

python tests/soak/cut_short.py step PACKED OTHER      # between two layers of a prefill
python tests/soak/cut_short.py answers PACKED OTHER   # at some moment of many answers
python tests/soak/cut_short.py foreign PACKED OTHER   # another mapped file, in a step: this must end the process
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path

from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.packed_file import PACKED_FILE

PROMPT = [position % 61 for position in range(700)]  # its step takes long enough to be asked whether it shall stop


def open_runner(folder: str) -> CpuRunner:
    return CpuRunner.from_checkpoint(Path(folder), "auto", None, 2, cache_bytes=0)


def main(case: str, folder: str, other_folder: str) -> None:
    runner, other = open_runner(folder), open_runner(other_folder)
    expected = other.logits(PROMPT[:20], 20)
    path = Path(folder) / PACKED_FILE
    asked = []

    def cut() -> bool:
        if not asked:
            asked.append(case)
            if case == "foreign":
                read_beyond_the_end(Path(other_folder) / "foreign")
            os.truncate(path, 5000)
        return False

    try:
        if case == "answers":
            cutter = threading.Timer(0.3, cut)
            cutter.start()
            while True:
                (handle,), _ = runner.open([PROMPT[:40]], [40])
                try:
                    for token in range(30):
                        runner.step([handle], [token])
                finally:
                    runner.close(handle)
        runner.open([PROMPT], [len(PROMPT)], cut)
    except OSError as error:
        print(len(asked), error)
    try:
        runner.open([[1]], [1])
    except OSError as error:
        print(error)
    print(runner.open_sequences, (other.logits(PROMPT[:20], 20) == expected).all())


def read_beyond_the_end(path: Path) -> None:
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        os.truncate(path, 0)
        print(pages[mmap.PAGESIZE])


if __name__ == "__main__":
    main(*sys.argv[1:])
