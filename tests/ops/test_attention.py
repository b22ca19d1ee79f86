import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.emulator import emulated_cuda
from support.oracle import bound, call, listed, relative_error
from torch.nn.functional import scaled_dot_product_attention

from hrmcore import _C
from hrmcore.ops.attention import (
    PackedMask,
    _attention,
    _attention_backward,
    _seen,
    attention,
    attention_ref,
    cases,
    launch_backward,
)

pytestmark = pytest.mark.native

FLOAT32_BOUND = 1e-6
OPERANDS = ("q", "k", "v", "gate")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def grad_out_of(q):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)


def gradient_bound(grad, dtype):
    """bfloat16: the output that the backward starts from is rounded already, and so is the gradient.

    With a handful of keys the gradients of q and k are what is left when nearly equal terms cancel.
    """
    if dtype == torch.float32:
        return FLOAT32_BOUND
    return 2.0**-7 if len(grad) < 10 else 2.0**-8


def gradient_error(grad, expected, grad_out):
    """A token that sees nothing but itself gives q and k no gradient: what rounding leaves is measured by grad_out."""
    if expected.any():
        return relative_error(grad, expected)
    return (grad.double().norm() / grad_out.double().norm()).item()


def shortened(emulated, case):
    """The one long sequence of the real shape, cut for the emulator to three tiles of one head: it takes seconds."""
    if not emulated or len(case["mask"].prefix) > 1 or len(case["q"]) <= 130:
        return case
    rows = {name: case[name][:130, :1] for name in OPERANDS}
    return case | rows | {"mask": replace(case["mask"], offsets=ints(0, 130))}


def refused_on_cuda(backend, case):
    """True, and checked, where the CUDA kernels refuse what those of the CPU take."""
    if backend != "cuda-emulated" or case["q"].shape[-1] <= 128:
        return False
    with pytest.raises(RuntimeError, match=r"head_dim \(last axis of q\) must be at most 128 on CUDA"):
        attention(**case)
    return True


def operands_of(case):
    return [case[name] for name in OPERANDS]


def packing(case):
    mask = case["mask"]
    return mask.offsets, mask.offsets if mask.key_offsets is None else mask.key_offsets, mask.prefix


def forward(case):
    """The output and the log-sum-exp."""
    return _attention(*operands_of(case), *case["mask"].flat)


def backward(case, out, lse, grad_out):
    return _attention_backward(*operands_of(case), out, lse, grad_out, *case["mask"].flat)


def random_case(lengths, prefix, cached=None, heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    key_offsets = offsets + torch.tensor([0, *(cached or [0] * len(lengths))]).cumsum(0)
    rows = {"q": offsets, "k": key_offsets, "v": key_offsets, "gate": offsets}
    operands = {name: torch.randn(int(o[-1]), heads, head_dim, generator=generator) for name, o in rows.items()}
    return operands | {"mask": PackedMask(offsets.int(), ints(*prefix), key_offsets.int())}


def check_rounded_on_cuda(case, few_keys=False):
    """The op in bfloat16 on CUDA, gradients too, on rows that are made of whole 16-byte pieces."""
    leaves = {name: case[name].double().requires_grad_() for name in OPERANDS}
    grad_out = grad_out_of(case["q"])
    expected = attention_ref(**(case | leaves))
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), grad_out.double())
    with emulated_cuda():
        out, lse = forward(case)
        grads = backward(case, out, lse, grad_out)
    assert relative_error(out, expected.detach()) <= 1.5 * bound(out, FLOAT32_BOUND)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        allowed = gradient_bound(grad[:1] if few_keys else grad, torch.bfloat16)
        assert gradient_error(grad, expected_grad, grad_out) <= 1.5 * allowed


@pytest.mark.emulated
@pytest.mark.parametrize("index", [0, 2, 4, 5, 6, 7, 8, 10])
def test_wide_rows_on_cuda(index):
    check_rounded_on_cuda(shortened(True, listed(cases, torch.bfloat16)[index]))


