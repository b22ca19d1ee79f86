"""xPos and the attention window, against the definitions in float64."""

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.emulator import emulated_cuda, same_bits_for_every_schedule
from support.oracle import DTYPES, bound, call, framed, listed, only_inside_written, poisoned, relative_error, same_bits

from hrmcore import _C
from hrmcore.ops.attention import (
    PackedMask,
    _attention,
    _attention_backward,
    attention,
    attention_ref,
    backward_workspace,
    cases,
)
from hrmcore.ops.backend import reference_ops
from hrmcore.ops.rope import rope, rope_table, xpos_log_decay

pytestmark = pytest.mark.native

OPERANDS = ("q", "k", "v", "gate")
INDICES = range(len(list(cases())))
FLOAT32_BOUND = 2e-6
# (scale base, window): xPos, xPos that has decayed to nothing after some hundred tokens, a window alone, and both
FORMS = [(512, 0), (8, 0), (None, 64), (512, 128)]


def with_form(case, form):
    base, window = form
    log_decay = None if base is None else xpos_log_decay(case["q"].shape[-1], base)
    return case | {"mask": replace(case["mask"], log_decay=log_decay, window=window)}


def grad_out_of(q):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)


@cache
def reference(dtype, index, form):
    case = with_form(listed(cases, dtype)[index], form)
    leaves = {name: case[name].double().requires_grad_() for name in OPERANDS}
    out = attention_ref(**(case | leaves))
    return out.detach(), torch.autograd.grad(out, list(leaves.values()), grad_out_of(case["q"]).double())


def operands_of(case):
    return [case[name] for name in OPERANDS]


def packing(case):
    mask = case["mask"]
    return mask.offsets, mask.offsets if mask.key_offsets is None else mask.key_offsets, mask.prefix


def forward_and_backward(case):
    """The kernels' results, the gradient that comes back being the output."""
    out, lse = _attention(*operands_of(case), *case["mask"].flat)
    return out, lse, *_attention_backward(*operands_of(case), out, lse, out, *case["mask"].flat)


def close(grad, expected, dtype, roundings=1.0):
    """bfloat16: the output that the backward starts from is rounded already, and so is the gradient."""
    if not expected.any():
        return grad.double().norm() <= 1e-6 * math.sqrt(grad.numel()) or dtype == torch.bfloat16
    allowed = FLOAT32_BOUND if dtype == torch.float32 else roundings * (2.0**-7 if len(grad) < 10 else 2.0**-8)
    return relative_error(grad, expected) <= allowed


def check_kernels(dtype, form, index, roundings=1.0):
    case = with_form(listed(cases, dtype)[index], form)
    mask = case["mask"].with_tiles(case["q"], len(case["k"]))
    tail = (mask.log_decay, mask.window, mask.tiles)
    out, lse = poisoned(*case["q"].shape, dtype=dtype), poisoned(*case["q"].shape[:2], dtype=torch.float32)
    q, k, v, gate = (framed(case[name]) for name in OPERANDS)
    call(_C.attention_forward, q, k, v, gate, *packing(case), out, lse, *tail)
    assert only_inside_written(out)
    assert only_inside_written(lse)
    expected_out, expected_grads = reference(dtype, index, form)
    assert relative_error(out, expected_out) <= roundings * bound(out, FLOAT32_BOUND)

    grad_q, grad_gate = poisoned(*q.shape, dtype=dtype), poisoned(*q.shape, dtype=dtype)
    grad_k, grad_v = poisoned(*k.shape, dtype=torch.float32), poisoned(*k.shape, dtype=torch.float32)
    grads = grad_q, grad_k, grad_v, grad_gate
    grad_out = framed(grad_out_of(q))
    last = *backward_workspace(q), None, None
    call(_C.attention_backward, q, k, v, gate, *packing(case), out, lse, grad_out, *grads, *tail, *last)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert only_inside_written(grad)
        assert close(grad, expected, dtype, roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", INDICES)
def test_kernels(isa, dtype, form, index):
    check_kernels(dtype, form, index)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "index"),
    [(form, index) for form in FORMS for index in (0, 1, 2, 7)] + [((8, 0), 5), ((512, 128), 8), ((512, 0), 4)],
)
def test_kernels_on_cuda(dtype, form, index):
    """Not every case, which would take a minute: short ones in every form, and one of several tiles in three.

    Weights and dO, and in xPos the decayed queries and keys, are rounded to bfloat16 for the tensor cores.
    """
    with emulated_cuda():
        check_kernels(dtype, form, index, 1 if dtype == torch.float32 else 1.5 if form[0] is None else 2)


