"""The steps of the fused optimizers against the textbook in float64 and torch's AdamW; what they keep, and refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.emulator import same_bits_for_every_schedule
from support.optimizers import (
    BATCH_TOKENS,
    KINDS,
    gradients,
    make,
    parameters,
    random,
    relative_error,
    take_step,
    tensors,
)
from support.runs import needs_shard_files
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from hrmcore import _C
from hrmcore.optim import AdamAtan2, AdamW, Sophia

pytestmark = pytest.mark.native

PARITY = 1e-6
STEPS = 20


class Textbook:
    """One parameter's steps in float64, operation by operation as the papers write them."""

    def __init__(self, kind: str, parameter: Tensor, options: dict[str, Any]) -> None:
        self.kind, self.options, self.steps = kind, options, 0
        self.p = parameter.detach().double().clone()
        self.first, self.second = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.ema = self.p.clone()
        self.ratio = torch.zeros_like(self.p)

    def curvature(self, gradient: Tensor) -> None:
        beta2 = self.options["betas"][1]
        self.second = beta2 * self.second + (1 - beta2) * gradient.double() ** 2

    def step(self, gradient: Tensor) -> None:
        g, o = gradient.double(), self.options
        beta1, beta2 = o["betas"]
        self.steps += 1
        self.first = beta1 * self.first + (1 - beta1) * g
        self.p = self.p - o["lr"] * o["weight_decay"] * self.p
        if self.kind == "SophiaG":
            self.ratio = self.first / (o["rho"] * BATCH_TOKENS * self.second).clamp(min=1e-12)
            self.p = self.p - o["lr"] * self.ratio.clamp(-1, 1)
        else:
            self.second = beta2 * self.second + (1 - beta2) * g**2
            m, root = self.first / (1 - beta1**self.steps), (self.second / (1 - beta2**self.steps)).sqrt()
            if self.kind == "AdamAtan2":  # as HRM-Text's trainer takes it: models/adam_atan2.py there
                self.p = self.p - o["lr"] / (1 - beta1**self.steps) * torch.atan2(self.first, root)
            else:
                self.p = self.p - o["lr"] * (m / (root + o["eps"]) if self.kind == "AdamW" else torch.atan2(m, root))
        self.ema = o["ema"] * self.ema + (1 - o["ema"]) * self.p


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_the_textbook(backend: str, kind: str) -> None:
    params = parameters()
    optimizer = make(kind, params, ema=0.95)
    books = [Textbook(kind, p, optimizer.param_groups[0]) for p in params]
    second = "hessian" if kind == "SophiaG" else "exp_avg_sq"
    for step in range(STEPS):
        if kind == "SophiaG" and step % 4 == 1:
            for book, gradient in zip(books, gradients(-1 - step), strict=True):
                book.curvature(gradient)
        for book, gradient in zip(books, gradients(step), strict=True):
            book.step(gradient)
        take_step(optimizer, params, step)
    states = [optimizer.state[p] for p in params]
    assert [state["step"].item() for state in states] == [STEPS] * len(params)
    assert relative_error(params, [book.p for book in books]) <= PARITY
    assert relative_error([s["exp_avg"] for s in states], [book.first for book in books]) <= PARITY
    assert relative_error([s[second] for s in states], [book.second for book in books]) <= PARITY
    assert relative_error([s["ema"] for s in states], [book.ema for book in books]) <= PARITY
    if kind == "SophiaG":
        ratios = torch.cat([book.ratio.abs().flatten() for book in books])
        low, high = ((ratios > 1 + margin).double().mean().item() for margin in (1e-5, -1e-5))
        assert low <= optimizer.clipped_fraction <= high
        assert 0.1 < low < 0.9  # so both sides of the clip were tested


def test_adamw_is_torchs(backend: str) -> None:
    params = parameters()
    theirs = [torch.nn.Parameter(p.detach().double()) for p in params]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, oracle = AdamW(params, **options), torch.optim.AdamW(theirs, **options)
    for step in range(STEPS):
        for p, gradient in zip(theirs, gradients(step), strict=True):
            p.grad = gradient.double()
        oracle.step()
        take_step(optimizer, params, step)
    assert relative_error(params, theirs) <= PARITY


def test_the_angle_is_exact_everywhere(backend: str) -> None:
    """Every ratio of the moments from 1e-12 to 1e12, both signs: the angle to 4e-7 of itself."""
    exponents = torch.linspace(-6, 6, 40)
    m, root = (10 ** torch.cartesian_prod(exponents, exponents)).T.contiguous()
    m, v = torch.cat([m, -m]), torch.cat([root, root]) ** 2
    p = torch.zeros_like(m)
    # With no gradient and a late step m halves, v stays nearly whole and nothing is left of the bias.
    angle = torch.atan2(0.5 * m.double(), (0.999 * v.double()).sqrt())
    for step in (_C.adam_atan2_step, _C.adam_atan2_paper_step):
        operands = [[x] for x in (p.zero_(), torch.zeros_like(m), m.clone(), v.clone(), None)]
        step([0], *operands, [100_000], 1.0, 0.5, 0.999, 0.0, 0.0, 0.0, None)
        assert ((-p.double() - angle) / angle).abs().max() <= 4e-7


