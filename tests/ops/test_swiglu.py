import re

import pytest
import torch
from support.oracle import DTYPES, call, framed, listed, only_inside_written, poisoned

from hrmcore import _C
from hrmcore.ops.swiglu import cases, swiglu

pytestmark = pytest.mark.native

FLOAT32_BOUND = 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_backward_kernel_with_the_product(backend, dtype, index):
    """The product of forward again, its bits, also in the place of its gradient; the other gradients stay the same."""
    ab = listed(cases, dtype)[index]["ab"]
    y, again = (poisoned(ab.shape[0], ab.shape[1] // 2, dtype=dtype) for _ in range(2))
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = [poisoned(*ab.shape, dtype=dtype) for _ in range(3)]
    call(_C.swiglu_forward, framed(ab), y)
    call(_C.swiglu_backward, framed(ab), framed(grad_y), grads[0], None)
    call(_C.swiglu_backward, framed(ab), framed(grad_y), grads[1], again)
    in_place = framed(grad_y)
    call(_C.swiglu_backward, framed(ab), in_place, grads[2], in_place)
    assert only_inside_written(again)
    assert only_inside_written(grads[1])
    assert torch.equal(again, y)
    assert torch.equal(in_place, y)
    assert torch.equal(grads[1], grads[0])
    assert torch.equal(grads[2], grads[0])


def test_saturated_gates(backend):
    """Far from zero the gate is 0 or the identity: no overflow, no NaN."""
    ab = torch.tensor([[-1e30, -300.0, -90.0, 0.0, 90.0, 300.0, 1e30] + 7 * [1.0]], requires_grad=True)
    y = swiglu(ab)
    assert torch.allclose(y, torch.tensor([[0.0, 0.0, 0.0, 0.0, 90.0, 300.0, 1e30]]), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert torch.allclose(ab.grad[0, :7], torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), rtol=1e-6, atol=1e-6)


def test_nan_is_passed_on(backend):
    assert swiglu(torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("ab", "message"),
    [
        (torch.ones(4, 8).double(), "ab must be float32 or bfloat16, got float64"),
        (torch.ones(8), "ab must be of rank 2, got shape (8)"),
        (torch.ones(4, 7), "ab must be an even number of columns wide (2F), at least 2, got 7"),
        (torch.ones(4, 0), "ab must be an even number of columns wide (2F), at least 2, got 0"),
        (torch.ones(8, 4).T, "ab must be contiguous in its last axis"),
    ],
)
def test_bad_input(ab, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        swiglu(ab)


def test_bad_output():
    with pytest.raises(ValueError, match=re.escape("y must be of size 4 (F) in axis 1, got shape (3, 8)")):
        call(_C.swiglu_forward, torch.ones(3, 8), torch.ones(3, 8))