@pytest.mark.emulated
@pytest.mark.parametrize(("form", "index"), [(FORMS[0], 6), (FORMS[1], 7), (FORMS[2], 8), (FORMS[3], 9), (FORMS[0], 4)])
def test_wide_rows_on_cuda(form, index):
    """bfloat16, rows made of whole 16-byte pieces: the gradients come rounded."""
    case = with_form(listed(cases, torch.bfloat16)[index], form)
    expected_out, expected_grads = reference(torch.bfloat16, index, form)
    grad_out = grad_out_of(case["q"])
    with emulated_cuda():
        out, lse = _attention(*operands_of(case), *case["mask"].flat)
        grads = _attention_backward(*operands_of(case), out, lse, grad_out, *case["mask"].flat)
    assert relative_error(out, expected_out) <= 2 * bound(out, FLOAT32_BOUND)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert close(grad, expected, torch.bfloat16, 2)


def random_case(lengths, prefix, cached=None, heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    key_offsets = offsets + torch.tensor([0, *(cached or [0] * len(lengths))]).cumsum(0)
    rows = {"q": offsets, "k": key_offsets, "v": key_offsets, "gate": offsets}
    operands = {name: torch.randn(int(o[-1]), heads, head_dim, generator=generator) for name, o in rows.items()}
    mask = PackedMask(offsets.int(), torch.tensor(prefix, dtype=torch.int32), key_offsets.int())
    return operands | {"mask": mask}


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    cached = [draw(st.integers(0, 150)) for _ in lengths]
    prefix = [draw(st.integers(0, length + more)) for length, more in zip(lengths, cached, strict=True)]
    return lengths, prefix, cached


@settings(max_examples=40, deadline=None)
@given(packings(), st.sampled_from([*FORMS, (None, 128), (64, 64)]))
def test_any_packing_at_any_alignment(drawn, form):
    case = with_form(random_case(*drawn), form)
    ours = {name: case[name].clone().requires_grad_() for name in OPERANDS}
    theirs = {name: case[name].double().requires_grad_() for name in OPERANDS}
    out, expected = attention(**(case | ours)), attention_ref(**(case | theirs))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.autograd.backward([out, expected], [grad_out_of(out), grad_out_of(out).double()])
    for name in OPERANDS:
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, rtol=1e-5, atol=1e-5)


