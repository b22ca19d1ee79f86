"""Training states survive what disks and people do to them."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hrmcore.checkpoint.training_state import (
    StateWriter,
    find_newest,
    find_states,
    load_state,
    read_metadata,
    save_state,
    state_path,
)

METADATA = {"step": "3", "model_config": '{"hidden_size": 8}', "note": "é"}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.a": torch.full((3, 5), value),
        "model.half": torch.arange(7, dtype=torch.bfloat16),
        "optimizer.step.a": torch.tensor(4.0),
        "model.none": torch.empty(0, 4),
        "model.turned": torch.arange(6.0).view(2, 3).T,
    }


def test_a_state_comes_back_and_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "states" / "step-00000003.safetensors"
    save_state(path, tensors(), METADATA)
    found, metadata = load_state(path)
    assert metadata == read_metadata(path)
    assert metadata.items() >= {**METADATA, "format": "hrmcore-training-state", "version": "1"}.items()
    for read in (found, load_file(path)):
        assert read.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_flipped_bit_in_any_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"model.a": torch.randn(4)}, {"step": "3"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        padding = chr(whole[position]) == " " and chr(data[position]).isspace()
        if not padding:  # another blank in the header means the same
            with pytest.raises(ValueError, match=r"^.*state\.safetensors: "):
                load_state(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^.*state\.safetensors: "):
            load_state(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_no_state_holds_what_is_not_finite(tmp_path: Path, number: float) -> None:
    path = state_path(tmp_path, 3)
    save_state(path, tensors(), METADATA)
    before = path.read_bytes()
    broken = tensors()
    broken["model.turned"][1, 1] = number
    with pytest.raises(FloatingPointError, match=r"not written, because model\.turned is not finite"):
        save_state(path, broken, METADATA)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_states_before_intact(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write stops in the middle."""
    save_state(state_path(tmp_path, 1), tensors(), METADATA)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002.* cannot be written \(File too large\)"):
            save_state(state_path(tmp_path, 2), {"model.a": torch.ones(10_000)}, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "states") == ["step-00000001.safetensors"]
    assert torch.equal(load_state(state_path(tmp_path, 1))[0]["model.a"], tensors()["model.a"])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_state_of_that_name_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = state_path(tmp_path, 1)
    save_state(path, tensors(1.0), METADATA)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_state(path, tensors(2.0), METADATA)
    monkeypatch.undo()
    assert torch.equal(load_state(path)[0]["model.a"], tensors(1.0)["model.a"])
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"/proc/self/.*cannot be written"):
        save_state(Path("/proc/self/states/step-1.safetensors"), tensors(), METADATA)


def test_the_writer_takes_a_copy_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        gate.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    writer = StateWriter(tmp_path, keep=2, keep_every=4)
    weights = tensors(1.0)
    writer.save(1, weights, METADATA)
    weights["model.a"].fill_(9.0)  # the next step, while the file is being written
    assert not find_states(tmp_path)
    gate.set()
    writer.finish()
    assert torch.equal(load_state(state_path(tmp_path, 1))[0]["model.a"], tensors(1.0)["model.a"])
    for step in range(2, 10):
        writer.save(step, weights, METADATA)
    writer.finish()
    assert [step for step, _ in find_states(tmp_path)] == [9, 8, 4]


def test_the_writer_removes_nothing_before_the_new_state_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StateWriter(tmp_path, keep=1, keep_every=0)
    writer.save(1, tensors(), METADATA)
    writer.finish()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    writer.save(2, tensors(), METADATA)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    assert [step for step, _ in find_states(tmp_path)] == [1]


def test_the_newest_whole_state_is_taken(tmp_path: Path) -> None:
    said: list[str] = []
    assert find_newest(tmp_path, said.append) is None
    for step in (1, 2, 3):
        save_state(state_path(tmp_path, step), tensors(float(step)), {"step": str(step)})
    (tmp_path / "states" / ".writing.tmp").write_bytes(b"left by a killed process")
    for step in (2, 3):
        state_path(tmp_path, step).write_bytes(state_path(tmp_path, step).read_bytes()[:-1])
    found = find_newest(tmp_path, said.append)
    assert found is not None
    assert (found[0], found[1]["step"]) == (state_path(tmp_path, 1), "1")
    assert len(said) == 2
    assert "step-00000003.safetensors: damaged" in said[0]
    assert (tmp_path / "states" / "step-00000003.safetensors.damaged").exists()
    assert [step for step, _ in find_states(tmp_path)] == [1]  # so that a damaged one does not count as kept