@pytest.mark.emulated
def test_more_sequences_than_threads_fill_the_table():
    lengths = [i % 3 for i in range(600)]
    case = random_case(lengths, [0] * 600, heads=1)
    check_rounded_on_cuda(case | {name: case[name].bfloat16() for name in OPERANDS}, few_keys=True)


@pytest.mark.emulated
def test_scores_that_rise_and_fall_on_cuda():
    """The softmax's base follows the highest score in steps: up by much, by little, and not at all."""
    case = random_case([250, 250], [0, 250], heads=1, head_dim=64)
    case["q"] = case["q"] * 0.1 + 1
    ramp = torch.linspace(0, 3, 250)
    case["k"] = case["k"] * 0.1 + torch.cat([ramp, ramp.flip(0)])[:, None, None]
    case |= {name: case[name].bfloat16() for name in OPERANDS}
    with emulated_cuda():
        out, lse = forward(case)
    exact = case | {name: case[name].double() for name in OPERANDS}
    assert relative_error(out, attention_ref(**exact)) <= 1.5 * bound(out, FLOAT32_BOUND)
    scores = torch.einsum("ihd,jhd->hij", exact["q"][250:], exact["k"][250:]) / 8
    assert relative_error(lse[250:], scores.logsumexp(-1).T) <= FLOAT32_BOUND


@pytest.mark.emulated
def test_table_has_every_tile_once_and_the_heaviest_first():
    lengths, prefix, cached = [200, 0, 65, 64, 500], [10, 0, 65, 0, 128], [0, 5, 300, 0, 0]
    case = random_case(lengths, prefix, cached, heads=1)
    case |= {name: case[name].bfloat16() for name in OPERANDS}
    with emulated_cuda():
        both = case["mask"].with_tiles(case["q"], len(case["k"])).tiles
    queries = len(case["q"]) // 64 + len(lengths)
    assert len(both) == queries + len(case["k"]) // 64 + len(lengths)
    for table, over_keys in ((both[:queries], False), (both[queries:], True)):
        used = [line for line in table.tolist() if line[0] >= 0]
        rows = [length + more * over_keys for length, more in zip(lengths, cached, strict=True)]
        assert sorted(line[:2] for line in used) == [[s, r] for s, n in enumerate(rows) for r in range(0, n, 64)]
        assert [line[0] for line in table.tolist()[len(used) :]] == [-1] * (len(table) - len(used))
        visits = []
        for s, first, query_count, key_count, *_ in used:
            seen = _seen(query_count, key_count, prefix[s])
            others = (seen[:, first : first + 64].any(1) if over_keys else seen[first : first + 64].any(0)).nonzero()
            visits.append((int(others.max() - others.min()) // 64 + 1) if len(others) else 0)
        assert visits == sorted(visits, reverse=True)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(backend, head_dim):
    case = random_case([37], [9], cached=[30], heads=1, head_dim=head_dim)
    if refused_on_cuda(backend, case):
        return
    ours = {name: case[name].clone().requires_grad_() for name in OPERANDS}
    theirs = {name: case[name].double().requires_grad_() for name in OPERANDS}
    out, expected = attention(**(case | ours)), attention_ref(**(case | theirs))
    assert relative_error(out, expected) <= FLOAT32_BOUND
    torch.autograd.backward([out, expected], [grad_out_of(out), grad_out_of(out).double()])
    for name in OPERANDS:
        assert relative_error(ours[name].grad, theirs[name].grad) <= FLOAT32_BOUND


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))
    cached = [draw(st.integers(0, 70)) for _ in lengths]
    prefix = [draw(st.integers(0, length + more)) for length, more in zip(lengths, cached, strict=True)]
    return lengths, prefix, cached


