"""The contract of the ops, over every op's cases; what only one op has to keep is in its own file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from support.contract import Calls, Case, differentiable, differentiate, exact, poisoned_outputs
from support.emulator import same_bits_for_every_schedule
from support.oracle import DTYPES, framed, listed, relative_error, same_bits
from torch import Tensor

from hrmcore import microbench
from hrmcore.ops.backend import reference_ops

pytestmark = pytest.mark.native

ONE_ROUNDING = 2.0**-9  # of many numbers to bfloat16: it changes the norm of all by about 1.7e-3
FEW = 100  # numbers: one rounding changes each by at most 2^-8


@dataclass(frozen=True)
class Op:
    """What is particular to an op: allowed errors, norm(result - exact) / norm(exact), and which cases suffice."""

    float32: float
    bfloat16: float = ONE_ROUNDING
    bfloat16_gradients: float = ONE_ROUNDING
    emulated: float = 1.0  # how much more the CUDA kernels may err in bfloat16
    few_rows: int = 0  # gradients of fewer rows are what is left when nearly equal terms cancel
    threads: tuple[int, ...] = (-1,)  # cases that several threads share
    schedules: tuple[int, ...] = (3, 4)  # cases of several CUDA blocks that do not take long


OPS = {
    # The sum, and the state, are rounded before they are used: outputs and gradients have two roundings.
    "rms_norm": Op(3e-7, 2.0**-8, 2.0**-7),
    "rms_norm_inject": Op(1e-6, 2.0**-7, 2.0**-6),
    "rope": Op(1e-7, schedules=(4,)),
    "swiglu": Op(2e-7, schedules=(4,)),
    # Backward starts from the rounded output. The tensor cores take bfloat16 weights, and dO in the backward.
    "attention": Op(1e-6, bfloat16_gradients=2.0**-8, emulated=1.5, few_rows=10, threads=(-3, -2), schedules=(2, 7, 8)),
    # The logits are rounded once, and so is every gradient of theirs.
    "cross_entropy": Op(2e-6, 2e-3, 8e-3, schedules=(2,)),
}
NUMBERS = [
    (name, index) for name in OPS for index in range(len(list(importlib.import_module(f"hrmcore.ops.{name}").cases())))
]


def test_every_op_is_held_to_it() -> None:
    assert set(OPS) == set(microbench.op_names())


def page(name: str) -> ModuleType:
    return importlib.import_module(f"hrmcore.ops.{name}")


def op_of(name: str) -> Callable[..., Any]:
    return getattr(page(name), name)


def case_of(name: str, dtype: torch.dtype, index: int, emulated: bool = False) -> Case:
    case = listed(page(name).cases, dtype)[index]
    if not emulated or name != "attention" or len(case["mask"].prefix) > 1 or len(case["q"]) <= 130:
        return case
    # The one long sequence, cut for the emulator to three tiles of one head: it takes seconds.
    rows = {key: case[key][:130, :1] for key in differentiable(case)}
    return case | rows | {"mask": replace(case["mask"], offsets=torch.tensor([0, 130], dtype=torch.int32))}


@cache
def expected(name: str, dtype: torch.dtype, index: int, emulated: bool) -> dict[str, Tensor]:
    return differentiate(
        getattr(page(name), f"{name}_ref"), exact(case_of(name, dtype, index, emulated)), rounded_to=dtype
    )


def allowed(name: str, result: str, found: Tensor, emulated: bool) -> float:
    op = OPS[name]
    if found.dtype == torch.float32 and not (name == "cross_entropy" and found.dim() == 0):
        return op.float32
    output = result.isdigit()
    few = found.numel() < FEW or (not output and len(found) < op.few_rows)
    return (op.bfloat16 if output else op.bfloat16_gradients) * (2 if few else 1) * (op.emulated if emulated else 1)


def refused_on_cuda(case: Case, emulated: bool) -> bool:
    """True, and checked, where the CUDA kernels refuse what those of the CPU take."""
    if not emulated or "mask" not in case or case["q"].shape[-1] <= 128:
        return False
    with pytest.raises(RuntimeError, match=r"head_dim \(last axis of q\) must be at most 128 on CUDA"):
        differentiate(op_of("attention"), case)
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "index"), NUMBERS)
def test_outputs_and_gradients_are_those_of_the_reference(
    backend: str, name: str, index: int, dtype: torch.dtype
) -> None:
    """Operands lie in a frame of NaNs, what is written in a frame that must stay: reads and writes beside them show."""
    emulated = backend == "cuda-emulated"
    case = case_of(name, dtype, index, emulated)
    if refused_on_cuda(case, emulated):
        return
    with poisoned_outputs() as outputs:
        found = differentiate(op_of(name), case, framed)
        found = {key: x.clone() for key, x in found.items()}
    for key, reference in expected(name, dtype, index, emulated).items():
        assert found[key].dtype == (torch.float32 if reference.dim() == 0 else dtype), key
        if reference.any():
            assert relative_error(found[key], reference) <= allowed(name, key, found[key], emulated), key
        else:  # a query that sees one key has no gradient: what rounding leaves is measured by the gradient that came
            assert found[key].double().norm() <= allowed(name, key, found[key], emulated) * found[key].numel() ** 0.5, (
                key
            )
    assert outputs.all_written()


def case_numbers(field: str) -> list[tuple[str, int]]:
    return [(name, index) for name, op in OPS.items() for index in getattr(op, field)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "index"), case_numbers("threads"))
def test_same_bits_on_any_number_of_threads(isa: str, name: str, index: int, dtype: torch.dtype) -> None:
    case = case_of(name, dtype, index)
    assert same_bits(lambda: list(differentiate(op_of(name), case).values()))


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "index"), case_numbers("schedules"))
def test_same_bits_for_every_schedule(name: str, index: int, dtype: torch.dtype) -> None:
    case = case_of(name, dtype, index, emulated=True)
    assert same_bits_for_every_schedule(lambda: list(differentiate(op_of(name), case).values()))


@pytest.mark.inside_torch
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    """Schema, fake and autograd of every torch.library op that a call and its gradient run."""
    with Calls() as calls:
        differentiate(op_of(name), case_of(name, torch.float32, 1))
    assert any(op._opname.endswith("_backward") for op, _ in calls.made) or name == "rope"
    for op, arguments in calls.made:
        forward = not op._opname.endswith("_backward")
        for x in arguments:
            if isinstance(x, Tensor) and x.is_floating_point() and forward and x.dim() > 1:
                x.requires_grad_()
        torch.library.opcheck(op, arguments)


@pytest.mark.inside_torch
@pytest.mark.parametrize("name", OPS)
def test_the_reference_is_twice_differentiable(name: str) -> None:
    case = exact(case_of(name, torch.float32, 1))
    names = differentiable(case)

    def cubes(*operands: Tensor) -> list[Tensor]:
        outputs = op_of(name)(**(case | dict(zip(names, operands, strict=True))))
        return [x**3 for x in ((outputs,) if isinstance(outputs, Tensor) else outputs)]

    with reference_ops():
        assert torch.autograd.gradgradcheck(cubes, [case[key].requires_grad_() for key in names], fast_mode=True)


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_inject", "rope", "swiglu"])
def test_no_tokens(name: str) -> None:
    case = case_of(name, torch.float32, 1)
    empty = case | {key: x[:0] for key, x in case.items() if isinstance(x, Tensor) and key != "table"}
    for key, x in differentiate(op_of(name), empty).items():
        assert len(x) == 0, key


@pytest.mark.parametrize(
    ("name", "operand"), [(name, x) for name in OPS for x in differentiable(case_of(name, DTYPES[0], 1))]
)
def test_a_wrong_operand_is_named(backend: str, name: str, operand: str) -> None:
    case = case_of(name, torch.float32, 1)
    for changed in (case[operand].int(), case[operand][0]):
        with pytest.raises(ValueError, match=rf"\b{operand} must be "):
            op_of(name)(**(case | {operand: changed}))
