"""What backward computes again: the same bits whatever it is; and the weights that all visits of a step share."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from support.batches import batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrmcore.config import RECOMPUTE, HRMConfig
from hrmcore.model import HRM
from hrmcore.ops import weights
from hrmcore.ops.backend import reference_ops
from hrmcore.ops.weights import SharedWeights, Weight, gemm_weight_backward_

pytestmark = pytest.mark.usefixtures("one_thread")

XPOS = {"position_encoding": "xpos", "xpos_scale_base": 64, "attention_window": 64}
BLOCK_MATRICES = 4 * 2 * 2  # of two stacks of two blocks


def toy(**changes: Any) -> HRM:
    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_layers_per_stack": 2}
    heads = {"num_attention_heads": 2, "head_dim": 16, "H_cycles": 2, "L_cycles": 3}
    return HRM(HRMConfig(**(shape | heads | {"max_position_embeddings": 128} | changes)))


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=dtype == torch.bfloat16)


def gradients(model: HRM, horizon: int | None, recompute: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with autocast(dtype):
        loss = model.loss(batch(), horizon=horizon, recompute=recompute)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("horizon", [2, 3, 5, None])
@pytest.mark.parametrize("changes", [{}, XPOS, {"shared_stacks": True}], ids=["rope", "xpos", "shared"])
def test_gradients_are_the_same_bits_whatever_is_computed_again(
    changes: dict[str, Any], horizon: int | None, dtype: torch.dtype
) -> None:
    model = toy(**changes)
    expected, *others = (gradients(model, horizon, recompute, dtype) for recompute in RECOMPUTE)
    assert len(expected) >= 1 + 4
    for found in others:
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recompute must be one of \('none', 'sublayer', 'visit'\), got 'all'"):
        toy().loss(batch(), recompute="all")


# --- shared weights ------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """How often a matrix was rounded to bfloat16, alone or in a list."""

    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.rounded = 0
        self._places = {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.rounded += args[0].data_ptr() in self._places
        if func is torch.ops.aten._foreach_copy_.default:
            self.rounded += sum(x.data_ptr() in self._places for x in args[1])
        return out


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_step_rounds_each_matrix_once(recompute: str) -> None:
    model = toy()
    with Casts(model) as casts:
        gradients(model, 5, recompute, torch.bfloat16)
    assert casts.rounded == BLOCK_MATRICES


def test_shared_weights_change_gradients_by_rounding_alone() -> None:
    """Beside each visit taking the weights for itself, and autograd adding: in float64 both are within the bound."""
    model, alone = toy(), toy()
    alone.shares_weights = False
    ours, theirs = gradients(model, None, "sublayer"), gradients(alone, None, "sublayer")
    with reference_ops():
        exact = gradients(toy().double(), None, "sublayer")
    assert len(ours) == len(theirs) == len(exact)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2e-6 * c.norm()
        assert (b - c).norm() <= 2e-6 * c.norm()


def test_what_an_earlier_backward_left_is_not_added() -> None:
    """Of one graph: the gradient of a part, then of all, then of all again."""
    model = toy()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model.loss(batch(), horizon=5), parameters)
    loss = model.loss(batch(), horizon=5)
    torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)
    torch.autograd.grad(loss, model.H_module.layers[0].o_proj.weight, retain_graph=True)
    for last in (False, True):
        found = torch.autograd.grad(loss, parameters, retain_graph=not last)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_accumulated_batches_add_up() -> None:
    model = toy()
    for _ in range(2):
        model.loss(batch(), horizon=5).backward()
    once = torch.autograd.grad(model.loss(batch(), horizon=5), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad)


def test_a_frozen_matrix_gets_no_gradient_and_the_others_theirs() -> None:
    model = toy()
    expected = gradients(model, None, "sublayer")
    frozen = model.L_module.layers[1].gqkv_proj.weight.requires_grad_(False)
    left = [p for p in model.parameters() if p is not frozen]
    found = torch.autograd.grad(model.loss(batch()), left)
    kept = [g for p, g in zip(model.parameters(), expected[1:], strict=True) if p is not frozen]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_a_pass_leaves_nothing_behind() -> None:
    """No cycle keeps the rounded copies or the sums alive once the graph is gone."""
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    shared = SharedWeights([parameter], torch.bfloat16)
    weight = shared.of(parameter)
    total, rounded = weakref.ref(weight.sum), weakref.ref(weight.rounded)
    del shared, weight
    assert total() is None
    assert rounded() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grad, rows = (torch.randn(50, n, generator=generator).to(dtype) for n in (7, 5))
    exact = grad.double().T @ rows.double()
    total = torch.full((7, 5), torch.nan)
    gemm_weight_backward_(total, True, grad, rows)
    unit = 2.0**-24 * 50 if dtype == torch.float32 else 2.0**-8  # one rounding of the product, on the CPU
    size = (grad.double().abs().T @ rows.double().abs()).max()
    assert (total - exact).abs().max() <= unit * size
    gemm_weight_backward_(total, False, grad, rows)
    assert (total - 2 * exact).abs().max() <= 2 * unit * size


@pytest.mark.parametrize("adds", [True, False])
def test_on_cuda_the_product_adds_to_float32_where_torch_can(adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grad, rows = mock.Mock(), mock.Mock(dtype=torch.bfloat16, is_cuda=True)
    total, calls = torch.zeros(2, 3), []
    monkeypatch.setattr(weights, "_adds_to_float32", lambda device: adds)
    monkeypatch.setattr(torch, "addmm", lambda *operands, **keys: calls.append((operands, keys)))
    monkeypatch.setattr(torch, "mm", lambda *operands: torch.ones(2, 3, dtype=torch.bfloat16))
    gemm_weight_backward_(total, True, grad, rows)
    gemm_weight_backward_(total, False, grad, rows)
    if adds:
        keys = [{"out_dtype": torch.float32, "beta": beta, "out": total} for beta in (0, 1)]
        assert [found for _, found in calls] == keys
        assert all(operands == (total, grad.T, rows) for operands, _ in calls)
    else:
        assert calls == []
        assert torch.equal(total, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("refuses", [True, False])
def test_torch_is_asked_once_whether_it_adds_to_float32(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, zeros = [], torch.zeros

    def addmm(*operands: Tensor, **keys: Any) -> None:
        asked.append(keys["out_dtype"])
        if refuses:
            raise RuntimeError("self and mat2 must have the same dtype")

    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch.ops.aten.addmm, "overloads", lambda: ["default", "dtype_out"])
    weights._adds_to_float32.cache_clear()
    assert [weights._adds_to_float32(torch.device("cuda", 1)) for _ in range(2)] == 2 * [not refuses]
    weights._adds_to_float32.cache_clear()
    assert asked == [torch.float32]


def test_a_plain_tensor_is_a_weight_of_its_own() -> None:
    tensor = torch.ones(2, 2, requires_grad=True)
    weight = Weight.of(tensor, torch.float32)
    assert weight.rounded.data_ptr() == tensor.data_ptr()
    assert Weight.of(weight, torch.float32) is weight
