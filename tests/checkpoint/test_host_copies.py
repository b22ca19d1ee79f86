"""States that are copied beside the steps: the blocking way's bytes, whatever the steps do meanwhile."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.runs import WORDS, repetitions, write_run
from support.side import Late
from torch import Tensor

from hrmcore.checkpoint.host_copies import ALIGNED, HostCopies
from hrmcore.checkpoint.training_state import StateWriter, find_states, load_state, state_path
from hrmcore.train import fault
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

METADATA = {"step": "3"}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.a": torch.full((3, 5), value),
        "model.half": torch.arange(7, dtype=torch.bfloat16) + value,
        "optimizer.step.a": torch.tensor(4.0),
        "model.none": torch.empty(0, 4),
        "model.turned": (torch.arange(6.0) + value).view(2, 3).T,
    }


def size_of(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def writers(folder: Path, side: Late) -> tuple[StateWriter, StateWriter]:
    return StateWriter(folder / "blocking", 9, 0), StateWriter(folder / "beside", 9, 0, side=side)


def bytes_of(folder: Path, step: int = 1) -> list[bytes]:
    return [state_path(folder / name, step).read_bytes() for name in ("blocking", "beside")]


def test_the_bytes_are_those_of_the_blocking_way(tmp_path: Path) -> None:
    """Though the tensors change as soon as what changes them need not wait any more, in the second state, too."""
    side, state = Late(), tensors()
    pair = writers(tmp_path, side)
    for step in (1, 2):
        for writer in pair:
            writer.save(step, state, METADATA)
        assert len(find_states(tmp_path / "beside")) == step - 1  # nothing has landed yet
        for writer in pair:
            writer.hold()
        for tensor in state.values():
            tensor.add_(1)
        for writer in pair:
            writer.finish()
        blocking, beside = bytes_of(tmp_path, step)
        assert blocking == beside


def test_without_holding_the_change_would_be_in_the_state(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    side, state = Late(), tensors()
    pair = writers(tmp_path, side)
    for writer in pair:
        writer.save(1, state, METADATA)
    state["model.a"].add_(1)
    side.land()
    for writer in pair:
        writer.finish()
    blocking, beside = bytes_of(tmp_path)
    assert blocking != beside


def test_memory_is_the_states_and_is_used_again() -> None:
    side = Late()
    copies = HostCopies(side)
    small = {"model.a": torch.zeros(3)}
    for state in (tensors(), tensors(), small, tensors()):
        found = copies.begin(state)
        copies.hold()
        copies.wait()
        assert list(found) == list(state)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in state.items())
        assert all(found[name].data_ptr() % ALIGNED == found["model.a"].data_ptr() % ALIGNED for name in state)
    assert side.calls.count("memory") == 1
    assert size_of(tensors()) <= copies.bytes_held < size_of(tensors()) + ALIGNED * len(tensors())
    copies.begin({"model.a": torch.zeros(10_000)})
    assert copies.bytes_held == 40_000
    assert side.calls.count("memory") == 2


def test_copies_that_fail_leave_the_state_before_and_say_so(tmp_path: Path) -> None:
    side = Late()
    writer = StateWriter(tmp_path, 1, 0, side=side)
    writer.save(1, tensors(), METADATA)
    writer.hold()
    writer.finish()
    side.fault = RuntimeError("the device is gone")
    writer.save(2, tensors(2.0), METADATA)
    writer.hold()
    with pytest.raises(RuntimeError, match="the device is gone"):
        writer.finish()
    assert [step for step, _ in find_states(tmp_path)] == [1]
    assert torch.equal(load_state(state_path(tmp_path, 1))[0]["model.a"], tensors()["model.a"])


@pytest.mark.usefixtures("one_thread", "no_peak")
def test_a_run_writes_the_states_that_it_writes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state and a validation of the averages after every step, a growth that rises, and meanwhile a skipped step."""
    few = {"steps": 5, "batch_tokens": 128, "warmup_steps": 1, "save_every": 1, "eval_every": 1, "keep": 9, "ema": 0.9}
    stages = '[[grow]]\nat_tokens = 100\nintermediate_size = 96\nmode = "ramped"\nmask_steps = 3\n'
    side, finish = Late(), StateWriter.finish
    tokenizer = None
    for name in ("plain", "beside"):
        folder = tmp_path / name
        keys = few | {"heldout_files": [str(folder / "train.jsonl")], "on_nonfinite": "skip", "sample_answers": 0}
        path = write_run(folder, repetitions(WORDS[:4]), tokenizer, stages=stages, **keys)
        tokenizer = folder / "tokenizer" if tokenizer is None else tokenizer
        numbers = itertools.count(1)
        monkeypatch.setattr(fault, "wrong", lambda *_, n=numbers: "a spike" if next(n) == 3 else "")
        Trainer(read_config(path)).run()
        monkeypatch.setattr(Trainer, "_side", lambda self: side)
        monkeypatch.setattr(StateWriter, "finish", lambda self: (side.land(), finish(self)))
    steps = [step for step, _ in find_states(tmp_path / "plain" / "out")]
    assert steps == [5, 4, 3, 2, 1]
    assert side.calls.count("begin") == 5
    for step in steps:
        plain, beside = (state_path(tmp_path / name / "out", step).read_bytes() for name in ("plain", "beside"))
        assert plain == beside, step
