"""The study of float8: operands are rounded as the format says, in the blocks of a training step and nowhere else."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.evidence.claim import Scale, Study
from bench.evidence.queue import Cell
from bench.studies import float8
from bench.studies.float8 import CLAIM, FLOAT8, Float8Trainer, blocks_in, product, rounded
from hrmcore.ops import sublayers

pytestmark = pytest.mark.usefixtures("one_thread")

# Bits of the fraction, and the smallest number above zero: float8 as in arXiv 2209.05433, table 1.
BITS = {torch.float8_e4m3fn: (3, 2.0**-9), torch.float8_e5m2: (2, 2.0**-16)}


@pytest.mark.parametrize("dtype", BITS)
def test_rows_are_rounded_to_the_nearest_number_of_the_format(dtype: torch.dtype) -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 16)[:, None]
    x[3] = 0
    found, scales = rounded(x, dtype)
    bits, smallest = BITS[dtype]
    # Half of a last place: of a normal number 2^-bits of it, below them the smallest number; and the scaling's float32.
    allowed = torch.maximum(2.0 ** -(bits + 1) * x.abs(), smallest / 2 * scales) * (1 + 2.0**-20) + x.abs() * 2.0**-22
    assert ((found * scales - x).abs() <= allowed).all()
    assert (found[3] == 0).all()
    rows = [row for row in range(16) if row != 3]
    assert torch.equal(found.abs().amax(1)[rows], torch.full((15,), torch.finfo(dtype).max))


def test_a_product_is_that_of_the_rounded_operands_rounded_once() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, weight = (torch.randn(n, 96, generator=generator).bfloat16() for n in (20, 24))
    (left, s), (right, t) = rounded(rows, torch.float8_e5m2), rounded(weight, torch.float8_e4m3fn)
    exact = (left.double() * s) @ (right.double() * t).T
    terms = (left.double() * s).abs() @ (right.double() * t).abs().T
    found = product(rows, weight, torch.float8_e5m2, torch.float8_e4m3fn)
    # bfloat16's half place, and float32's for each of 96 sums and three products.
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 99 * 2.0**-24 * terms * 1.01).all()


def test_inputs_gradients_take_the_gradients_format_and_weights_gradients_none() -> None:
    generator = torch.Generator().manual_seed(2)
    x, stream = (torch.randn(8, 32, generator=generator).bfloat16() for _ in range(2))
    gate_up, down = torch.randn(128, 32, generator=generator), torch.randn(32, 64, generator=generator)
    gradients = []
    for formats in (entry[1] for entry in FLOAT8.values()):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, gate_up, down)]
        with blocks_in(formats):
            y, _ = sublayers.mlp_sublayer(leaves[0], stream, leaves[1], leaves[2], 1e-6)
            y.sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    (x_e4m3, _, down_e4m3), (x_e5m2, _, down_e5m2) = gradients
    assert not torch.equal(x_e4m3, x_e5m2)
    assert torch.equal(down_e4m3, down_e5m2)  # of the same forward products: nothing else of it is in float8


def test_steps_of_an_arm_are_in_float8_and_validations_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def counted(rows: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, other: torch.dtype) -> torch.Tensor:
        calls.append(dtype)
        return product(rows, weight, dtype, other)

    monkeypatch.setattr(float8, "product", counted)
    study = Study(CLAIM, Scale(("sudoku4",), 40, 8, 64, 1, 64, (2,), precision="bfloat16"), "sudoku4", tmp_path)
    seen = {}
    for arm in CLAIM.arms:
        config = replace(study.config(Cell(arm, 0, 0, 0)), eval_every=1 << 20)
        trainer = Float8Trainer(config, "step", 2, time.monotonic() + 600)
        calls.clear()
        trainer._train_step()
        seen[arm] = set(calls)
        calls.clear()
        trainer.evaluate()
        assert not calls
        trainer.close()
    assert seen == {
        "bfloat16": set(),
        "float8": {torch.float8_e4m3fn},
        "float8, gradients e5m2": {torch.float8_e4m3fn, torch.float8_e5m2},
    }
