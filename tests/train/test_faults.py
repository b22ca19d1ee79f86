"""Losses, gradients and curvature samples that are not finite, and spikes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import hrmcore
from support.runs import rewrite

from hrmcore import machine
from hrmcore.checkpoint.training_state import find_states
from hrmcore.model import HRM
from hrmcore.ops import sublayers
from hrmcore.optim import Sophia
from hrmcore.train.run_file import (
    read_config,
)
from hrmcore.train.trainer import Trainer


def poison(trainer: Trainer) -> list[int]:
    """Let the embedding of the last word be NaN; returns the records in which it occurs."""
    corpus = trainer.corpus
    [token] = trainer.tokenizer.encode(" theta")[-1:]
    with torch.no_grad():
        trainer.model.embed_tokens.weight[token] = float("nan")
    return [r for r in range(len(corpus)) if token in corpus.tokens[corpus.offsets[r] : corpus.offsets[r + 1] - 1]]


def test_a_loss_that_is_not_finite_stops_with_the_records_and_leaves_no_state(trainer: Trainer, tmp_path: Path) -> None:
    guilty = poison(trainer)
    assert 0 < len(guilty) < len(trainer.corpus) / 2
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is not finite; it comes from the records") as error:
        trainer._train_step()
    named = [int(n) for n in re.findall(rf"(\d+) \({tmp_path}/train.jsonl:\d+\)", str(error.value))]
    assert named
    assert set(named) <= set(guilty)
    lines = [int(n) for n in re.findall(r"train.jsonl:(\d+)", str(error.value))]
    assert lines == [record + 1 for record in named]
    trainer.save()
    with pytest.raises(FloatingPointError, match=r"not written, because model\.embed_tokens\.weight is not finite"):
        trainer._writer.finish()
    assert not find_states(trainer.out)


def test_a_step_that_is_not_finite_can_be_skipped(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "steps = 12", 'steps = 12\non_nonfinite = "skip"')))
    poison(trainer)
    before = {name: tensor.clone() for name, tensor in trainer._tensors().items()}
    found = trainer._train_step()
    assert found["skipped"] == trainer.step == 1
    assert all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in trainer._tensors().items()
    )
    trainer.close()


def test_a_learning_rate_that_is_too_high_is_not_the_records_fault(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "learning_rate = 0.003", "learning_rate = 1e6")))
    with pytest.raises(FloatingPointError, match="is not finite") as error:
        trainer.run()
    said = str(error.value)
    assert re.search(
        r"; (all \d+ records have it|no record has it by itself), so look at the rate and the weights", said
    )
    assert re.search(
        r": learning_rate is 1e\+06, (the largest weight is \d[\d.]*e\+\d+|a weight is not finite); ", said
    )
    assert "mend" not in said


def test_the_records_are_named_and_the_weights_as_the_other_cause(trainer: Trainer) -> None:
    poison(trainer)
    sound = r"it comes from the records .*; if they are sound, .*: learning_rate is 0\.003, a weight is not finite; "
    with pytest.raises(FloatingPointError, match=sound):
        trainer._train_step()


@pytest.mark.parametrize("variant", ["g", "h"])
def test_a_curvature_sample_that_is_not_finite_is_skipped_or_stops(
    variant: str, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step samples; one sample in the run has an Inf."""
    keys = f'on_nonfinite = "skip"\noptimizer = "sophia-{variant}"\ncurvature_every = 2'
    trainer = Trainer(read_config(rewrite(run_file, "steps = 12", f"steps = 12\n{keys}")))
    usual = Sophia._refuse_nonfinite

    def spoil(self: Sophia, samples: Any) -> None:
        samples[0].hvps[0].view(-1)[3] = torch.inf
        usual(self, samples)

    trainer._train_step()
    hessians = {name: t.clone() for name, t in trainer._tensors().items() if ".hessian." in name}
    assert hessians
    with monkeypatch.context() as patched:
        patched.setattr(Sophia, "_refuse_nonfinite", spoil)
        trainer._train_step()
        assert trainer._train_step()["skipped"] == 1
    after = trainer._tensors()
    assert all(torch.equal(after[name], hessian) for name, hessian in hessians.items())
    assert trainer._train_step()["skipped"] == 1
    assert trainer._train_step()["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in trainer._tensors().values())
    trainer.config = dataclasses.replace(trainer.config, on_nonfinite="stop")
    monkeypatch.setattr(Sophia, "_refuse_nonfinite", spoil)
    trainer._train_step()
    with pytest.raises(FloatingPointError, match=r"step 6: the curvature sample is not finite in parameter 0; "):
        trainer._train_step()
    trainer.close()


def test_a_spike_is_skipped_or_stops(run_file: Path) -> None:
    trainer = Trainer(read_config(rewrite(run_file, "seed = 7", 'seed = 7\nspike_factor = 2.0\non_nonfinite = "skip"')))
    assert trainer._train_step()["skipped"] == 0
    usual = trainer.typical_loss
    assert usual is not None
    with torch.no_grad():
        trainer.model.lm_head.weight *= 10  # confidently wrong
    before = trainer.model.lm_head.weight.detach().clone()
    assert trainer._train_step()["skipped"] == 1
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert trainer.typical_loss == usual
    trainer.config = dataclasses.replace(trainer.config, on_nonfinite="stop")
    with pytest.raises(FloatingPointError, match=r"the loss [\d.]+ is more than 2 times the usual [\d.]+; "):
        trainer._train_step()
    trainer.close()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("swiglu_product", "the loss is not finite; .*hrmcore::mlp_sublayer in visit 1 of L_module.layers.0; "),
        ("gemm_rows_backward", "the gradient is not finite; .*hrmcore::mlp_sublayer_backward in backward; "),
    ],
)
def test_a_nan_at_the_second_step_names_the_op(
    trainer: Trainer, function: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on an op of ours gives a NaN, in its forward or its backward, from what is sound."""
    trainer._train_step()
    sound = getattr(sublayers, function)

    def spoiled(*operands: Any) -> torch.Tensor:
        out = sound(*operands)
        out.view(-1)[0] = torch.nan
        return out

    monkeypatch.setattr(sublayers, function, spoiled)
    with pytest.raises(FloatingPointError, match=f"step 1: {said}the states before are intact"):
        trainer._train_step()


def test_what_memory_held_before_hides_no_op(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are summed where old numbers stand, here NaN: the op that spoils one of the sums is still named."""
    trainer._train_step()
    sound = sublayers.gemm_weight_backward_

    def spoiled(total: torch.Tensor, *operands: Any) -> None:
        sound(total, *operands)
        total.view(-1)[0] = torch.nan

    monkeypatch.setattr(sublayers, "gemm_weight_backward_", spoiled)
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        with pytest.raises(FloatingPointError, match="hrmcore::mlp_sublayer_backward in backward; "):
            trainer._train_step()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_weight_that_is_not_finite_is_named(trainer: Trainer) -> None:
    poison(trainer)
    with pytest.raises(FloatingPointError, match=r"; the weight embed_tokens.weight is not finite; the states before"):
        trainer._train_step()


def test_no_memory_on_the_device_is_one_line_and_the_run_goes_on(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = HRM.loss, iter(range(100))

    def loss(self: HRM, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 MiB free.")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(machine, "peak_flops", lambda precision, device: 1e12)
    monkeypatch.setattr(HRM, "loss", loss)
    assert hrmcore("train", str(run_file)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hrmcore train: out of memory; ")
    assert [step for step, _ in find_states(run_file.parent / "out")] == [4]
    monkeypatch.setattr(HRM, "loss", plain)
    assert hrmcore("train", str(run_file)) == 0
    assert find_states(run_file.parent / "out")[0][0] == 12
