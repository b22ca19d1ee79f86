import re

import pytest
import torch
from support.emulator import counters, emulated_cuda
from support.oracle import DTYPES, bound, call, framed, listed, only_inside_written, poisoned, relative_error

from hrmcore import _C
from hrmcore.ops.rms_norm import rms_norm, rms_norm_ref
from hrmcore.ops.rms_norm_inject import (
    _rms_norm_inject,
    _rms_norm_inject_backward,
    cases,
    rms_norm_inject,
    rms_norm_inject_ref,
)

pytestmark = pytest.mark.native

FLOAT32_BOUND = 2e-7


def exact_scale(x, residual, eps):
    u = x.double() + residual.double()
    return (u.square().mean(-1) + eps).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_forward_kernel(backend, dtype, index):
    x, residual, injection, eps = listed(cases, dtype)[index].values()
    state, y, total = (poisoned(*x.shape, dtype=dtype) for _ in range(3))
    scale = torch.full((len(x),), torch.nan)
    call(_C.rms_norm_inject_forward, framed(x), framed(residual), framed(injection), state, y, total, scale, eps)
    assert all(only_inside_written(out) for out in (state, y, total))
    assert relative_error(state, rms_norm_ref(x.double(), residual.double(), eps)[0]) <= bound(state, FLOAT32_BOUND)
    assert relative_error(scale, exact_scale(x, residual, eps)) <= 2 * FLOAT32_BOUND
    # State and sum are rounded to their dtype before they are used, for that is what later readers of them see.
    assert relative_error(total, state.double() + injection.double()) <= bound(total, FLOAT32_BOUND)
    assert relative_error(y, rms_norm_ref(total.double(), eps=eps)[0]) <= bound(y, FLOAT32_BOUND)


@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_the_bits_of_the_norms_that_it_joins(backend, index):
    x, residual, injection, eps = listed(cases, torch.float32)[index].values()
    state = rms_norm(x, residual, eps)[0]
    apart = state, *rms_norm(state, injection, eps)
    for joined, alone in zip(rms_norm_inject(x, residual, injection, eps), apart, strict=True):
        assert torch.equal(joined, alone)


