"""Training states: everything a run needs to go on as if it had never stopped, safe against a kill at any moment.

A run folder OUT holds files OUT/states/step-XXXXXXXX.safetensors, or folders OUT/states/step-XXXXXXXX when the run is
sharded (`sharded_state.py`). Both hold the same, and a run goes on from either.

A file holds the tensors `model.<name>` and `optimizer.<key>.<parameter>`, and metadata. The metadata are strings: what
the trainer gives, `format`, `version`, `sha256` (of the tensors' bytes) and `header_sha256` (of names, shapes and the
rest of the metadata). A state is written under a temporary name, flushed to the disk and renamed: a final name always
stands for a whole file. Older states are removed only after that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hrmcore.checkpoint.host_copies import HostCopies, Side
from hrmcore.checkpoint.safetensors_writer import write_tensors
from hrmcore.checkpoint.sharded_state import (
    is_text,
    read_shards,
    read_shards_metadata,
    remove_shards,
    save_shards,
    shapes_of_shards,
    verify_shards,
)
from hrmcore.durable import replacing, sha256_of
from hrmcore.limits import MOST_PARSED

FORMAT = "hrmcore-training-state"
VERSION = "1"
STATES = "states"

_TEMPORARY = ".writing.tmp"  # one name for all steps: what a killed process leaves, the next state overwrites


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state, which is on the disk under its final name when this returns.

    Raises FloatingPointError when a tensor is not finite, and OSError when the file cannot be written. Both leave what
    was there before as it was. One process at a time may write to a folder: see `lock`.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"{path}: not written, because {name} is not finite")
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, temporary=_TEMPORARY) as [temporary]:
            write_tensors(temporary, shapes, tensors.__getitem__, completed(metadata))
    except OSError as error:
        raise OSError(
            f"{path}: the training state cannot be written ({error.strerror or error}); the states before it are intact"
        ) from None


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a state, checksums verified; returns its tensors and its metadata.

    Raises FileNotFoundError without the state, ValueError when it is not what was written.
    """
    path = Path(path)
    names, metadata = verify(path)
    if path.is_dir():
        whole = {name: torch.empty(shape) for name, shape in shapes_of_shards(path).items()}
        read_shards(path, whole)
        return whole, metadata
    try:
        with safe_open(path, "pt") as tensors:
            # Copies: the library's tensors are views of the file.
            return {name: tensors.get_tensor(name).clone() for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())})") from None


def verify(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read a state once and compare its checksums; returns its tensors' names and its metadata. Raises ValueError."""
    if path.is_dir():
        metadata = verify_shards(path)
        return list(shapes_of_shards(path)), metadata
    start, entries, metadata = _read_header(path)
    if sha256_of(path, start) != metadata["sha256"]:
        raise ValueError(f"{path}: damaged, the tensors' checksum is not the one that was written")
    return list(entries), metadata


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a state."""
    if path.is_dir():
        return shapes_of_shards(path)
    return {name: tuple(entry["shape"]) for name, entry in _read_header(path)[1].items()}


@torch.no_grad()
def restore(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded ones too, with what a state holds under their names; checksums are not compared.

    Raises ValueError when the state cannot be read.
    """
    if path.is_dir():
        read_shards(path, tensors)
        return
    try:
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                found = file.get_tensor(name)
                if isinstance(tensor, DTensor):  # every rank cuts its part out of its own copy
                    found = distribute_tensor(found, tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor.copy_(found)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())})") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """A state's metadata, its checksum verified; raises as `load_state` does."""
    path = Path(path)
    return read_shards_metadata(path) if path.is_dir() else _read_header(path)[2]


def is_state(path: str | Path) -> bool:
    """Whether this is the name of a training state, and not of a checkpoint."""
    path = Path(path)
    return path.is_file() or (path.is_dir() and re.fullmatch(r"step-\d+", path.name) is not None)


def state_path(folder: Path, step: int, sharded: bool = False) -> Path:
    """Where the state of a step lies in a run folder: a file, or a folder of the ranks' shards."""
    return folder / STATES / f"step-{step:08d}{'' if sharded else '.safetensors'}"


def find_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the states of a run folder, the newest first."""
    found = []
    for path in (folder / STATES).glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)(\.safetensors)?", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def state_of(folder: Path, step: int | None = None) -> tuple[int, Path]:
    """Step and path of a run's state after `step`, or of its newest. Raises ValueError, naming those there are."""
    states = find_states(folder)
    if not folder.is_dir() or not states:
        raise ValueError(f"{folder}: {'holds no training state' if folder.is_dir() else 'no such folder'}")
    for kept, path in states:
        if step in (None, kept):
            return kept, path
    raise ValueError(
        f"{folder}: no state after step {step}; there are {', '.join(str(s) for s, _ in reversed(states))}"
    )


