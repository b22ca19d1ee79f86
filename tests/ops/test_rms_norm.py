import re

import pytest
import torch
from support.emulator import counters, emulated_cuda
from support.oracle import DTYPES, bound, call, framed, listed, only_inside_written, poisoned, relative_error

from hrmcore import _C
from hrmcore.ops.rms_norm import cases, rms_norm, rms_norm_ref

pytestmark = pytest.mark.native

FLOAT32_BOUND = 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_forward_kernel(backend, dtype, index):
    case = listed(cases, dtype)[index]
    x, residual, eps = case.values()
    y, total = poisoned(*x.shape, dtype=dtype), poisoned(*x.shape, dtype=dtype)
    if residual is None:
        call(_C.rms_norm_forward, framed(x), None, y, None, eps)
        total = x
    else:
        call(_C.rms_norm_forward, framed(x), framed(residual), y, total, eps)
        assert only_inside_written(total)
        assert relative_error(total, x.double() + residual.double()) <= bound(total, FLOAT32_BOUND)
    assert only_inside_written(y)
    # The sum is rounded to its dtype before it is normalised, for that is what later readers of it see.
    assert relative_error(y, rms_norm_ref(total.double(), eps=eps)[0]) <= bound(y, FLOAT32_BOUND)


@pytest.mark.parametrize("with_grad_sum", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_backward_kernel(backend, dtype, index, with_grad_sum):
    case = listed(cases, dtype)[index]
    u, eps = case["x"], case["eps"]
    grad_y, grad_sum = torch.randn(2, *u.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_u = poisoned(*u.shape, dtype=dtype)
    call(_C.rms_norm_backward, framed(u), framed(grad_y), framed(grad_sum) if with_grad_sum else None, grad_u, eps)
    assert only_inside_written(grad_u)
    reference = u.double().requires_grad_()
    grads = grad_y.double(), grad_sum.double() * with_grad_sum
    torch.autograd.backward(rms_norm_ref(reference, eps=eps), grads, inputs=[reference])
    assert relative_error(grad_u, reference.grad) <= bound(grad_u, FLOAT32_BOUND)


@pytest.mark.parametrize("used", ["y", "sum", "both"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_autograd(with_residual, used):
    x, residual, weight = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(2))
    gradients = []
    for op, dtype in [(rms_norm, torch.float32), (rms_norm_ref, torch.float64)]:
        inputs = [t.to(dtype).requires_grad_() for t in ([x, residual] if with_residual else [x])]
        y, total = op(*inputs, eps=1e-3)
        value = {"y": y, "sum": total.square(), "both": y * total}[used]
        gradients.append(torch.autograd.grad((value * weight.to(dtype)).sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) <= 5e-7


@pytest.mark.emulated
def test_traffic_on_cuda():
    """What csrc/ops/rms_norm.cu says: inputs read twice, the second time from the cache, outputs written once."""
    x = torch.ones(16, 64)
    with emulated_cuda():
        counters()
        rms_norm(x)
        assert (counters() | {"block_barriers": 0}) == {
            "launches": 1,
            "bytes_read": 2 * x.nbytes,
            "bytes_written": x.nbytes,
            "block_barriers": 0,
            "grid_barriers": 0,
            "bytes_read_first": x.nbytes,
        }


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, "x must be float32 or bfloat16, got float64"),
        ({"x": X[0]}, "x must be of rank 2, got shape (8)"),
        ({"x": torch.ones(4, 0)}, "x must be at least one column wide"),
        ({"x": X.T}, "x must be contiguous in its last axis, got a strided view"),
        ({"x": X, "residual": X[:3]}, "residual must be of the shape of the input (4, 8), got (3, 8)"),
        ({"x": X, "residual": X.bfloat16()}, "residual must be float32, got bfloat16"),
        ({"x": X, "eps": -1e-6}, "eps must be between 0 and 1"),
        ({"x": X, "eps": float("nan")}, "eps must be between 0 and 1, got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm(**arguments)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((X[:3], None), "y must be of the shape of the input (4, 8), got (3, 8)"),
        ((X, X), "sum must be left out without a residual"),
        ((None, None), "y must be a tensor, got None"),
    ],
)
def test_bad_outputs(outputs, message):
    if outputs[0] is None:
        with pytest.raises(ValueError, match=re.escape("y must be a tensor")):
            call(_C.rms_norm_forward, X, None, None, None, 1e-6)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        call(_C.rms_norm_forward, X, None, *outputs, 1e-6)
