"""Breaks the file of every reader at random for a while; each reader in a process of its own, so that a signal shows.

    FUZZ_SECONDS=600 python -m fuzz.run [READER…]

A fault's file is kept in build/fuzz/ and its name printed; the exit status is 1 when there was one.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuzz.readers import READERS, SECONDS, make_files, mutated, try_reader

KEPT = Path("build/fuzz")


def fuzz(name: str, seconds: float, number: int) -> int:
    """Break one reader's file for so long. The file under trial lies in KEPT, in case that the process ends."""
    reader, chance, faults, tried = READERS[name], random.Random(number), 0, 0
    trial = KEPT / f"{name}.trial"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_files(folder)
        whole = (folder / reader.file).read_bytes()
        try_reader(name, folder, whole)  # imports and pools count for no file
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            data = reader.sign(mutated(whole, chance))
            trial.write_bytes(data)
            started, tried = time.process_time(), tried + 1
            faulthandler.dump_traceback_later(12 * SECONDS, exit=True)
            fault = try_reader(name, folder, data)
            faulthandler.cancel_dump_traceback_later()
            if time.process_time() - started > SECONDS:
                fault = f"took {time.process_time() - started:.1f} s of a processor"
            if fault:
                faults += 1
                kept = KEPT / f"{name}-{number}-{tried}"
                kept.write_bytes(data)
                print(f"{name}: {fault}: {kept}", flush=True)
                if faults == 10:
                    break
    trial.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name}: {tried} files, {faults} faults, {peak} MB at most", flush=True)
    return int(faults > 0)


def main(names: list[str]) -> int:
    """All readers, one after the other, for equal shares of FUZZ_SECONDS."""
    names = names or list(READERS)
    KEPT.mkdir(parents=True, exist_ok=True)
    share = float(os.environ.get("FUZZ_SECONDS", "600")) / len(names)
    status = 0
    for name in names:
        number = int(time.time())
        ended = subprocess.run([sys.executable, "-m", "fuzz.run", "--one", name, str(share), str(number)], check=False)
        if ended.returncode not in (0, 1):
            print(f"{name}: ended with {ended.returncode}: {KEPT / name}.trial", flush=True)
        status |= ended.returncode != 0
    return int(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        sys.exit(fuzz(sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
    sys.exit(main(sys.argv[1:]))
