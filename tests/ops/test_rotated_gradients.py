"""Attention's backward that leaves the gradients of the rows before `rope` turned them, beside float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.emulator import counters, emulated_cuda, same_bits_for_every_schedule
from support.oracle import call, relative_error
from torch import Tensor

from hrmcore import _C
from hrmcore.ops.attention import PackedMask, attention_ref, launch_backward, launch_forward
from hrmcore.ops.rope import rope_ref, rope_table, xpos_log_decay
from hrmcore.ops.sublayers import rotate_and_attend, rotate_and_attend_backward

pytestmark = pytest.mark.native

LENGTHS, PREFIX = [1, 70, 0, 17, 64], [0, 33, 0, 17, 1]
FORMS = [(None, 0), (64, 0), (64, 64)]  # scale_base of xPos, attention window


def mask_of(head_dim: int, form: tuple[int | None, int] = (None, 0)) -> PackedMask:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    decay = None if form[0] is None else xpos_log_decay(head_dim, form[0])
    return PackedMask(offsets, torch.tensor(PREFIX, dtype=torch.int32), None, decay, form[1])


def rotation_of(head_dim: int) -> tuple[Tensor, Tensor]:
    """Positions of each sequence, the second one's far along."""
    runs = [torch.arange(n, dtype=torch.int32) + (200 if s == 1 else 0) for s, n in enumerate(LENGTHS)]
    return rope_table(300, head_dim), torch.cat(runs)


