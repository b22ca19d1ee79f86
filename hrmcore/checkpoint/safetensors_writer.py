"""Writing a safetensors file one tensor at a time (the format: github.com/huggingface/safetensors)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Callable[[Mapping[str, Any], str], Mapping[str, str]],
) -> None:
    """Write a file, holding no more than one of its tensors at any time; the caller flushes it to the disk.

    `metadata` makes the header's metadata from the header's entries (dtype, shape, data_offsets by name) and the sha256
    of the tensors' bytes. It is called twice, the first time with zeros for the checksum. Both answers must have the
    same length.
    Raises ValueError when `tensor_of` gives a tensor of another dtype or shape than announced.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    digest = hashlib.sha256()
    blank = _header(entries, metadata(entries, "0" * 64))
    with path.open("wb") as file:
        file.write(blank)
        for name, announced in shapes.items():
            tensor = tensor_of(name).detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != announced:
                raise ValueError(f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, {announced} was announced")
            block = tensor.reshape(-1).view(torch.uint8).numpy().data
            digest.update(block)
            file.write(block)
            del tensor, block
        header = _header(entries, metadata(entries, digest.hexdigest()))
        if len(header) != len(blank):
            raise ValueError(f"{path}: the metadata's length depends on the checksum's value")
        file.seek(0)
        file.write(header)


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, filled up so that the data is aligned."""
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
