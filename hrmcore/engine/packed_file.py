"""The file that the CPU engine maps instead of packing a checkpoint again.

`HRMPACK\\0`, a version and the header's length (uint32 each, little-endian), the SHA-256 of the header, the header
(JSON: config, dtype, bytes, checksum), zeros up to a multiple of 4096, then the weights exactly as
csrc/engine/weights.h lays them out. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrmcore.checkpoint.safetensors_reader import parse_json
from hrmcore.config import HRMConfig
from hrmcore.durable import replacing
from hrmcore.engine.runner import DTYPES

PACKED_FILE = "weights.hrmpack"

_MAGIC = b"HRMPACK\0"
_VERSION = 1
_PREFIX = struct.Struct("<8sII32s")
_ALIGNMENT = 4096  # bytes; a mapping begins at a page of the operating system
_MAX_HEADER_BYTES = 1 << 20


def _is_below(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


# What the header holds, and all that it may hold: each key's values in words, and their check.
_SCHEMA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("an object", lambda value: isinstance(value, dict)),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES),
    "bytes": ("a whole number below 2**62", lambda value: _is_below(value, 1 << 62)),
    "checksum": ("a whole number below 2**64", lambda value: _is_below(value, 1 << 64)),
}


@dataclass(frozen=True)
class Header:
    """What a packed file says about itself; `offset` is where its weights begin."""

    config: HRMConfig
    dtype: str
    bytes: int
    checksum: int
    offset: int


def read_header(path: Path) -> Header:
    """Read and check the header of a packed file. Raises ValueError naming the file when it cannot be trusted."""
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            raise ValueError(f"{path}: not a packed checkpoint")
        _, version, length, digest = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise ValueError(
                f"{path}: packed format version {version}, this hrmcore reads {_VERSION}; convert it again"
            )
        text = file.read(min(length, _MAX_HEADER_BYTES))
    if len(text) != length or hashlib.sha256(text).digest() != digest:
        raise ValueError(f"{path}: damaged, its header does not match its checksum; convert the checkpoint again")
    values = parse_json(path, text)
    if unlike := sorted(set(values) ^ set(_SCHEMA)):
        fault = "unknown" if unlike[0] in values else "missing"
        raise ValueError(f"{path}: its header has the {fault} key {unlike[0]!r}; the keys are {', '.join(_SCHEMA)}")
    for key, (expected, holds) in _SCHEMA.items():
        if not holds(values[key]):
            raise ValueError(f"{path}: {key} in its header must be {expected}, got {reprlib.repr(values[key])}")
    try:
        config = HRMConfig.from_dict(values["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Header(config, values["dtype"], values["bytes"], values["checksum"], _data_offset(length))


def _data_offset(header_length: int) -> int:
    return -(-(_PREFIX.size + header_length) // _ALIGNMENT) * _ALIGNMENT


def write_packed(path: Path, header: Mapping[str, Any], weights: memoryview) -> Path:
    """Write a packed file, which appears whole or not at all; returns its path."""
    text = json.dumps(header).encode()
    with replacing(path) as [temporary], temporary.open("wb") as file:
        file.write(_PREFIX.pack(_MAGIC, _VERSION, len(text), hashlib.sha256(text).digest()) + text)
        file.seek(_data_offset(len(text)))
        file.write(weights)
    return path