def find_newest(folder: Path, warn: Any, contents: bool = True) -> tuple[Path, dict[str, str]] | None:
    """Path and metadata of the newest state of a run folder that is whole; None when the folder holds none.

    Without `contents`, the checksums of the tensors are not compared, because another rank did that. A damaged state is
    renamed to `….damaged`, and `warn` is called with a line that says so. Raises ValueError when all are damaged:
    training again from the start is for a person to decide.
    """
    states = find_states(folder)
    for step, path in states:
        try:
            return path, verify(path)[1] if contents else read_metadata(path)
        except ValueError as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"{error}; set aside as {aside.name}, falling back from step {step} to the state before")
    if states:
        raise ValueError(f"{folder / STATES}: no state is whole; remove the folder to train from the start")
    return None


def remove_old(folder: Path, keep: int, keep_every: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` states and the one after step `best`.

    Those at multiples of `keep_every` steps stay for good (0: none do).
    """
    for step, path in find_states(folder)[keep:]:
        if step == best or (keep_every and step % keep_every == 0):
            continue
        if path.is_dir():
            remove_shards(path)
        else:
            path.unlink(missing_ok=True)


def lock(folder: Path) -> TextIOWrapper:
    """Take a run folder for this process until the returned file is closed or the process ends, however it ends.

    Raises BlockingIOError when another process has it.
    """
    path = folder / "lock"
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "of unknown number"
        file.close()
        message = f"process {holder} is training in this folder; wait for it, or name another folder as out"
        raise BlockingIOError(f"{folder}: {message}") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class StateWriter:
    """Writes states in a thread, so that a step waits only for the copy of the tensors; one at a time.

    Not even for that with a `side`, which copies beside the computation. `sharded` states are folders: every rank of
    `group` makes a writer and saves the same steps. Nothing else may use that group; they are copied where they lie. An
    error of the thread is raised in the caller's thread by the next `save`, `check` or `finish`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int,
        sharded: bool = False,
        group: dist.ProcessGroup | None = None,
        side: Side | None = None,
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._sharded, self._group = sharded, group
        self._copies = HostCopies(side) if side is not None and not sharded else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], best: int | None = None
    ) -> None:
        """Copy the tensors as they are now, then write them while the caller goes on; the state after `best` stays.

        The caller calls `hold` before it changes one of them.
        """
        self.finish()
        if self._copies is None:
            copies = {name: _copy(tensor.detach()) for name, tensor in tensors.items()}
        else:
            copies = self._copies.begin(tensors)
        arguments = (step, copies, dict(metadata), best)
        self._thread = threading.Thread(target=self._write, args=arguments, name="state writer")
        self._thread.start()

    def hold(self) -> None:
        """What the caller enqueues from now on may change the tensors: it begins once they are copied."""
        if self._copies is not None:
            self._copies.hold()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until the state under way is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], best: int | None) -> None:
        try:
            if self._copies is not None:
                self._copies.wait()
            path = state_path(self._folder, step, self._sharded)
            if self._sharded:
                save_shards(path, tensors, metadata, self._group)
            else:
                save_state(path, tensors, metadata)
            if self._group is None or dist.get_rank(self._group) == 0:
                remove_old(self._folder, self._keep, self._keep_every, best)
        except BaseException as error:
            self._error = error


def _copy(tensor: Tensor) -> Tensor:
    """A copy in main memory; of a rank's shard, which is small, one on its own device, as its writer expects."""
    return tensor.clone() if isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)


def completed(metadata: Mapping[str, str]) -> Callable[[Mapping[str, Any], str], dict[str, str]]:
    """For `write_tensors`: a state's metadata from what the trainer gives, the header's entries and the checksum."""

    def complete(entries: Mapping[str, Any], sha256: str) -> dict[str, str]:
        known = {**metadata, "format": FORMAT, "version": VERSION, "sha256": sha256}
        return {**known, "header_sha256": _header_digest(entries, known)}

    return complete


def _header_digest(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps([rest, entries], sort_keys=True).encode()).hexdigest()


def _read_header(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Where the data starts, the tensors' entries and the metadata, once they are what was written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size and length <= MOST_PARSED else b""
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata: dict[str, str] = entries.pop("__metadata__")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a training state, or cut short") from None
    if not is_text(metadata) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a training state, its metadata does not say so")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: version {metadata.get('version')!r}, this hrmcore reads {VERSION}")
    if _header_digest(entries, metadata) != metadata.get("header_sha256"):
        raise ValueError(f"{path}: damaged, the header's checksum is not the one that was written")
    return 8 + length, entries, metadata
