"""The model and the optimizers in other people's loops: accelerate, GradScaler, schedules, copies, DDP, torch.func."""

from __future__ import annotations

import copy
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.optimizers import BATCH_TOKENS, KINDS, gradients, make, parameters, take_step, tensors
from support.runs import MODEL
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.growth.operators import Growth
from hrmcore.model import HRM
from hrmcore.optim import AdamAtan2, AdamW, Sophia

CONFIG = HRMConfig(vocab_size=40, **MODEL)
IDS = torch.arange(36).view(2, 18) % 40


@pytest.fixture
def model() -> HRM:
    torch.manual_seed(3)
    return HRM(CONFIG)


def loss_of(logits: Tensor, ids: Tensor = IDS) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def causal_loss(model: HRM, ids: Tensor = IDS) -> Tensor:
    return loss_of(model(ids, prefix_length=0), ids)


def own_tokens(kind: str) -> dict[str, Any]:
    return {"batch_tokens": BATCH_TOKENS} if kind == "SophiaG" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_the_steps_of_a_plain_loop(model: HRM, kind: str) -> None:
    """Its wrappers load the state, clip, accumulate over two batches and step the schedule: the same bits."""
    plain = copy.deepcopy(model)

    def parts(of: HRM) -> tuple[Any, Any]:
        optimizer = make(kind, list(of.parameters()), ema=0.9, **own_tokens(kind))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, schedule = parts(plain)
    for _ in range(3):
        for part in (0, 1):
            (causal_loss(plain, IDS[part : part + 1]) / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    theirs, their_optimizer, their_schedule = accelerator.prepare(model, *parts(model))
    for batch in range(6):
        with accelerator.accumulate(theirs):
            accelerator.backward(causal_loss(theirs, IDS[batch % 2 : batch % 2 + 1]))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(theirs.parameters(), 0.5)
            their_optimizer.step()
            their_schedule.step()
            their_optimizer.zero_grad()
    assert their_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for ours, other in zip(plain.parameters(), accelerator.unwrap_model(theirs).parameters(), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_steps_or_skips(kind: str) -> None:
    """A power of two scales without rounding; an infinite gradient skips the step and halves the scale."""
    scaled, plain = parameters(), parameters()
    optimizer, other = (make(kind, params, **own_tokens(kind)) for params in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros(()))  # the scale is made with the first loss
    for step in range(3):
        for p, q, gradient in zip(scaled, plain, gradients(step), strict=True):
            p.grad, q.grad = gradient * scaler.get_scale(), gradient
            if step == 1:
                p.grad.view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            other.step()
    assert scaler.get_scale() == 512.0
    assert [optimizer.state[p]["step"].item() for p in scaled] == [2] * len(scaled)
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(kind: str, how: str) -> None:
    params = parameters()
    optimizer = make(kind, params, ema=0.9, **own_tokens(kind))
    take_step(optimizer, params, 0)
    if how == "deepcopy":
        copied, twin = copy.deepcopy((params, optimizer))
    else:
        file = io.BytesIO()
        torch.save((params, optimizer), file)
        file.seek(0)
        copied, twin = torch.load(file, weights_only=False)
    for one, which in ((params, optimizer), (copied, twin)):
        for p, gradient in zip(one, gradients(7), strict=True):
            p.grad = gradient
        which.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer, params), tensors(twin, copied), strict=True))
    assert getattr(twin, "variant", None) == getattr(optimizer, "variant", None)


def test_a_state_dict_of_before_goes_on_as_it_was() -> None:
    """AdamAtan2's with the paper's form, Sophia's with the batch_tokens that it is made with."""
    for kind, key, fresh in (("AdamAtan2Paper", "form", AdamAtan2), ("SophiaG", "batch_tokens", Sophia)):
        params = parameters()
        old = make(kind, params, **own_tokens(kind))
        take_step(old, params, 0)
        saved = copy.deepcopy(old.state_dict())
        for group in saved["param_groups"]:
            del group[key]
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = fresh(again, **own_tokens(kind))
        resumed.load_state_dict(saved)
        for one, which in ((params, old), (again, resumed)):
            for p, gradient in zip(one, gradients(5), strict=True):
                p.grad = gradient
            which.step()
        assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("kind", ["AdamAtan2Paper", "SophiaG"])
def test_an_optimizer_that_has_loaded_a_state_grows_with_its_options(model: HRM, kind: str) -> None:
    optimizer = make(kind, list(model.parameters()), **own_tokens(kind))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    growth = Growth.of(CONFIG, {"intermediate_size": 96})
    bigger = growth.model(model)
    larger = growth.optimizer(optimizer, model, bigger)
    named = ("form", "batch_tokens", "lr", "betas")
    assert {n: larger.param_groups[0].get(n) for n in named} == {n: optimizer.param_groups[0].get(n) for n in named}
    causal_loss(bigger).backward()
    larger.step()


def test_options_of_a_group_of_its_own() -> None:
    """B of one group and not of the other; each steps as an optimizer of its own would."""
    params, alone = parameters(), parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "batch_tokens": 7}]
    optimizer = make("SophiaG", groups, batch_tokens=BATCH_TOKENS)
    parts = [make("SophiaG", alone[:2], batch_tokens=BATCH_TOKENS), make("SophiaG", alone[2:], batch_tokens=7)]
    for step in range(3):
        for one in (params, alone):
            for p, gradient in zip(one, gradients(step), strict=True):
                p.grad = gradient
        for each in (optimizer, *parts):
            if step == 0:
                each.update_hessian()
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))
    with pytest.raises(ValueError, match="batch_tokens must be at least 1 for variant G, got 0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "batch_tokens": 0})


# The model


def test_functional_call_and_its_gradient(model: HRM) -> None:
    """Other weights in a call, and torch.func.grad over them: what the module itself gives with these weights."""
    torch.manual_seed(4)
    other = HRM(CONFIG)
    weights = {name: tensor.detach().clone() for name, tensor in other.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = torch.func.functional_call(model, weights, (IDS,), {"prefix_length": 4})
    assert torch.equal(found, other(IDS, prefix_length=4))
    trained = {name: weights[name].requires_grad_() for name, _ in other.named_parameters()}
    loss = loss_of(torch.func.functional_call(model, {**weights, **trained}, (IDS,), {"prefix_length": 0}))
    gradients_of = torch.autograd.grad(loss, list(trained.values()))
    causal_loss(other).backward()
    for gradient, parameter in zip(gradients_of, other.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_torch_compile_breaks_the_graph_and_computes_the_same(model: HRM) -> None:
    """Through dynamo's graph breaks, without a code generator, which not every machine has."""
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for ids in (IDS, IDS[:, :9]):
        ours, theirs = causal_loss(model, ids), causal_loss(compiled, ids)
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.slow
def test_two_processes_of_ddp_take_the_step_of_one(model: HRM, tmp_path: Path) -> None:
    """Every process has a row of the batch; the mean of their gradients is that of both rows, to rounding."""
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "support" / "ddp_rank.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=os.environ | place | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        causal_loss(model).backward()
        optimizer.step()
    both = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(both[0][name], both[1][name]), name
        # Three steps move a weight by at most 3 lr. Where a gradient is nearly nothing, rounding decides its sign.
        assert float((both[0][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name
