"""Files written one tensor at a time are what the safetensors library reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hrmcore.checkpoint.safetensors_writer import write_tensors

TENSORS = {
    "wide": torch.arange(35, dtype=torch.float32).view(5, 7),
    "turned": torch.randn(4, 6).t(),
    "half": torch.randn(3).bfloat16(),
    "halves": torch.randn(3, 3).half(),
    "count": torch.tensor([1, -(2**40)]),
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
}
SHAPES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, SHAPES, TENSORS.__getitem__, lambda entries, sha256: {"n": str(len(entries)), "sum": sha256})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 64 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"n": "7", "sum": hashlib.sha256(content[start:]).hexdigest()}


@pytest.mark.parametrize("other", [torch.zeros(5, 7).half(), torch.zeros(7, 5)], ids=["dtype", "shape"])
def test_a_tensor_that_is_not_as_announced_is_named(tmp_path: Path, other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^wide: is torch"):
        write_tensors(tmp_path / "f", SHAPES, lambda name: other, lambda *_: {})


def test_metadata_whose_length_depends_on_the_checksum_is_refused(tmp_path: Path) -> None:
    def metadata(entries: Any, sha256: str) -> dict[str, str]:
        return {"sum": sha256.lstrip("0") + ("" if sha256.strip("0") else "x" * 1000)}

    with pytest.raises(ValueError, match="length depends on the checksum"):
        write_tensors(tmp_path / "f", SHAPES, TENSORS.__getitem__, metadata)
