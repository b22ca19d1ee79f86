"""Writing files and folders that survive a power cut once they are finished, and that no one sees before."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names after a rename, are on the disk. Raises OSError as fsync does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, start: int = 0) -> str:
    """The checksum of a file's bytes from `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def put_in_place(names: Mapping[Path, Path]) -> None:
    """Flush what was written under temporary names, then give each its final name, {temporary: final}, for good.

    A final name stands for the old contents or for all of the new ones, whenever the power goes.
    """
    for temporary in names:
        flush(temporary)
    for temporary, final in names.items():
        os.replace(temporary, final)
    for folder in {final.parent for final in names.values()}:
        flush(folder)


@contextmanager
def replacing(*paths: Path, temporary: str = ".{name}.{process}.tmp") -> Iterator[list[Path]]:
    """Temporary paths, one beside each of `paths`, whose files replace those when the block ends well.

    Whatever happens before that leaves the old files as they were and no temporary ones; a killed process leaves those.
    `temporary` makes their names from the final `name` and the number of this `process`.
    """
    names = {path.with_name(temporary.format(name=path.name, process=os.getpid())): path for path in paths}
    try:
        yield list(names)
        put_in_place(names)
    finally:
        for path in names:
            with suppress(OSError):  # the error that led here is the one to report
                path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that gets its name, flushed to the disk, when the block ends well.

    Whatever happens before that leaves nothing under the final name; a killed process leaves the temporary folder.
    Raises FileExistsError when either of them exists.
    """
    temporary = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        message = "is being written by another process, or was left by one that was killed; if so, remove it"
        raise FileExistsError(f"{temporary}: {message}") from None
    try:
        yield temporary
        for path in temporary.rglob("*"):
            flush(path)
        put_in_place({temporary: folder})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
