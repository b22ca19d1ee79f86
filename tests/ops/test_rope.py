import re

import pytest
import torch
from support.oracle import call, listed, relative_error
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hrmcore import _C
from hrmcore.ops.rope import cases, rope, rope_ref, rope_table

pytestmark = pytest.mark.native

FLOAT32_BOUND = 1e-7


def reference(case):
    return rope_ref(case["q"].double(), case["k"].double(), case["table"], case["positions"])


@pytest.mark.parametrize("index", range(len(list(cases()))))
def test_kernel_on_fused_views_and_in_place(backend, index):
    case = listed(cases, torch.float32)[index]
    expected = reference(case)
    fused = torch.stack([case["q"], case["k"]], dim=1)
    q, k = fused.unbind(1)
    for out, theirs in zip(rope(**(case | {"q": q, "k": k})), expected, strict=True):
        assert out.is_contiguous()
        assert relative_error(out, theirs) <= FLOAT32_BOUND
    call(_C.rope, q, k, case["table"], case["positions"], q, k, False)
    for out, theirs in zip((q, k), expected, strict=True):
        assert relative_error(out, theirs) <= FLOAT32_BOUND


def test_gradient_of_one_output_only():
    case = list(cases())[3]
    q, k = (case[name].clone().requires_grad_() for name in ("q", "k"))
    rope(q, k, case["table"], case["positions"])[0].sum().backward()
    assert q.grad.norm() > 0
    assert not k.grad.any()


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10000.0), (64, 10000.0), (128, 10000.0), (128, 500000.0)])
def test_against_transformers(head_dim, theta):
    length = 4096
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = torch.randn(2, length, 2, head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length, dtype=torch.int32)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions.long()[None])
    table = rope_table(length, head_dim, theta)
    assert torch.equal(table, torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], dim=-1))
    theirs = apply_rotary_pos_emb(q.double()[None], k.double()[None], cos, sin, unsqueeze_dim=2)
    for out, expected in zip(rope(q, k, table, positions), theirs, strict=True):
        assert relative_error(out, expected[0]) <= FLOAT32_BOUND


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0)).double()
    table = rope_table(200, 64)

    def score(query_position, key_position):
        turned = rope_ref(q, q, table, torch.tensor([query_position]))[0]
        return (turned * rope_ref(k, k, table, torch.tensor([key_position]))[0]).sum()

    assert (score(5, 2) - score(105, 102)).abs() <= 1e-4 * score(5, 2).abs()


Q, TABLE, POSITIONS = torch.ones(4, 2, 8), rope_table(16, 8), torch.arange(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.double()}, "q must be float32 or bfloat16, got float64"),
        ({"q": Q[0]}, "q must be of rank 3, got shape (2, 8)"),
        ({"q": Q[..., :7]}, "q must be of an even head_dim, at least 2, in its last axis, got 7"),
        ({"q": Q.transpose(1, 2)}, "q must be contiguous in its last axis"),
        ({"k": Q[:3]}, "k must be of the shape of q (4, 2, 8), got (3, 2, 8)"),
        ({"k": Q.bfloat16()}, "k must be float32, got bfloat16"),
        ({"table": TABLE.double()}, "table must be float32, got float64"),
        ({"table": TABLE[:, :6]}, "table must be of size 8 (d) in axis 1, got shape (16, 6)"),
        ({"positions": POSITIONS.long()}, "positions must be int32, got int64"),
        ({"positions": POSITIONS[:3]}, "positions must be of size 4 (T) in axis 0, got shape (3)"),
        ({"positions": POSITIONS + 13}, "positions must be in [0, 16), the length of the table, got 16 for token 3"),
        ({"positions": POSITIONS - 1}, "positions must be in [0, 16), the length of the table, got -1 for token 0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rope(**({"q": Q, "k": Q, "table": TABLE, "positions": POSITIONS} | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "length must be at least 1, got 0"),
        ((4, 7), "head_dim must be even and at least 2, got 7"),
        ((4, 8, 0.0), "theta must be positive, got 0.0"),
        ((4, 8, float("nan")), "theta must be positive, got nan"),
    ],
)
def test_bad_table(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_table(*arguments)
