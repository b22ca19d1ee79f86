"""The file that the CPU engine maps instead of packing a checkpoint again.

`HRMPACK\\0`, a version and the header's length (uint32 each, little-endian), the SHA-256 of the header, the header
(JSON: config, dtype, bytes, checksum), zeros up to a multiple of 4096, then the weights exactly as
csrc/engine/weights.h lays them out. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrmcore.config import HRMConfig
from hrmcore.durable import replacing

PACKED_FILE = "weights.hrmpack"

_MAGIC = b"HRMPACK\0"
_VERSION = 1
_PREFIX = struct.Struct("<8sII32s")
_ALIGNMENT = 4096  # bytes; a mapping begins at a page of the operating system
_MAX_HEADER_BYTES = 1 << 20


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
    values: dict[str, Any] = json.loads(text)
    return Header(
        config=HRMConfig.from_dict(values["config"]),
        dtype=values["dtype"],
        bytes=values["bytes"],
        checksum=values["checksum"],
        offset=_data_offset(length),
    )


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
