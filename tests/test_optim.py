"""The fused optimizers against textbook steps in float64, torch's AdamW and exact curvatures of toy models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from emulator import same_bits_for_every_schedule
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import reference_ops
from hrmcore.ops.swiglu import swiglu
from hrmcore.optim import AdamAtan2, AdamW, Sophia

PARITY = 1e-6
STEPS = 20
SHAPES = [(), (1,), (7, 33), (3, 2, 5), (40_003,)]  # the last is three blocks of work, the third ragged
BATCH_TOKENS = 50

KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SophiaG": (Sophia, {"variant": "G", "lr": 0.01, "betas": (0.9, 0.97), "rho": 0.5, "weight_decay": 0.3}),
    "AdamAtan2": (AdamAtan2, {"lr": 0.01, "weight_decay": 0.3}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-5}),
}


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
            self.p = self.p - o["lr"] * (torch.atan2(m, root) if self.kind == "AdamAtan2" else m / (root + o["eps"]))
        self.ema = o["ema"] * self.ema + (1 - o["ema"]) * self.p


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(step: int) -> list[Tensor]:
    """Of every size between 1e-5 and 1, each coordinate keeping its own, as in a model."""
    sizes = [10 ** (-5 * torch.rand(shape, generator=torch.Generator().manual_seed(9))) for shape in SHAPES]
    return [size * random(shape, 100 + step) for size, shape in zip(sizes, SHAPES, strict=True)]


def parameters() -> list[torch.nn.Parameter]:
    """Small beside what 20 steps move them, so that the error of the movement shows."""
    return [torch.nn.Parameter(random(shape, 1, 0.02)) for shape in SHAPES]


def make(kind: str, params: list[torch.nn.Parameter], **options: Any) -> Any:
    optimizer, defaults = KINDS[kind]
    return optimizer(params, **{**defaults, **options})


def take_step(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    if isinstance(optimizer, Sophia) and step % 4 == 1:
        for p, gradient in zip(params, gradients(-1 - step), strict=True):
            p.grad = gradient
        optimizer.update_hessian()
    for p, gradient in zip(params, gradients(step), strict=True):
        p.grad = gradient
    optimizer.step(**({"batch_tokens": BATCH_TOKENS} if isinstance(optimizer, Sophia) else {}))


def relative_error(out: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Of all tensors as one vector: one number alone may have cancelled to nearly nothing. A NaN counts as inf."""
    assert [x.shape for x in out] == [x.shape for x in reference]
    a, b = (torch.cat([x.detach().double().flatten() for x in side]) for side in (out, reference))
    error = (a - b).norm() / b.norm()
    return math.inf if error.isnan() else error.item()


def tensors(optimizer: Any, params: list[torch.nn.Parameter]) -> list[Tensor]:
    """Everything that an optimizer changes, copied."""
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


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
    operands = [p, torch.zeros_like(m), m.clone(), v.clone()]
    # With no gradient and a late step m halves, v stays nearly whole and nothing is left of the bias.
    _C.adam_atan2_step(*map(to_dlpack, operands), None, 1.0, 0.5, 0.999, 0.0, 0.0, 0.0, 100_000)
    angle = torch.atan2(0.5 * m.double(), (0.999 * v.double()).sqrt())
    assert ((-p.double() - angle) / angle).abs().max() <= 4e-7


def test_atan2_where_both_moments_are_zero(backend: str) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([0.0, 3.0])
    AdamAtan2([p], lr=1.0, weight_decay=0.0).step()
    assert p.tolist() == [1.0, pytest.approx(2 - math.pi / 4, abs=1e-6)]


def test_atan2_is_blind_to_the_scale_of_the_gradients() -> None:
    results = []
    for scale in (1.0, 2.0**-20):
        p = torch.nn.Parameter(random((100,), 3))
        optimizer = AdamAtan2([p])
        for step in range(5):
            p.grad = scale * random((100,), 50 + step)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_sophia_without_curvature_steps_by_the_sign(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -1e-3, 0.0, 1e-6])
    optimizer = Sophia([p], lr=0.5)
    optimizer.step(batch_tokens=1000)
    assert p.tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert optimizer.clipped_fraction == 0.75