def fused(heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(sum(LENGTHS), 4, heads, head_dim, generator=generator).to(dtype)


def gradient(gqkv: Tensor, mask: PackedMask, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Of rotation and attention together, the gradient that comes back being the output."""
    turned = gqkv.clone()
    results = rotate_and_attend(turned, rotation, mask)
    return rotate_and_attend_backward(turned, results, rotation, mask, results[0].clone())


def expected(gqkv: Tensor, mask: PackedMask, rotation: tuple[Tensor, Tensor], grad_out: Tensor) -> Tensor:
    leaf = gqkv.double().requires_grad_()
    gate, q, k, v = leaf.unbind(1)
    q, k = rope_ref(q, k, rotation[0].double(), rotation[1])
    decay = None if mask.log_decay is None else mask.log_decay.double()
    out = attention_ref(q, k, v, gate, replace(mask, log_decay=decay))
    return torch.autograd.grad(out, leaf, grad_out.double())[0]


def out_of(gqkv: Tensor, mask: PackedMask, rotation: tuple[Tensor, Tensor]) -> Tensor:
    return rotate_and_attend(gqkv.clone(), rotation, mask)[0]


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("heads", "head_dim", "form"),
    [(2, 16, FORMS[0]), (1, 24, FORMS[0]), (1, 64, FORMS[0]), (1, 128, FORMS[0]), (2, 32, FORMS[1]), (1, 40, FORMS[2])],
)
def test_beside_float64(heads: int, head_dim: int, form: tuple[int | None, int]) -> None:
    """Ragged sequences, an empty one, rows of whole pieces and not.

    q and k are rounded once by the rotation, weights and dO, under xPos the decayed rows, on their way into a product,
    and the gradient itself: up to four roundings of half of 2^-8 where the plain kernels are allowed 1.5 and 2 of 2^-8.
    """
    mask, rotation, gqkv = mask_of(head_dim, form), rotation_of(head_dim), fused(heads, head_dim, torch.bfloat16)
    with emulated_cuda():
        found, grad_out = gradient(gqkv, mask, rotation), out_of(gqkv, mask, rotation)
    theirs = expected(gqkv, mask, rotation, grad_out)
    for part in range(4):
        assert relative_error(found[:, part], theirs[:, part]) <= (2 if form[0] is None else 2.5) * 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(dtype: torch.dtype) -> None:
    """There the rotation is a call of its own; in bfloat16 it rounds once more."""
    mask, rotation, gqkv = mask_of(32), rotation_of(32), fused(2, 32, dtype)
    found, grad_out = gradient(gqkv, mask, rotation), out_of(gqkv, mask, rotation)
    allowed = 2e-6 if dtype == torch.float32 else 2.5 * 2.0**-8
    assert relative_error(found, expected(gqkv, mask, rotation, grad_out)) <= allowed


@pytest.mark.emulated
@pytest.mark.parametrize("head_dim", [24, 64])
def test_beside_the_plain_kernels(head_dim: int) -> None:
    """gate and v have their bits; q and k are theirs turned back exactly, but for half a unit of rounding in each.

    Turning changes no norm: 2^-9 of it for each of the two roundings to bfloat16.
    """
    mask, rotation, gqkv = mask_of(head_dim), rotation_of(head_dim), fused(1, head_dim, torch.bfloat16)
    with emulated_cuda():
        turned = gqkv.clone()
        results = rotate_and_attend(turned, rotation, mask)
        gate, q, k, v = turned.unbind(1)
        tiled = mask.with_tiles(q)
        found = []
        for given in (None, rotation):
            counters()
            grads = torch.empty_like(turned)
            outputs = grads[:, 1], grads[:, 2], grads[:, 3], grads[:, 0]
            launch_backward((q, k, v, gate), tiled, results, results[0].clone(), outputs, rotation=given)
            assert counters()["launches"] == 2
            found.append(grads)
    plain, together = found
    assert torch.equal(together[:, (0, 3)], plain[:, (0, 3)])
    cos, sin = rotation[0].double().chunk(2, dim=-1)
    back = rope_ref(plain[:, 1].double(), plain[:, 2].double(), torch.cat([cos, -sin], -1), rotation[1])
    for part, exact in zip((1, 2), back, strict=True):
        assert 0 < relative_error(together[:, part], exact) <= 2 * 2.0**-9


@pytest.mark.emulated
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_every_schedule(form: tuple[int | None, int]) -> None:
    mask, rotation, gqkv = mask_of(16, form), rotation_of(16), fused(1, 16, torch.bfloat16)
    assert same_bits_for_every_schedule(lambda: [gradient(gqkv, mask, rotation)])


@pytest.mark.emulated
def test_a_position_outside_of_the_table_gives_its_row_nans() -> None:
    mask, (table, positions), gqkv = mask_of(16), rotation_of(16), fused(1, 16, torch.bfloat16)
    with emulated_cuda():
        turned = gqkv.clone()
        results = rotate_and_attend(turned, (table, positions), mask)
        wrong = positions.clone()
        wrong[[5, 90]] = torch.tensor([300, -1], dtype=torch.int32)
        found = rotate_and_attend_backward(turned, results, (table, wrong), mask, results[0].clone())
    lost = found.isnan().any(-1)[:, :, 0]
    assert lost[:, 1:3].nonzero()[:, 0].unique().tolist() == [5, 90]
    assert not lost[:, (0, 3)].any()


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.ones(9, 8)}, r"table must be of size 16 \(d\) in axis 1"),
        ({"table": torch.ones(9, 16, dtype=torch.float64)}, "table must be float32, got float64"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions must be of size 152 \(T\) in axis 0"),
        ({"positions": None}, "positions must be a tensor"),
        ({"tiles": None}, "table must be None but in bfloat16 on CUDA"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    table, positions = rotation_of(16)
    rows, mask = torch.zeros(sum(LENGTHS), 1, 16, dtype=torch.bfloat16), mask_of(16)
    lse = torch.zeros(sum(LENGTHS), 1)
    with emulated_cuda():
        given = {"table": table, "positions": positions, "tiles": mask.with_tiles(rows).tiles} | change
        grads = torch.empty(2, *rows.shape, dtype=torch.bfloat16), torch.empty(2, *rows.shape)
        outputs = grads[0][0], grads[1][0], grads[1][1], grads[0][1]
        packing = mask.offsets, mask.offsets, mask.prefix
        operands = *4 * [rows], *packing, rows, lse, rows, *outputs, None, 0, given["tiles"]
        with pytest.raises(ValueError, match=message):
            call(_C.attention_backward, *operands, None, None, given["table"], given["positions"])


def test_a_run_of_attention_alone_is_not_turned() -> None:
    """Without a rotation the gradients are those of the rows that attention was given."""
    mask, gqkv = mask_of(16), fused(1, 16, torch.float32)
    gate, q, k, v = gqkv.unbind(1)
    results = launch_forward((q, k, v, gate), mask)
    grads = torch.empty_like(gqkv)
    outputs = grads[:, 1], grads[:, 2], grads[:, 3], grads[:, 0]
    launch_backward((q, k, v, gate), mask, results, results[0].clone(), outputs)
    leaf = gqkv.double().requires_grad_()
    gate, q, k, v = leaf.unbind(1)
    theirs = torch.autograd.grad(attention_ref(q, k, v, gate, mask), leaf, results[0].double())[0]
    assert relative_error(grads, theirs) <= 2e-6
