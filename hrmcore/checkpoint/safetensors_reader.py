"""What the safetensors files of a checkpoint say that they hold, checked before a byte of it is used.

Names, shapes, dtypes and offsets come from the headers alone, of one file or of the shards that an index names; a
pickled checkpoint is refused. Imports no torch.
"""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrmcore.limits import MOST_PARSED, read_bounded

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names: torch's
# What holds them in numpy, which has no bfloat16: its bits.
HOLDERS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Stored:
    """One tensor as a safetensors header describes it, and where in the file it begins."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint by their names on disk, from the headers alone.

    Raises FileNotFoundError for a missing file, ValueError naming key and file for anything that does not fit.
    """
    if (single := folder / WEIGHTS_FILE).exists():
        return _read_header(single)
    if not (index := folder / INDEX_FILE).exists():
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        if pickled:
            raise ValueError(
                f"{folder / pickled[0]}: pickled weights are refused, because loading a pickle can run any code; "
                f"convert them to safetensors"
            )
        raise FileNotFoundError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}")
    return _sharded_tensors(index)


def _sharded_tensors(index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object from tensor names to file names")
    for key, shard in weight_map.items():
        if not re.fullmatch(r"[^/\\]+\.safetensors", shard) or not shard.isprintable():
            raise ValueError(f"{index}: {key!r} is in {shard!r}; a shard must be a .safetensors file of the folder")
        if not (index.parent / shard).exists():
            raise FileNotFoundError(f"{index.parent / shard}: missing, but {index.name} says that it holds {key!r}")
    headers = {shard: _read_header(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    for key, shard in weight_map.items():
        if key not in headers[shard]:
            path = index.parent / shard
            raise ValueError(f"{path}: tensor {key!r} is missing, but {index.name} says that it is here")
    for shard, header in headers.items():
        if extra := sorted(key for key in header if weight_map.get(key) != shard):
            raise ValueError(f"{index.parent / shard}: extra tensor {extra[0]!r} is not here by {index.name}")
    return {key: headers[shard][key] for key, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, Stored]:
    """Parse and check a safetensors header; see the format's description at github.com/huggingface/safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + length > size:
                raise ValueError(f"{path}: truncated, its header does not end within the {size} bytes of the file")
            if length > MOST_PARSED:
                raise ValueError(f"{path}: header of {length} bytes, more than the {MOST_PARSED} allowed")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    header = parse_json(path, text)
    header.pop("__metadata__", None)
    spans = []
    stored = {}
    for key, entry in header.items():
        dtype, shape, start, end = _check_entry(path, key, entry)
        spans.append((start, end, key))
        stored[key] = Stored(path, dtype, shape, 8 + length + start)
    _check_spans(path, sorted(spans), size - 8 - length)
    return stored


def _check_entry(path: Path, key: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: header entry {key!r} must be an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {key!r} has dtype {dtype!r}; accepted are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: tensor {key!r} has impossible shape {shape!r} or data_offsets {offsets!r}")
    elements = 1
    for extent in shape:
        elements *= extent
    needed = elements * HOLDERS[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{path}: tensor {key!r} needs {needed} bytes, its data_offsets {offsets} give another number")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The tensors must fill the file's data without overlap, hole or overrun, as the format demands."""
    position = 0
    for start, end, key in spans:
        if end > size:
            raise ValueError(f"{path}: truncated, tensor {key!r} ends at byte {end} of {size} bytes of data")
        if start != position:
            fault = "overlaps another" if start < position else "leaves a hole before it"
            raise ValueError(f"{path}: tensor {key!r} {fault} (data_offsets start at {start}, expected {position})")
        position = end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes after the last tensor belong to none")


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, mapped. Raises ValueError naming the file when it cannot be read."""
    try:
        with path.open("rb") as file:
            # Copy on write: DLPack, through which the engine and torch take arrays, knows none that are read-only.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, no key of which comes twice.

    Raises FileNotFoundError without the file, ValueError naming it when it holds something else.
    """
    try:
        text = read_bounded(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(path, text)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that `text` holds, no key of which comes twice. Raises ValueError naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"the key {key!r} comes twice")
            values[key] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values