def test_atan2_where_both_moments_are_zero(backend: str) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([0.0, 3.0])
    AdamAtan2([p], lr=1.0, weight_decay=0.0, form="paper").step()
    assert p.tolist() == [1.0, pytest.approx(2 - math.pi / 4, abs=1e-6)]
    AdamAtan2([p], lr=1.0, weight_decay=0.0).step()
    assert p.tolist() == [1.0, pytest.approx(2 - math.pi / 4 - math.atan(0.1) / 0.1, abs=1e-6)]


def test_atan2_is_blind_to_the_scale_of_the_gradients(processor: str) -> None:
    results = []
    for scale in (1.0, 2.0**-20):
        p = torch.nn.Parameter(random((100,), 3))
        optimizer = AdamAtan2([p])
        for step in range(5):
            p.grad = scale * random((100,), 50 + step)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_many_parameters_in_one_call_are_as_each_alone(backend: str, kind: str) -> None:
    """More than a launch takes, one empty, two groups; every third has no gradient in the first step."""
    shapes = [(0,) if i == 60 else (1 + i % 7, 1 + i * i % 23) for i in range(110)] + [(16_385,)]
    together, alone = ([torch.nn.Parameter(random(s, i)) for i, s in enumerate(shapes)] for _ in range(2))
    optimizer = make(kind, [{"params": together[:70]}, {"params": together[70:], "lr": 0.02}], ema=0.9)
    optimizers = [make(kind, [p], ema=0.9, lr=0.01 if i < 70 else 0.02) for i, p in enumerate(alone)]
    tokens = {"batch_tokens": BATCH_TOKENS} if kind == "SophiaG" else {}
    for step in range(3):
        for params in (together, alone):
            for i, p in enumerate(params):
                p.grad = None if step == 0 and i % 3 == 0 else random(p.shape, 1000 * step + i)
        for each in (optimizer, *optimizers):
            if kind == "SophiaG" and step == 1:
                each.update_hessian()
            each.step(**tokens)
    ours = tensors(optimizer, together)
    theirs = [t for each, p in zip(optimizers, alone, strict=True) for t in tensors(each, [p])]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {2, 3}
    if kind == "SophiaG":
        fractions = [(each.clipped_fraction, p.numel()) for each, p in zip(optimizers, alone, strict=True)]
        clipped = sum(fraction * count for fraction, count in fractions if count)
        assert 0 < clipped < 16_385
        assert optimizer.clipped_fraction * sum(count for _, count in fractions) == pytest.approx(clipped, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_scaled_on_the_way(backend: str, kind: str) -> None:
    """By a power of two, which rounds nothing: the same bits as from gradients that were scaled before."""
    states = []
    for scaled in (False, True):
        params = parameters()
        optimizer = make(kind, params, ema=0.5)
        for p, gradient in zip(params, gradients(0), strict=True):
            p.grad = gradient if scaled else 0.25 * gradient
        scale = {"grad_scale": torch.tensor([0.25])} if scaled else {}
        optimizer.step(**scale | ({"batch_tokens": BATCH_TOKENS} if isinstance(optimizer, Sophia) else {}))
        states.append([*params, *(x for p in params for x in optimizer.state[p].values())])
        if scaled:
            assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients(0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_wrong_scale_is_refused() -> None:
    params = parameters()
    optimizer = make("AdamW", params)
    params[0].grad = torch.zeros_like(params[0])
    for wrong in (torch.ones(2), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="grad_scale must be"):
            optimizer.step(grad_scale=wrong)


def test_lists_of_other_lengths_are_refused() -> None:
    one = [torch.ones(2)]
    with pytest.raises(ValueError, match="sophia_curvature: probe must be a list of 1, got 2"):
        _C.sophia_curvature([0], one, one + one, one, 0.9)
    with pytest.raises(ValueError, match="adamw_step: steps must be a list of 1, got 0"):
        _C.adamw_step([0], one, one, one, one, [None], [], 0.1, 0.9, 0.9, 0.0, 1e-8, 0.0, None)
    with pytest.raises(ValueError, match="parameter 7: adam_step: grad must be a tensor, got None"):
        _C.adamw_step([7], one, [None], one, one, [None], [1], 0.1, 0.9, 0.9, 0.0, 1e-8, 0.0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_state_dict_changes_no_bit(processor: str, kind: str) -> None:
    params = parameters()
    optimizer = make(kind, params, ema=0.99)
    for step in range(3):
        take_step(optimizer, params, step)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(kind, resumed_params, lr=0.5, ema=0.5)  # the saved options win
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        take_step(optimizer, params, step)
        take_step(resumed, resumed_params, step)
    pairs = zip(tensors(optimizer, params), tensors(resumed, resumed_params), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_finds_the_state_of_a_fresh_optimizer(processor: str, kind: str) -> None:
    torch.manual_seed(0)
    model, fresh = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    optimizer, other = (make(kind, list(m.parameters()), ema=0.99) for m in (model, fresh))
    assert "state" in get_optimizer_state_dict(fresh, other)  # the template that a load fills; it takes no step
    assert all(state["step"] == 0 for state in other.state.values())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
    set_optimizer_state_dict(fresh, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@needs_shard_files
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_parameters_take_the_same_steps(processor: str, kind: str, one_process: DeviceMesh) -> None:
    def weights_after_steps(sharded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 7)
        if sharded:
            fully_shard(model, mesh=one_process)
        optimizer = make(kind, list(model.parameters()), ema=0.9)
        for _ in range(3):
            model(random((4, 5), 17)).square().sum().backward()
            if kind == "SophiaG":
                optimizer.update_hessian()
            optimizer.step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
            optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizer)["state"]["weight"]
        assert all(isinstance(state[key], DTensor) == sharded for key in state if key != "step")
        changed = [*model.parameters(), *(state[key] for key in state)]
        return [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in changed]

    pairs = zip(weights_after_steps(sharded=False), weights_after_steps(sharded=True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_shard_files
def test_hutchinson_refuses_shards(one_process: DeviceMesh) -> None:
    model = fully_shard(torch.nn.Linear(2, 2), mesh=one_process)
    with pytest.raises(ValueError, match="variant H needs whole parameters"):
        Sophia(model.parameters(), variant="H").update_hessian(model(torch.ones(1, 2)).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_gradient_is_left_alone(processor: str, kind: str) -> None:
    params = parameters()
    optimizer = make(kind, params, ema=0.9)
    take_step(optimizer, params, 0)
    before = tensors(optimizer, params[2:3])
    for p in params:
        p.grad = torch.ones_like(p)
    params[2].grad = None
    if kind == "SophiaG":
        optimizer.update_hessian()
    optimizer.step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer, params[2:3]), strict=True))
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2, 1, 2, 2]


def test_a_frozen_parameter_has_state_only_once_it_is_trained(processor: str) -> None:
    p = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = AdamW([p], ema=0.9)
    assert not optimizer.state[p]
    p.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "ema"}


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(backend: str, kind: str) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        _C.set_num_threads(threads)
        params = parameters()
        optimizer = make(kind, params, ema=0.99)
        for step in range(3):
            take_step(optimizer, params, step)
        results.append([*tensors(optimizer, params), torch.tensor(getattr(optimizer, "clipped_fraction", 0.0))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.emulated
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_every_schedule(kind: str) -> None:
    def compute() -> list[Tensor]:
        params = parameters()
        optimizer = make(kind, params, ema=0.99)
        for step in range(2):
            take_step(optimizer, params, step)
        return [*tensors(optimizer, params), torch.tensor(getattr(optimizer, "clipped_fraction", 0.0))]

    assert same_bits_for_every_schedule(compute)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 16_384, 16_385])
def test_nothing_is_written_around_a_parameter(backend: str, kind: str, size: int) -> None:
    buffer = torch.full((size + 8,), 0.6875)
    p = torch.nn.Parameter(buffer[3 : 3 + size])
    assert p.data_ptr() == buffer[3:].data_ptr()
    p.grad = torch.ones(size)
    make(kind, [p]).step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
    assert (p != 0.6875).all()
    assert (buffer[:3] == 0.6875).all()
    assert (buffer[3 + size :] == 0.6875).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_nan_is_passed_on(backend: str, kind: str, where: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = make(kind, [p])
    p.grad = torch.ones(3)
    if where == "gradient":
        p.grad[1] = torch.nan
    else:
        optimizer.state[p]["hessian" if kind == "SophiaG" else "exp_avg_sq"][1] = torch.nan
    optimizer.step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
    assert p.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ema_can_stand_in_for_the_weights(processor: str, kind: str) -> None:
    params = parameters()
    optimizer = make(kind, params, ema=0.5)
    with torch.no_grad():
        params[0].fill_(7.0)  # weights loaded after the optimizer was made: the EMA starts from these
    for p, gradient in zip(params[:-1], gradients(0), strict=False):
        p.grad = gradient
    optimizer.step(**({"batch_tokens": 5} if kind == "SophiaG" else {}))
    assert optimizer.state[params[0]]["ema"].item() == pytest.approx((7.0 + params[0].item()) / 2)
    before = tensors(optimizer, params)
    averages = [optimizer.state[p]["ema"].clone() for p in params[:-1]] + [params[-1].detach().clone()]
    seen = []

    def export() -> None:
        with optimizer.swap_ema():
            seen.extend(p.detach().clone() for p in params)
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        export()
    assert all(torch.equal(a, b) for a, b in zip(seen, averages, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer, params), strict=True))


def test_no_ema_to_swap() -> None:
    with pytest.raises(ValueError, match="keeps no EMA"), AdamW(parameters()).swap_ema():
        pass


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (kind, *case)
        for kind in KINDS
        for case in [
            ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
            ({"lr": math.nan}, "lr must be at least 0, got nan"),
            ({"lr": "fast"}, "lr must be at least 0, got 'fast'"),
            ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
            ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
            ({"betas": (-0.1, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
            ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
            ({"ema": 1.0}, r"ema must be None or in \[0, 1\), got 1.0"),
        ]
    ]
    + [
        ("SophiaG", {"rho": 0.0}, "rho must be above 0, got 0.0"),
        ("SophiaG", {"eps": 0.0}, "eps must be at least 1e-30, got 0.0"),
        ("SophiaG", {"variant": "g"}, "variant must be 'G' or 'H', got 'g'"),
        ("AdamAtan2", {"form": "nature"}, "form must be 'hrm-text' or 'paper', got 'nature'"),
        ("AdamW", {"eps": 0.0}, "eps must be at least 1e-30, got 0.0"),
    ],
)
def test_bad_options(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, parameters(), **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bfloat16), "parameter 1 must be float32, got torch.bfloat16"),
        (torch.ones(3, 2).T, r"parameter 1 must be contiguous, got shape \(2, 3\) with strides \(1, 2\)"),
        (torch.ones(2, 3, device="meta"), "parameter 1 must be on the CPU or CUDA, got meta"),
    ],
)
def test_bad_parameters(bad: Tensor, message: str) -> None:
    good = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        AdamW([good, torch.nn.Parameter(bad)])
    optimizer = AdamW([good])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(bad)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.0})


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_changes_nothing(processor: str, kind: str) -> None:
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3, 2))]
    optimizer = make(kind, params)
    step = (lambda: optimizer.step(batch_tokens=5)) if kind == "SophiaG" else optimizer.step
    params[0].grad = torch.ones(4)
    params[1].grad = torch.ones(2, 3).T
    with pytest.raises(ValueError, match="the gradient of parameter 1 must be contiguous"):
        step()
    params[1].grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match="the gradient of parameter 1 must be dense"):
        step()
    params[1].grad = None
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be at least 0"):
        step()
    assert (params[0] == 1).all()
    assert optimizer.state[params[0]]["step"] == 0


