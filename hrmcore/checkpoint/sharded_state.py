"""Training states that every rank writes its shard of, with torch.distributed.checkpoint.

A state is a folder. Each rank writes a safetensors file with its shards of the tensors and the places where they
belong. state.json is written last; it holds the trainer's metadata, the sha256 of each file, and `sha256`, that of the
rest of state.json. The folder is written under a temporary name, flushed and renamed: a final name always stands for a
whole state. torch's usual format for this is a pickle, and loading a pickle runs code; loading safetensors runs none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from hrmcore.averages import local
from hrmcore.distributed.world import lost_rank
from hrmcore.durable import flush, put_in_place, sha256_of
from hrmcore.limits import read_bounded

FORMAT = "hrmcore-sharded-training-state"
VERSION = "1"
MANIFEST = "state.json"

_TEMPORARY = ".writing"
# What torch raises on a shard that is not what its name says; a rank that has ended is a RuntimeError, too.
_UNREADABLE = (SafetensorError, CheckpointException, ValueError, KeyError, IndexError, TypeError, AttributeError)

# One process needs no process group to write or read a state.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def shard_files() -> ModuleType:
    """torch's reader and writer of shards in safetensors; ValueError where torch is older than they are."""
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError:
        raise ValueError(
            f"sharded training needs torch 2.9 or newer, this is {torch.__version__}; update torch or set "
            "parallel = 'data'"
        ) from None
    return hf_storage


def save_shards(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], group: dist.ProcessGroup | None = None
) -> None:
    """Write a state, each rank of `group` its shards; it is on the disk under its final name when this returns.

    Raises on every rank: FloatingPointError when a tensor is not finite, OSError when a rank cannot write,
    ConnectionError when a rank has ended. All of them leave the states before as they were.
    """
    try:
        _save(path, tensors, metadata, group)
    except OSError as error:
        shutil.rmtree(path.with_name(_TEMPORARY), ignore_errors=True)
        raise OSError(
            f"{path}: the training state cannot be written ({error.strerror or error}); the states before it are intact"
        ) from None
    except RuntimeError as error:
        raise lost_rank(f"{path}: not written", error) from None


def verify_shards(path: Path) -> dict[str, str]:
    """Read every file of a state and compare its checksum; returns the metadata. Raises ValueError."""
    manifest = _read_manifest(path)
    found = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    if found != sorted(manifest["files"]):
        raise ValueError(f"{path}: damaged, it holds the files {found}, was written with {sorted(manifest['files'])}")
    for name, sha256 in manifest["files"].items():
        if sha256_of(path / name) != sha256:
            raise ValueError(f"{path / name}: damaged, its checksum is not the one that was written")
    metadata: dict[str, str] = manifest["metadata"]
    return metadata


def read_shards_metadata(path: Path) -> dict[str, str]:
    """A state's metadata, its checksum verified. Raises ValueError."""
    metadata: dict[str, str] = _read_manifest(path)["metadata"]
    return metadata


def shapes_of_shards(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every whole tensor of a state."""
    storage = shard_files()
    try:
        entries = storage.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in entries.items()}
    except _UNREADABLE as error:
        raise ValueError(f"{path}: damaged, a shard's header is none ({_line(error)})") from None


@torch.no_grad()
def read_shards(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, of a sharded one this rank's shard, with what a state holds under their names.

    The number of ranks need not be the one that wrote the state. All ranks must call this when tensors are sharded.
    """
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    storage = shard_files()
    try:
        load(dict(tensors), storage_reader=storage.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: damaged, its shards do not make the tensors ({_line(error)})") from None


def remove_shards(path: Path) -> None:
    """Remove a state. One that is half removed has lost its name."""
    doomed = path.with_name(".removing")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], group: dist.ProcessGroup | None
) -> None:
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    temporary = path.with_name(_TEMPORARY)
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    faults = [name for name, tensor in tensors.items() if not bool(torch.isfinite(local(tensor)).all())]
    if faults := [name for names in _exchange(faults, group) for name in names]:
        raise FloatingPointError(f"{path}: not written, because {faults[0]} is not finite")
    writer = shard_files().HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # on every rank
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(str(causes[0]))) from None
    files = sorted(temporary.iterdir())
    digests = _exchange({file.name: sha256_of(file) for file in files[rank::ranks]}, group)
    failure: OSError | None = None
    if rank == 0:
        try:
            _complete(temporary, path, {name: sha256 for part in digests for name, sha256 in part.items()}, metadata)
        except OSError as error:
            failure = error
    for found in _exchange(failure, group):
        if found is not None:
            raise found


def _complete(temporary: Path, path: Path, files: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    manifest = {"format": FORMAT, "version": VERSION, "files": dict(sorted(files.items())), "metadata": dict(metadata)}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    flush(temporary / MANIFEST)
    put_in_place({temporary: path})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(read_bounded(path / MANIFEST))
        written = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a training state, or cut short: no {MANIFEST} that can be read") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a training state, its {MANIFEST} does not say so")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path}: version {manifest.get('version')!r}, this hrmcore reads {VERSION}")
    if _digest(manifest) != written:
        raise ValueError(f"{path}: damaged, the checksum of {MANIFEST} is not the one that was written")
    if not all(is_text(manifest.get(key)) for key in ("files", "metadata")):
        raise ValueError(f"{path}: damaged, {MANIFEST} lacks files or metadata")
    return dict(manifest)


def is_text(values: object) -> bool:
    """Whether this is an object that holds strings alone."""
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _exchange(mine: Any, group: dist.ProcessGroup | None) -> Sequence[Any]:
    """Every rank's object, on every rank."""
    if group is None:
        return [mine]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group)
    return everyones
