"""Breaks the file of every reader at random for a while; each reader in a process of its own, so that a signal shows.
The processes are forked from this one, which has imported everything and started no thread.

    FUZZ_SECONDS=600 python -m fuzz.run [READER…]

A fault's file is kept in build/fuzz/ and its name printed; the exit status is 1 when there was one. A fault is what
readers.py says: a signal, a hang, a traceback, or too much memory. FUZZ_SEED=N breaks the same files again.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from fuzz.files import make_files
from fuzz.found import FOUND, MEMORY
from fuzz.memory import Peak
from fuzz.readers import READERS, SECONDS, try_reader

KEPT = Path("build/fuzz")
MOST_FAULTS = 10
MOST_ADDRESSES = 4 << 30  # bytes that a reader may ask for before it is ended: the machine is not to suffer


class Trials:
    """One reader's files, tried one after the other. The one under trial lies in `trial`, in case the process ends."""

    def __init__(self, name: str, folder: Path, number: int) -> None:
        self.tried = self.faults = self.most = 0
        self._name, self._folder, self._number = name, folder, number
        self._reader = READERS[name]
        self.trial = KEPT / f"{name}.trial"
        self.whole = (folder / self._reader.file).read_bytes()
        for _ in range(2):  # imports, pools and caches count for no file
            self._reader.read(folder)
        gc.collect()
        gc.freeze()

    def give(self, data: bytes, timed: bool = True) -> None:
        """Try one file; what it does wrong is printed, and the file kept."""
        self.trial.write_bytes(data)
        self.tried += 1
        # By the clock, but not soon: the machine may be busy, or this process stopped for a while.
        if timed:
            faulthandler.dump_traceback_later(24 * SECONDS, exit=True)
        with Peak() as peak:
            started = time.process_time()
            fault = try_reader(self._name, self._folder, data)
            took = time.process_time() - started
        faulthandler.cancel_dump_traceback_later()
        self.most = max(self.most, peak.taken)
        if timed and took > SECONDS:
            fault = f"took {took:.1f} s of a processor"
        elif peak.taken > (allowed := self._allowed(data)):
            fault = f"took {peak.taken >> 20} MiB for {len(data)} bytes; allowed are {allowed >> 20}"
        if fault:
            self.faults += 1
            kept = KEPT / f"{self._name}-{self._number}-{self.tried}"
            kept.write_bytes(data)
            print(f"{self._name}: {fault[:500]}: {kept}", flush=True)

    def _allowed(self, data: bytes) -> int:
        path = self._folder / self._reader.file
        path.write_bytes(data)
        try:
            return self._reader.allowed(len(data), self._folder)
        finally:
            path.write_bytes(self.whole)


def fuzz(name: str, files: Path, seconds: float, number: int) -> int:
    """Give one reader the corpus, then what is broken at random, for so long; the exit status."""
    chance = random.Random(number)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_ADDRESSES, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(files, Path(place) / "files")
        trials = Trials(name, folder, number)
        ends = time.monotonic() + seconds
        for data in FOUND.get(name, []):
            trials.give(READERS[name].sign(data))
        for data in MEMORY.get(name, []):
            trials.give(data, timed=False)  # they are large, and their time is that of their size
        while time.monotonic() < ends and trials.faults < MOST_FAULTS:
            trials.give(READERS[name].broken(trials.whole, chance))
    trials.trial.unlink()
    print(f"{name}: {trials.tried} files, {trials.faults} faults, {trials.most >> 20} MiB at most", flush=True)
    return int(trials.faults > 0)


def forked(work: Callable[[], int]) -> int:
    """The exit status of a process that does this; below 0 the signal that ended it."""
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 2
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def main(names: list[str]) -> int:
    """All readers, one after the other, for equal shares of FUZZ_SECONDS."""
    names = names or list(READERS)
    KEPT.mkdir(parents=True, exist_ok=True)
    share = float(os.environ.get("FUZZ_SECONDS", "600")) / len(names)
    number = int(os.environ.get("FUZZ_SEED", int(time.time())))
    status = 0
    with tempfile.TemporaryDirectory() as place:
        files = Path(place)
        if forked(lambda: make_files(files) or 0):
            return 2
        for name in names:
            ended = forked(lambda name=name: fuzz(name, files, share, number))  # type: ignore[misc]
            if ended not in (0, 1):
                print(f"{name}: ended with {ended}: {KEPT / name}.trial", flush=True)
            status |= ended != 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