def test_a_state_of_another_shape_is_named(processor: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2)), p])
    optimizer.state[p]["exp_avg"] = torch.zeros(5)
    p.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"parameter 1: adam_step: exp_avg must be of the shape of param \(4\), got \(5\)"
    ):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0


def test_closure_and_schedule(processor: str) -> None:
    """The protocol of torch.optim: a closure is run with gradients on, a scheduler sets the learning rate."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([p], lr=0.5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure, batch_tokens=3).item() == 2
    schedule.step()
    optimizer.step(closure, batch_tokens=3)
    assert p.tolist() == [0.25, 0.25]


def own_tokens(kind: str) -> dict[str, Any]:
    return {"batch_tokens": BATCH_TOKENS} if kind == "SophiaG" else {}


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine after warm-up": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 5)], [3]
    ),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=10),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch_set_the_rate_of_a_step_without_arguments(name: str, kind: str) -> None:
    """The weights are, to the bit, those of steps whose options were set by hand."""
    scheduled, by_hand = parameters(), parameters()
    optimizer, other = make(kind, scheduled, **own_tokens(kind)), make(kind, by_hand)
    schedule = SCHEDULES[name](optimizer)
    rates = set()
    for step in range(8):
        for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            theirs.update(lr=ours["lr"], betas=ours["betas"])
            rates.add(ours["lr"])
        for p, gradient in zip(scheduled, gradients(step), strict=True):
            p.grad = gradient
        optimizer.step()
        schedule.step()
        for p, gradient in zip(by_hand, gradients(step), strict=True):
            p.grad = gradient
        other.step(**own_tokens(kind))
    assert len(rates) > 5
    assert all(map(torch.equal, scheduled, by_hand))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_by_torch_conventions(kind: str) -> None:
    """A closure, a gradient scaler, a copy through its state and a schedule on a plateau need nothing of their own."""
    params = parameters()
    optimizer = make(kind, params, **own_tokens(kind))
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(sum(p.square().sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    again = make(kind, params, **own_tokens(kind))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    norm = params[0].detach().square().sum()
    assert again.step(lambda: params[0].detach().square().sum()) == norm
