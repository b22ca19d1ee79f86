"""Sophia's curvature against exact Hessians of toy models, and what it steps by where there is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.emulator import same_bits_for_every_schedule
from support.optimizers import random, relative_error
from torch import Tensor

from hrmcore.ops.backend import reference_ops
from hrmcore.ops.swiglu import swiglu
from hrmcore.optim import Sophia

pytestmark = pytest.mark.native


def test_sophia_without_curvature_steps_by_the_sign(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -1e-3, 0.0, 1e-6])
    optimizer = Sophia([p], lr=0.5)
    optimizer.step(batch_tokens=1000)
    assert p.tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert optimizer.clipped_fraction == 0.75


def test_negative_curvature_steps_by_the_sign(processor: str) -> None:
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


def test_hutchinson_starts_what_was_frozen_and_leaves_the_unused(processor: str) -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(2))
    optimizer = Sophia([used, unused], variant="H", betas=(0.9, 0.5))
    used.requires_grad_()
    unused.requires_grad_()
    optimizer.update_hessian((used**2).sum(), generator=torch.Generator().manual_seed(1))
    u = torch.randn(2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(optimizer.state[used]["hessian"], 0.5 * 2 * u**2, rtol=1e-6)
    assert not optimizer.state[unused]


def sampled_gradient(weight: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the mean loss of labels that the model draws for itself, in float32 whatever the dtype."""
    logits = x @ weight.T
    labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator).squeeze(1)
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


def test_misuse_of_sophia(processor: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    g, h = Sophia([p]), Sophia([p], variant="H")
    with pytest.raises(ValueError, match=r"variant G needs batch_tokens: Sophia\(batch_tokens=n\), or step\("):
        g.step()
    with pytest.raises(ValueError, match="batch_tokens must be at least 1 for variant G, got 0"):
        g.step(batch_tokens=0)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1 for variant G, got 0"):
        Sophia([p], batch_tokens=0)
    with pytest.raises(ValueError, match="batch_tokens is for variant G only"):
        Sophia([p], variant="H", batch_tokens=4)
    with pytest.raises(ValueError, match="batch_tokens is for variant G only"):
        h.step(batch_tokens=4)
    with pytest.raises(ValueError, match="takes the loss for variant H"):
        h.update_hessian()
    with pytest.raises(ValueError, match="nothing for variant G"):
        g.update_hessian(p.sum())
    with pytest.raises(ValueError, match="no second derivative"):
        h.update_hessian(p.sum())
    assert math.isnan(g.clipped_fraction)


@pytest.mark.emulated
def test_same_curvature_for_every_schedule() -> None:
    def compute() -> list[Tensor]:
        params = [torch.nn.Parameter(random((n,), n)) for n in (1, 300, 5000)]
        optimizer = Sophia(params, betas=(0.9, 0.5))
        for p in params:
            p.grad = random(p.shape, 7)
        optimizer.update_hessian()
        return [optimizer.state[p]["hessian"] for p in params]

    assert same_bits_for_every_schedule(compute)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e25])  # the square of the last is too large
def test_a_sample_that_is_not_finite_changes_nothing(value: float, backend: str) -> None:
    sound, faulty = (torch.nn.Parameter(torch.ones(40)) for _ in range(2))
    optimizer = Sophia([sound, faulty], betas=(0.9, 0.5))
    for p in (sound, faulty):
        p.grad = torch.full((40,), 2.0)
    optimizer.update_hessian()
    assert faulty.grad is not None
    faulty.grad[17] = value
    with pytest.raises(FloatingPointError, match="the curvature sample is not finite in parameter 1"):
        optimizer.update_hessian()
    for p in (sound, faulty):
        assert torch.equal(optimizer.state[p]["hessian"], torch.full((40,), 2.0))
        p.grad = torch.full((40,), 0.1)
    optimizer.step(batch_tokens=1)
    assert torch.isfinite(faulty).all()


def test_a_hutchinson_sample_that_is_not_finite_changes_nothing() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = Sophia([p], variant="H")
    optimizer.update_hessian((p**2).sum())
    before = optimizer.state[p]["hessian"].clone()
    with pytest.raises(FloatingPointError, match="the curvature sample is not finite in parameter 0"):
        optimizer.update_hessian((p**1.5).sum())  # its second derivative at 0 is infinite
    assert torch.equal(optimizer.state[p]["hessian"], before)
    assert p.tolist() == [1.0, 0.0]
