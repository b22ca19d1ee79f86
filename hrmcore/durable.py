"""What makes a finished file or folder survive a power cut, and lets no one see an unfinished one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names after a rename, are on the disk. Raises OSError as fsync does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        temporary.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
