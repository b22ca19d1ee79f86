"""The two halves of a block against the ops that they are made of, which have their own tests."""

from dataclasses import replace

import pytest
import torch
from support.oracle import relative_error, same_bits

from hrmcore.config import HRMConfig
from hrmcore.model import Block, ForwardContext, Layout, Positions
from hrmcore.ops.backend import reference_ops
from hrmcore.ops.rms_norm import rms_norm
from hrmcore.ops.sublayers import (
    _attention_sublayer,
    _attention_sublayer_backward,
    _mlp_sublayer,
    _mlp_sublayer_backward,
    attention_sublayer,
    mlp_sublayer,
)

pytestmark = pytest.mark.native

LAYOUT = Layout.of([9, 1, 14], [4, 1, 0])


def block_and_streams(dtype=torch.float32, position_encoding="rope"):
    config = HRMConfig(
        vocab_size=5,
        hidden_size=24,
        intermediate_size=40,
        num_layers_per_stack=1,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        position_encoding=position_encoding,
    )
    torch.manual_seed(0)
    x, residual = torch.randn(2, 24, 24).to(dtype)
    return Block(config), x, residual, ForwardContext.of(LAYOUT, Positions.of(config, 64))


def in_float64(context):
    log_decay = context.mask.log_decay
    mask = replace(context.mask, log_decay=None if log_decay is None else log_decay.double())
    return replace(context, table=context.table.double(), mask=mask)


def outputs_and_gradients(block, x, residual, context, used):
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_(), *block.parameters()]
    y, u = block(*rms_norm(*inputs[:2], block.config.rms_norm_eps), context)
    value = {"y": y.square(), "u": u**3, "both": y * u}[used].sum()
    return [y, u, *torch.autograd.grad(value, inputs, allow_unused=True)]


@pytest.mark.parametrize("used", ["y", "u", "both"])
@pytest.mark.parametrize("position_encoding", ["rope", "xpos"])
def test_outputs_and_gradients(position_encoding, used):
    block, x, residual, context = block_and_streams(position_encoding=position_encoding)
    ours = outputs_and_gradients(block, x, residual, context, used)
    with reference_ops():
        theirs = outputs_and_gradients(block.double(), x.double(), residual.double(), in_float64(context), used)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None or not a.any()) if b is None else relative_error(a.detach(), b.detach()) <= 2e-6


@pytest.mark.parametrize("position_encoding", ["rope", "xpos"])
def test_float32_weights_under_bfloat16_streams(processor, position_encoding):
    """Autocast's case: the products are in bfloat16, the weights' gradients come back in float32."""
    block, x, residual, context = block_and_streams(torch.bfloat16, position_encoding)
    ours = outputs_and_gradients(block, x, residual, context, "both")
    with reference_ops():
        theirs = outputs_and_gradients(block.double(), x.double(), residual.double(), in_float64(context), "both")
    assert [t.dtype for t in ours] == 4 * [torch.bfloat16] + 4 * [torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a.detach(), b.detach()) <= 2e-2


def test_same_bits_for_any_number_of_threads():
    block, x, residual, context = block_and_streams()
    assert same_bits(lambda: [t.detach() for t in outputs_and_gradients(block, x, residual, context, "both")])


def test_a_second_backward_finds_what_the_first_found():
    block, x, residual, context = block_and_streams()
    x.requires_grad_()
    y, u = block(*rms_norm(x, residual), context)
    first, second = (torch.autograd.grad((y * u).sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.inside_torch
def test_opcheck():
    block, x, residual, context = block_and_streams()
    gqkv, o, gate_up, down = (p.detach().clone() for p in block.parameters())
    positional = (context.table, LAYOUT.positions, LAYOUT.offsets, LAYOUT.prefix, None, None, 0)
    torch.library.opcheck(_attention_sublayer, (x, gqkv, o, 2, *positional))
    _, *kept = _attention_sublayer(x, gqkv, o, 2, *positional)
    sums = torch.zeros_like(gqkv), torch.zeros_like(o), False, False
    for normed in (None, x):
        operands = (residual, normed, *kept, gqkv, o, *positional, 1e-6, x, *sums)
        torch.library.opcheck(_attention_sublayer_backward, operands)
    torch.library.opcheck(_mlp_sublayer, (x, residual, gate_up, down, 1e-6))
    _, u, ab, *normed_and_product = _mlp_sublayer(x, residual, gate_up, down, 1e-6)
    sums = torch.zeros_like(gate_up), torch.zeros_like(down), False, False
    for found in ((None, None), normed_and_product):
        torch.library.opcheck(_mlp_sublayer_backward, (u, ab, *found, gate_up, down, 1e-6, x, None, *sums))


def test_bad_input_is_named_by_the_kernels():
    block, x, residual, context = block_and_streams()
    gqkv, o, gate_up, down = block.parameters()
    rotation = context.table, context.positions
    with pytest.raises(ValueError, match="positions must be of size 3"):
        attention_sublayer(x[:3], residual[:3], gqkv, o, 2, 1e-6, rotation, context.mask)
    with pytest.raises(ValueError, match="residual must be of the shape of the input"):
        mlp_sublayer(x, residual[:3], gate_up, down, 1e-6)
    with pytest.raises(ValueError, match="residual must be float32, got bfloat16"):
        mlp_sublayer(x, residual.bfloat16(), gate_up, down, 1e-6)