def definition(q, k, v, first, prefix, base, window=0):
    """Attention of the queries from position `first` on, from the definition alone: nothing rotated or tiled.

    q (T, d), k and v (Tk, d), float64. Channel pair i of a score: the pairs as complex numbers, turned by the angle of
    the distance, times zeta_i^(|n - m| / base).
    """
    half = q.shape[-1] // 2
    distance = (torch.arange(first, first + len(q))[:, None] - torch.arange(len(k))).double()
    scores = torch.zeros(len(q), len(k), dtype=torch.float64)
    for i in range(half):
        zeta = (2 * i + 0.4 * 2 * half) / (1.4 * 2 * half)
        angle = distance * 10000.0 ** (-i / half)
        decay = zeta ** (distance.abs() / base)
        dot = q[:, i, None] * k[:, i] + q[:, i + half, None] * k[:, i + half]
        cross = q[:, i + half, None] * k[:, i] - q[:, i, None] * k[:, i + half]
        scores += decay * (dot * angle.cos() - cross * angle.sin())
    query, key = torch.arange(first, first + len(q))[:, None], torch.arange(len(k))
    seen = key < (query + 1).clamp(min=prefix)
    if window:
        seen &= (query // window - key // window).abs() <= 1
    return (scores / math.sqrt(2 * half)).masked_fill(~seen, -math.inf).softmax(-1) @ v


def turned(q, k, first):
    """q of the positions from `first` on and k of all, each (T, d), through the op."""
    table = rope_table(len(k), q.shape[-1], exact=True)
    positions = torch.arange(len(k), dtype=torch.int32)
    padded_q = torch.zeros_like(k)
    padded_q[first:] = q
    q, k = rope(padded_q[:, None], k[:, None], table, positions)
    return q[first:], k


@cache
def far_case(keys, queries, prefix, base, window):
    """Arguments of `attention`, and what the definition says."""
    generator = torch.Generator().manual_seed(keys)
    dim, first = 16, keys - queries
    q, k, v = (torch.randn(n, dim, generator=generator) * s for n, s in ((queries, 3), (keys, 2), (keys, 1)))
    case = {"v": v[:, None], "gate": torch.full((queries, 1, dim), 40.0)}  # wide open
    case["q"], case["k"] = turned(q, k, first)
    offsets, prefixes, key_offsets = torch.tensor([[0, queries], [prefix, 0], [0, keys]], dtype=torch.int32)
    case["mask"] = PackedMask(offsets, prefixes[:1], key_offsets)
    expected = definition(q.double(), k.double(), v.double(), first, prefix, base, window)
    return with_form(case, (base, window)), expected


@pytest.mark.parametrize(
    "far",
    [  # keys, queries, prefix, scale base, window
        (65536, 12, 0, 512, 0),
        (65500, 9, 65500, 512, 0),  # all see each other, and no query starts a tile
        (65001, 7, 100, 512, 128),
        (1100, 1100, 1100, 8, 0),  # the exponents of 70,000 tokens, both ways
        (777, 777, 700, 512, 0),
        (777, 777, 700, 512, 64),
    ],
)
def test_the_definition_at_any_distance(isa, far):
    case, expected = far_case(*far)
    assert relative_error(attention(**case)[:, 0], expected) <= 1e-5


@pytest.mark.emulated
@pytest.mark.parametrize(
    "far",
    [
        pytest.param((8192, 5, 0, 512, 0), id="8192 keys, for 65536 take the emulator too long"),
        pytest.param((5003, 3, 5003, 512, 0), id="5003 unaligned keys, both ways"),
        pytest.param((1500, 40, 1490, 8, 0), id="the exponents of 96000 tokens"),
        pytest.param((203, 203, 190, 512, 64), id="a window"),
    ],
)
def test_the_definition_at_any_distance_on_cuda(far):
    case, expected = far_case(*far)
    with emulated_cuda():
        assert relative_error(attention(**case)[:, 0], expected) <= 1e-5


def test_nothing_overflows_or_becomes_denormal(isa):
    """At the smallest scale base of a config the first channel has decayed to 1e-36 after 4,200 tokens."""
    case = with_form(random_case([4200], [4200], heads=1, head_dim=8), (64, 0))
    case["v"] = torch.ones_like(case["v"])
    leaves = {name: case[name].requires_grad_() for name in OPERANDS}
    out = attention(**(case | leaves))
    torch.testing.assert_close(out, torch.sigmoid(case["gate"]), rtol=1e-4, atol=0)  # the weights sum to one
    for grad in torch.autograd.grad(out, list(leaves.values()), grad_out_of(out)):
        assert grad.isfinite().all()


def test_the_decay_is_that_of_the_paper():
    log_decay = xpos_log_decay(128).double()
    assert log_decay.exp()[0] ** 512 == pytest.approx(0.4 / 1.4, rel=1e-5)
    assert log_decay.exp()[63] ** 512 == pytest.approx((126 + 51.2) / 179.2, rel=1e-5)
    for arguments, message in (((7,), "head_dim must be even"), ((8, 0), "scale_base must be at least 1")):
        with pytest.raises(ValueError, match=message):
            xpos_log_decay(*arguments)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_any_number_of_threads(isa, form):
    case = with_form(listed(cases, torch.float32)[INDICES[-3]], form)
    assert same_bits(lambda: forward_and_backward(case))


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_schedule(dtype):
    case = {name: x.to(dtype) if name in OPERANDS else x for name, x in random_case([70, 33], [60, 0]).items()}
    case = with_form(case, (512, 64))
    assert same_bits_for_every_schedule(lambda: forward_and_backward(case))


def test_no_decay_is_rope(backend):
    case = with_form(random_case([70, 150], [0, 120], head_dim=40), (512, 0))
    ones, none = (case | {"mask": replace(case["mask"], log_decay=x)} for x in (torch.zeros(20), None))
    torch.testing.assert_close(attention(**ones), attention(**none), rtol=1e-5, atol=1e-6)


def test_what_the_window_hides_changes_nothing(backend):
    case = with_form(random_case([400], [200]), (512, 64))
    before = attention(**case)
    for name in ("k", "v"):
        case[name][:128] = torch.nan  # the first two blocks
    after = attention(**case)
    assert after[:192].isnan().all()
    assert torch.equal(after[192:], before[192:])


@pytest.mark.inside_torch
def test_opcheck():
    case = with_form(listed(cases, torch.float32)[7], (512, 64))
    leaves = {name: case[name].detach().requires_grad_() for name in OPERANDS}
    torch.library.opcheck(_attention, (*leaves.values(), *case["mask"].flat))


@pytest.mark.inside_torch
def test_reference_is_twice_differentiable():
    case = with_form(random_case([2, 3], [2, 1], cached=[0, 1], heads=1, head_dim=2), (8, 0))
    leaves = [case[name].double().requires_grad_() for name in OPERANDS]
    with reference_ops():
        assert torch.autograd.gradgradcheck(lambda *operands: attention(*operands, case["mask"]), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.zeros(5)}, "log_decay must be of size 4 (d / 2) in axis 0, got shape (5)"),
        ({"log_decay": torch.zeros(4).double()}, "log_decay must be float32, got float64"),
        ({"log_decay": torch.full((4,), -0.6)}, "log_decay must be in [-0.5, 0], got -0.6"),
        ({"log_decay": torch.full((4,), math.nan)}, "log_decay must be in [-0.5, 0], got nan"),
        ({"window": 65}, "window must be a multiple of 64, or 0 for none, got 65"),
        ({"window": -64}, "window must be a multiple of 64, or 0 for none, got -64"),
    ],
)
def test_bad_input(change, message):
    case = random_case([3], [0])
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**(case | {"mask": replace(case["mask"], **change)}))