@settings(max_examples=50, deadline=None)
@given(packings())
def test_any_packing(drawn):
    case = random_case(*drawn)
    ours = {name: case[name].clone().requires_grad_() for name in OPERANDS}
    theirs = {name: case[name].double().requires_grad_() for name in OPERANDS}
    out, expected = attention(**(case | ours)), attention_ref(**(case | theirs))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.autograd.backward([out, expected], [grad_out_of(out), grad_out_of(out).double()])
    for name in OPERANDS:
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "prefix"), [(150, 150, 0), (150, 150, 77), (90, 200, 150), (1, 333, 20)])
def test_against_torch(backend, queries, keys, prefix):
    case = random_case([queries], [prefix], cached=[keys - queries], head_dim=64)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[:, :prefix] = True
    q, k, v = (case[name].double().transpose(0, 1) for name in ("q", "k", "v"))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    out, lse = forward(case | {"gate": torch.full_like(case["gate"], 40.0)})  # wide open
    assert relative_error(out, expected) <= FLOAT32_BOUND
    scores = (q @ k.transpose(1, 2) / 8).masked_fill(~mask, -torch.inf)
    assert relative_error(lse, scores.logsumexp(-1).T) <= FLOAT32_BOUND


@pytest.mark.parametrize("scale", [1e-20, 1e2, 1e4])
def test_extreme_scores(backend, scale):
    case = random_case([100], [30])
    case["q"] *= scale
    out = attention(**case)
    expected = attention_ref(**{name: x.double() if name in OPERANDS else x for name, x in case.items()})
    assert relative_error(out, expected) <= FLOAT32_BOUND * max(1, scale)  # a score's rounding grows with the score


def test_sequences_do_not_see_each_other(backend):
    case = random_case([40, 70, 33], [0, 50, 33])
    clean = forward(case)
    clean_grads = backward(case, clean[0], clean[1], clean[0])
    for name in OPERANDS:
        case[name][40:110] = torch.nan
    spoilt = forward(case)
    spoilt_grads = backward(case, spoilt[0], spoilt[1], spoilt[0])
    for before, after in zip(clean + clean_grads, spoilt + spoilt_grads, strict=True):
        assert torch.equal(before[:40], after[:40])
        assert torch.equal(before[110:], after[110:])
    assert spoilt[0][40:110].isnan().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths):
    case = random_case(lengths, [0] * len(lengths))
    q = case["q"].requires_grad_()
    attention(**(case | {"q": q})).sum().backward()
    assert q.grad.shape == (0, 2, 8)


def test_keys_without_queries_have_no_gradient():
    case = random_case([0, 4], [3, 0], cached=[5, 0])
    out, lse = forward(case)
    _, grad_k, grad_v, _ = backward(case, out, lse, out)
    assert not grad_k[:5].any()
    assert not grad_v[:5].any()
    assert grad_v[5:].any()


def with_change(case, change):
    """Of an operand, or of a field of the mask."""
    fields = {name: x for name, x in change.items() if name not in OPERANDS}
    return (
        case | {name: x for name, x in change.items() if name in OPERANDS} | {"mask": replace(case["mask"], **fields)}
    )


