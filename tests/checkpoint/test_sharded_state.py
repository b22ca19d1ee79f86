"""States that are folders: whole or not there, damage noticed, no pickle."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from support.runs import needs_shard_files
from torch import Tensor

from hrmcore.checkpoint.sharded_state import read_shards, save_shards, verify_shards
from hrmcore.checkpoint.training_state import find_newest, find_states, load_state, remove_old, state_path

pytestmark = needs_shard_files

METADATA = {"step": "3", "data_position": "[0, 7]"}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {"model.a": torch.full((5, 3), value), "model.b": torch.arange(4.0), "optimizer.step.a": torch.tensor(value)}


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    path = state_path(folder, step, sharded=True)
    save_shards(path, tensors(value), METADATA)
    return path


def test_what_is_read_is_what_was_written_and_nothing_of_it_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found, metadata = load_state(path)
    assert metadata == METADATA
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    some = {"model.b": torch.zeros(4)}
    read_shards(path, some)
    assert torch.equal(some["model.b"], torch.arange(4.0))
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), 7):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"step-00000003"):
                verify_shards(path)
        file.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=r"damaged|not a training state"):
            verify_shards(path)
        file.unlink()
        with pytest.raises(ValueError, match=r"damaged|not a training state"):
            verify_shards(path)
        file.write_bytes(whole)
    (path / "shard-9.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged, it holds the files"):
        verify_shards(path)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    path = state_path(tmp_path, 1, sharded=True)
    with pytest.raises(FloatingPointError, match=r"step-00000001: not written, because model.a is not finite"):
        save_shards(path, tensors(float("nan")), METADATA)
    assert not path.exists()


def test_a_full_disk_leaves_the_states_before_intact(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write stops in the middle."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002.* cannot be written \(File too large\); the states before"):
            save_shards(state_path(tmp_path, 2, sharded=True), {"model.a": torch.ones(10_000)}, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "states") == ["step-00000001"]
    assert verify_shards(state_path(tmp_path, 1, sharded=True)) == METADATA


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_names_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path, 1)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [step for step, _ in find_states(tmp_path)] == [1]
    assert os.listdir(tmp_path / "states") == ["step-00000001"]


def test_the_newest_that_is_whole_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, float(step))
    remove_old(tmp_path, keep=2, keep_every=4)
    assert [step for step, _ in find_states(tmp_path)] == [8, 6, 4]
    said: list[str] = []
    for number in (1, 2):  # the second time, one of that name was set aside before
        next(state_path(tmp_path, 8, sharded=True).glob("*.safetensors")).write_bytes(b"")
        found = find_newest(tmp_path, said.append)
        assert found == (state_path(tmp_path, 6, sharded=True), METADATA)
        assert len(said) == number
        assert "set aside as step-00000008.damaged, falling back from step 8" in said[-1]
        save(tmp_path, 8)