@pytest.mark.parametrize("used", ["y", "state", "sum", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_backward_kernel(backend, dtype, index, used):
    """Of a state and a sum that were rounded: their gradients are those of the norms at these very numbers."""
    x, residual, injection, eps = listed(cases, dtype)[index].values()
    state, _ = rms_norm_ref(x, residual, eps)
    total, scale = state + injection, exact_scale(x, residual, eps).float()
    grad_state, grad_y, grad_sum = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = [framed(g) if used in (name, "all") else None for g, name in ((grad_state, "state"), (grad_sum, "sum"))]
    grad_u, grad_injection = poisoned(*x.shape, dtype=dtype), poisoned(*x.shape, dtype=dtype)
    for written in (grad_injection, None):
        operands = framed(state), framed(total), scale, given[0], framed(grad_y), given[1], grad_u, written, eps
        call(_C.rms_norm_inject_backward, *operands)
        assert only_inside_written(grad_u)
        exact = total.double().requires_grad_()
        torch.autograd.backward(rms_norm_ref(exact, eps=eps)[0], grad_y.double())
        to_injection = exact.grad + (0 if given[1] is None else grad_sum.double())
        g = to_injection + (0 if given[0] is None else grad_state.double())
        to_u = scale.double()[:, None] * (g - state.double() * (g * state.double()).mean(-1, keepdim=True))
        assert relative_error(grad_u, to_u) <= bound(grad_u, FLOAT32_BOUND)
        grad_u.fill_(torch.nan)
    assert only_inside_written(grad_injection)
    assert relative_error(grad_injection, to_injection) <= bound(grad_injection, FLOAT32_BOUND)


NEEDED = [(True, True, True), (True, True, False), (False, False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", ["state", "y", "sum", "all"])
@pytest.mark.parametrize("needed", NEEDED)
def test_autograd(backend, dtype, used, needed):
    numbers = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = []
    for op, precision in [(rms_norm_inject, dtype), (rms_norm_inject_ref, torch.float64)]:
        inputs = [x.to(precision).requires_grad_(need) for x, need in zip(numbers, needed, strict=True)]
        state, y, total = op(*inputs, eps=1e-3)
        value = {"state": state**3, "y": y**3, "sum": total.square(), "all": state * y * total}[used]
        value = value + total  # so that no input is without gradient
        gradients.append(torch.autograd.grad(value.sum(), [x for x in inputs if x.requires_grad]))
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_nothing_is_written_for_an_injection_without_gradient():
    x, residual, injection = torch.randn(3, 5, 12).unbind()
    state, _, total, scale = _rms_norm_inject(x, residual, injection, 1e-6)
    grad, none = _rms_norm_inject_backward(state, total, scale, None, x, None, 1e-6, False)
    assert none.numel() == 0
    both = _rms_norm_inject_backward(state, total, scale, None, x, None, 1e-6, True)
    assert both[1].shape == x.shape
    assert torch.equal(grad, both[0])


@pytest.mark.emulated
def test_traffic_on_cuda():
    """What csrc/ops/rms_norm.h says: memory sees every operand once, forward and backward."""
    x = torch.ones(16, 64)
    scales = 4 * len(x)
    state, _, total, scale = _rms_norm_inject(x, x, x, 1e-6)
    with emulated_cuda():
        counters()
        _rms_norm_inject(x, x.clone(), x.clone(), 1e-6)
        forward = counters()
        _rms_norm_inject_backward(state, total, scale, x, x.clone(), x.clone(), 1e-6, True)
        backward = counters()
    # The sum is written and read again by the thread that wrote it: a cell's first read, but not from memory.
    assert forward["bytes_read_first"] == 3 * x.nbytes + x.nbytes
    assert forward["bytes_written"] == 3 * x.nbytes + scales
    assert backward["bytes_read_first"] == 5 * x.nbytes + scales
    assert backward["bytes_written"] == 2 * x.nbytes
    assert forward["launches"] == backward["launches"] == 1


@pytest.mark.inside_torch
def test_opcheck():
    x, residual, injection = torch.randn(3, 5, 12).unbind()
    for needed in ((x, residual, injection), (x, residual), (injection,)):
        inputs = [t.clone().requires_grad_(any(t is n for n in needed)) for t in (x, residual, injection)]
        torch.library.opcheck(_rms_norm_inject, (*inputs, 1e-6))
    state, _, total, scale = _rms_norm_inject(x, residual, injection, 1e-6)
    for to_injection, optional in ((True, x), (False, None)):
        grads = (optional, residual, optional)
        torch.library.opcheck(_rms_norm_inject_backward, (state, total, scale, *grads, 1e-6, to_injection))


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, "x must be float32 or bfloat16, got float64"),
        ({"x": X[0]}, "x must be of rank 2, got shape (8)"),
        ({"residual": X[:3]}, "residual must be of the shape of the input (4, 8), got (3, 8)"),
        ({"injection": X.bfloat16()}, "injection must be float32, got bfloat16"),
        ({"injection": X.T.contiguous().T}, "injection must be contiguous in its last axis, got a strided view"),
        ({"injection": X[:3]}, "injection must be of the shape of the input (4, 8), got (3, 8)"),
        ({"eps": float("nan")}, "eps must be between 0 and 1, got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm_inject(**({"x": X, "residual": X, "injection": X} | arguments))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), "scale must be of size 4 (T) in axis 0, got shape (3)"),
        (torch.ones(4, dtype=torch.bfloat16), "scale must be float32, got bfloat16"),
        (torch.ones(4, 1), "scale must be of rank 1"),
    ],
)
def test_bad_scale(scale, message):
    for kernel, operands in (
        (_C.rms_norm_inject_forward, (X, X, X, X, X, X, scale, 1e-6)),
        (_C.rms_norm_inject_backward, (X, X, scale, None, X, None, X, None, 1e-6)),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(kernel, *operands)