Q, FUSED = torch.ones(5, 2, 8), torch.ones(5, 2, 8, 2)
INTS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.double()}, "q must be float32 or bfloat16, got float64"),
        ({"q": Q[0]}, "q must be of rank 3, got shape (2, 8)"),
        ({"q": FUSED[..., 0]}, "q must be contiguous in its last axis, got a strided view"),
        (
            {"q": torch.ones(5, 2, 12)},
            "q must be of a head_dim (last axis) that is a multiple of 8 from 8 to 256, got 12",
        ),
        (
            {"q": torch.ones(5, 2, 264)},
            "q must be of a head_dim (last axis) that is a multiple of 8 from 8 to 256, got 264",
        ),
        (
            {"q": torch.ones(5, 2, 0)},
            "q must be of a head_dim (last axis) that is a multiple of 8 from 8 to 256, got 0",
        ),
        ({"k": Q.bfloat16()}, "k must be float32, got bfloat16"),
        ({"k": torch.ones(5, 3, 8)}, "k must be of size 2 (H) in axis 1, got shape (5, 3, 8)"),
        ({"k": torch.ones(5, 2, 16)}, "k must be of size 8 (d) in axis 2, got shape (5, 2, 16)"),
        ({"v": Q[:4]}, "v must be of the shape of k (5, 2, 8), got (4, 2, 8)"),
        ({"v": FUSED[..., 0]}, "v must be contiguous in its last axis, got a strided view"),
        ({"gate": Q[:4]}, "gate must be of the shape of q (5, 2, 8), got (4, 2, 8)"),
        ({"offsets": INTS.long()}, "offsets must be int32, got int64"),
        ({"offsets": INTS[None]}, "offsets must be of rank 1, got shape (1, 3)"),
        ({"offsets": ints(0, 0, 2, 0, 5)[::2]}, "offsets must be contiguous, got a strided view"),
        ({"offsets": ints()}, "offsets must be of at least one element (S + 1), got an empty tensor"),
        ({"offsets": ints(1, 2, 5)}, "offsets must be 0 in its first element, got 1"),
        ({"offsets": ints(0, 6, 5)}, "offsets must be non-decreasing, got offsets[2] = 5 after 6"),
        ({"offsets": ints(0, 2, 6)}, "offsets must be 5 (the number of rows) in its last element, got 6"),
        ({"key_offsets": ints(0, 2, 4)}, "key_offsets must be 5 (the number of rows) in its last element, got 4"),
        ({"key_offsets": ints(0, 5)}, "key_offsets must be of the shape of offsets (3), got (2)"),
        (
            {"key_offsets": ints(0, 1, 5)},
            "key_offsets must be such that each sequence has at least as many keys as queries, "
            "got 1 keys for 2 queries in sequence 0",
        ),
        ({"prefix": ints(0, 0).long()}, "prefix must be int32, got int64"),
        ({"prefix": ints(0)}, "prefix must be of size 2 (S) in axis 0, got shape (1)"),
        ({"prefix": ints(0, -1)}, "prefix must be between 0 and the sequence's number of keys, 3, got prefix[1] = -1"),
        ({"prefix": ints(3, 0)}, "prefix must be between 0 and the sequence's number of keys, 2, got prefix[0] = 3"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**with_change({"q": Q, "k": Q, "v": Q, "gate": Q, "mask": PackedMask(INTS, ints(0, 0))}, change))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (7, Q[:4], "out must be of the shape of q (5, 2, 8), got (4, 2, 8)"),
        (7, Q.bfloat16(), "out must be float32, got bfloat16"),
        (8, Q[..., 0].double(), "lse must be float32, got float64"),
        (8, Q[:4, 0, :2], "lse must be of size 5 (T) in axis 0, got shape (4, 2)"),
        (9, Q[:, :1], "grad_out must be of size 2 (H) in axis 1, got shape (5, 1, 8)"),
        (10, FUSED[..., 0], "grad_q must be contiguous in its last axis, got a strided view"),
        (11, Q.bfloat16(), "grad_k must be float32, got bfloat16"),
        (12, Q[:4], "grad_v must be of the shape of k (5, 2, 8), got (4, 2, 8)"),
        (13, None, "grad_gate must be a tensor"),
    ],
)
def test_bad_backward_operand(position, wrong, message):
    operands = [Q, Q, Q, Q, INTS, INTS, ints(0, 0), Q, torch.ones(5, 2), Q, *torch.empty(4, 5, 2, 8)]
    operands[position] = wrong
    with pytest.raises(ValueError, match=re.escape(message)):
        call(_C.attention_backward, *operands, None, 0, None, None, None, None, None)


@pytest.mark.emulated
def test_backward_may_overwrite_the_gradient_on_cuda():
    case = listed(cases, torch.bfloat16)[8]
    operands, grad_out = tuple(operands_of(case)), grad_out_of(case["q"])
    with emulated_cuda():
        results = forward(case)
        kept, overwritten = ([torch.empty_like(x) for x in operands] for _ in range(2))
        launch_backward(operands, case["mask"], results, grad_out, tuple(kept))
        assert torch.equal(grad_out, grad_out_of(case["q"]))
        launch_backward(operands, case["mask"], results, grad_out, tuple(overwritten), overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, overwritten, strict=True))