def test_negative_curvature_steps_by_the_sign() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([p], variant="H", lr=0.25, weight_decay=0.0)
    optimizer.update_hessian(-(p**4).sum())
    assert (optimizer.state[p]["hessian"] < 0).all()
    p.grad = torch.tensor([0.1, -0.1])
    optimizer.step()
    assert p.tolist() == [0.75, 1.25]


class Toy:
    """Two layers on five samples; `loss` is smooth, so its exact Hessian can be had."""

    def __init__(self) -> None:
        self.x, self.y = random((5, 3), 11), random((5, 2), 12)
        self.start = random((3 * 4 + 4 * 2,), 13, 0.7)

    def loss(self, flat: Tensor) -> Tensor:
        x, y = self.x.to(flat.dtype), self.y.to(flat.dtype)
        a, b = flat[:12].view(3, 4), flat[12:].view(4, 2)
        return (torch.tanh(x @ a) @ b - y).square().sum()

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.start.double())


def test_hutchinson_is_u_times_hessian_u(backend: str) -> None:
    toy = Toy()
    p = torch.nn.Parameter(toy.start.clone())
    optimizer = Sophia([p], variant="H", betas=(0.9, 0.8))
    ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    expected = torch.zeros_like(toy.start, dtype=torch.float64)
    for _ in range(3):
        optimizer.update_hessian(toy.loss(p), generator=ours)
        u = torch.randn(p.shape, generator=theirs).double()
        expected = 0.8 * expected + 0.2 * u * (toy.hessian() @ u)
    assert p.grad is None
    assert relative_error([optimizer.state[p]["hessian"]], [expected]) <= 1e-6


def test_hutchinson_averages_to_the_diagonal() -> None:
    """The mean of n samples has the variance (H_ii² + Σ_j H_ij²) / n around H_ii, u being normal."""
    toy, samples = Toy(), 2000
    p = torch.nn.Parameter(toy.start.clone())
    optimizer = Sophia([p], variant="H", betas=(0.9, 0.0))  # h is the last sample
    generator = torch.Generator().manual_seed(6)
    total = torch.zeros(p.shape, dtype=torch.float64)
    for _ in range(samples):
        optimizer.update_hessian(toy.loss(p), generator=generator)
        total += optimizer.state[p]["hessian"]
    exact = toy.hessian()
    deviation = ((exact.diagonal() ** 2 + (exact**2).sum(1)) / samples).sqrt()
    z = (total / samples - exact.diagonal()) / deviation
    assert z.abs().max() < 3.5
    assert z.square().mean() < 2


def test_hutchinson_through_our_ops_needs_the_reference() -> None:
    p = torch.nn.Parameter(random((3, 8), 14))
    optimizer = Sophia([p], variant="H")
    with reference_ops():
        optimizer.update_hessian(swiglu(p).square().sum())
    assert optimizer.state[p]["hessian"].abs().max() > 0
    before = optimizer.state[p]["hessian"].clone()
    with pytest.raises(RuntimeError, match="swiglu_backward"):
        optimizer.update_hessian(swiglu(p).square().sum())
    assert torch.equal(optimizer.state[p]["hessian"], before)


