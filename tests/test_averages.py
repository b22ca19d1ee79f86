"""Averages of the weights in bfloat16: their mean is right, they take half the memory, and a run resumes them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.command_line import hrmcore
from support.optimizers import BATCH_TOKENS, KINDS, gradients, make, parameters, take_step, tensors
from support.runs import WORDS, final_state, repetitions, write_run

from hrmcore.averages import round_at_random
from hrmcore.checkpoint.hrm_text import load_model
from hrmcore.optim import AdamW


def test_rounding_at_random_has_the_right_mean() -> None:
    """n draws of a number between two of bfloat16, u apart: the mean's deviation is at most u / (2 √n)."""
    draws = 40_000
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-20, -7.7e8, 0.0])
    wide = values.repeat(draws, 1)
    out = torch.empty(draws, len(values), dtype=torch.bfloat16)
    round_at_random(wide.clone(), out, torch.Generator().manual_seed(1))
    low = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    high = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    for column, (value, a, b) in enumerate(zip(values, low, high, strict=True)):
        found = out[:, column].float()
        assert set(found.unique().tolist()) <= {a.item(), b.item()}
        bound = 5 * (b - a).abs().double() / (2 * draws**0.5)
        assert (found.double().mean() - value.double()).abs() <= bound
    assert (out[:, 0] == 1.0).all()  # what bfloat16 has is not moved
    for special in (torch.inf, -torch.inf, torch.nan):
        one = torch.empty(1, dtype=torch.bfloat16)
        round_at_random(torch.tensor([special]), one, torch.Generator().manual_seed(1))
        assert str(one.item()) == str(special)


def test_it_moves_at_a_decay_where_the_nearest_number_does_not() -> None:
    """Weights that stay at 2, an average that began at 1: after n steps it is 2 − decayⁿ, to the draws' deviation."""
    decay, steps, size = 0.9999, 400, 4096
    p = torch.nn.Parameter(torch.ones(size))
    optimizer = AdamW([p], lr=0.0, ema=decay, ema_dtype=torch.bfloat16)
    p.grad = torch.zeros(size)
    optimizer.step()
    with torch.no_grad():
        p.fill_(2.0)
    for _ in range(steps):
        optimizer.step()
    average = optimizer.state[p]["ema"]
    assert average.dtype == torch.bfloat16
    # Each step rounds by at most 2^-7 with a variance of at most a quarter of its square, and the draws are apart.
    deviation = 2**-7 / 2 * steps**0.5 / size**0.5
    assert abs(average.double().mean().item() - (2 - decay**steps)) <= 5 * deviation


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_to_the_bit_and_states_resume(kind: str) -> None:
    params = parameters()
    tokens = {"batch_tokens": BATCH_TOKENS} if kind == "SophiaG" else {}
    optimizer = make(kind, params, ema=0.9, ema_dtype=torch.bfloat16, **tokens)
    for step in range(3):
        take_step(optimizer, params, step)
    before = tensors(optimizer, params)
    with optimizer.swap_ema():
        for p in params:
            assert torch.equal(p, optimizer.state[p]["ema"].float())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer, params), strict=True))

    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(kind, again, ema=0.9, **tokens)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, which in ((params, optimizer), (again, resumed)):
        for p, gradient in zip(one, gradients(9), strict=True):
            p.grad = gradient
        which.step()
    pairs = list(zip(tensors(optimizer, params), tensors(resumed, again), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        AdamW(parameters(), ema=0.9, ema_dtype=torch.float16)


@pytest.mark.usefixtures("no_peak", "one_thread")
def test_a_run_keeps_resumes_and_exports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"batch_tokens": 256, "warmup_steps": 1, "save_every": 4, "schedule": "constant", "ema_dtype": "bfloat16"}
    whole = write_run(tmp_path / "whole", repetitions(WORDS), steps=8, **keys)
    parts = write_run(tmp_path / "parts", repetitions(WORDS), tmp_path / "whole/tokenizer", steps=8, **keys)
    assert hrmcore("train", str(whole)) == 0
    for steps in ("4", "8"):
        assert hrmcore("train", str(parts), "--set", f"steps={steps}", "--set", "horizon_fraction=0.0") == 0
    assert hrmcore("train", str(whole), "--set", f"out={tmp_path}/once", "--set", "horizon_fraction=0.0") == 0
    once, twice = final_state(tmp_path / "once", 8), final_state(tmp_path / "parts/out", 8)
    averages = {name: tensor for name, tensor in once.items() if name.startswith("optimizer.ema.")}
    assert averages
    assert {tensor.dtype for tensor in averages.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())
    weights = load_model(tmp_path / "once/checkpoint").state_dict()
    for name, tensor in averages.items():
        assert torch.equal(weights[name.removeprefix("optimizer.ema.")], tensor.float())
    capsys.readouterr()
    for key, said in (
        ("ema_dtype=float16", "train config: ema_dtype must be one of ('float32', 'bfloat16'), got 'float16'"),
        ("parallel=sharded", "train config: sharded averages are kept in float32; set ema_dtype = 'float32'"),
    ):
        assert hrmcore("train", str(whole), "--set", key) == 2
        assert capsys.readouterr().err == f"hrmcore train: {whole}: {said}\n"