def test_hutchinson_starts_what_was_frozen_and_leaves_the_unused() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(2))
    optimizer = Sophia([used, unused], variant="H", betas=(0.9, 0.5))
    used.requires_grad_()
    unused.requires_grad_()
    optimizer.update_hessian((used**2).sum(), generator=torch.Generator().manual_seed(1))
    u = torch.randn(2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(optimizer.state[used]["hessian"], 0.5 * 2 * u**2, rtol=1e-6)
    assert not optimizer.state[unused]


def sampled_gradient(weight: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the mean loss of labels that the model draws for itself."""
    logits = x @ weight.T
    labels = torch.multinomial(logits.softmax(-1).detach(), 1, generator=generator).squeeze(1)
    return torch.autograd.grad(F.cross_entropy(logits, labels), weight)[0]


def test_gauss_newton_bartlett_is_the_squared_gradient(backend: str) -> None:
    x, p = random((8, 3), 15), torch.nn.Parameter(random((5, 3), 16))
    optimizer = Sophia([p], betas=(0.9, 0.8))
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for _ in range(3):
        p.grad = sampled_gradient(p, x, ours)
        optimizer.update_hessian()
        expected = (
            0.8 * expected + 0.2 * sampled_gradient(p.detach().double().requires_grad_(), x.double(), theirs) ** 2
        )
    assert relative_error([optimizer.state[p]["hessian"]], [expected]) <= 1e-6


def test_batch_tokens_times_h_averages_to_the_gauss_newton_diagonal() -> None:
    """For logits that are linear in the weights the Gauss-Newton matrix is the Hessian: B·E[ĝ²] is its diagonal."""
    tokens, samples = 8, 2000
    x, p = random((tokens, 3), 15), torch.nn.Parameter(random((5, 3), 16))
    optimizer = Sophia([p], betas=(0.9, 0.0))
    generator = torch.Generator().manual_seed(8)
    drawn = []
    for _ in range(samples):
        p.grad = sampled_gradient(p, x, generator)
        optimizer.update_hessian()
        drawn.append(tokens * optimizer.state[p]["hessian"].double().flatten())
    labels = torch.zeros(tokens, dtype=torch.long)  # the Hessian of a linear softmax does not depend on them
    hessian = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(x.double() @ w.view(5, 3).T, labels), p.detach().double().flatten()
    )
    sample = torch.stack(drawn)
    z = (sample.mean(0) - hessian.diagonal()) / (sample.std(0) / samples**0.5)
    assert z.abs().max() < 3.5
    assert z.square().mean() < 2


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_state_dict_changes_no_bit(kind: str) -> None:
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
def test_distributed_checkpoint_finds_the_state_of_a_fresh_optimizer(kind: str) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_parameters_take_the_same_steps(kind: str, one_process: DeviceMesh) -> None:
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


def test_hutchinson_refuses_shards(one_process: DeviceMesh) -> None:
    model = fully_shard(torch.nn.Linear(2, 2), mesh=one_process)
    with pytest.raises(ValueError, match="variant H needs whole parameters"):
        Sophia(model.parameters(), variant="H").update_hessian(model(torch.ones(1, 2)).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_gradient_is_left_alone(kind: str) -> None:
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


def test_a_frozen_parameter_has_state_only_once_it_is_trained() -> None:
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
def test_the_ema_can_stand_in_for_the_weights(kind: str) -> None:
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
        (torch.ones(2, 3, device="meta"), "parameter 1 must be on the CPU, got meta"),
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
def test_a_bad_gradient_changes_nothing(kind: str) -> None:
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


def test_a_state_of_another_shape_is_named() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2)), p])
    optimizer.state[p]["exp_avg"] = torch.zeros(5)
    p.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"parameter 1: adam_step: exp_avg must be of the shape of param \(4\), got \(5\)"
    ):
        optimizer.step()


def test_misuse_of_sophia() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    g, h = Sophia([p]), Sophia([p], variant="H")
    for tokens in (None, 0):
        with pytest.raises(ValueError, match=rf"step\(batch_tokens=n\) must be at least 1 for variant G, got {tokens}"):
            g.step(batch_tokens=tokens)
    with pytest.raises(ValueError, match="batch_tokens is for variant G only"):
        h.step(batch_tokens=4)
    with pytest.raises(ValueError, match="takes the loss for variant H"):
        h.update_hessian()
    with pytest.raises(ValueError, match="nothing for variant G"):
        g.update_hessian(p.sum())
    with pytest.raises(ValueError, match="no second derivative"):
        h.update_hessian(p.sum())
    assert math.isnan(g.clipped_fraction)


def test_closure_and_schedule() -> None:
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
