"""The model's training path through the CUDA kernels: emulated where it can be, otherwise by what reaches a kernel."""

from __future__ import annotations

import pytest
import torch
from support.batches import batch
from support.emulator import emulated_cuda, same_bits_for_every_schedule
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.model import HRM
from hrmcore.ops import attention, backend, cross_entropy, rms_norm, rms_norm_inject, sublayers

pytestmark = pytest.mark.emulated

XPOS = {"position_encoding": "xpos", "xpos_scale_base": 64, "attention_window": 64}


def toy(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_layers_per_stack": 1}
    heads = {"num_attention_heads": 2, "head_dim": 16, "H_cycles": 2, "L_cycles": 2}
    return HRM(HRMConfig(**(shape | heads | {"max_position_embeddings": 128} | changes)))


def loss_and_gradients(model, dtype, packed, horizon=None):
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=dtype == torch.bfloat16):
        loss = model.loss(packed, horizon=horizon)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, XPOS], ids=["rope", "xpos and a window"])
def test_the_loss_and_every_gradient_are_those_of_the_cpu(one_thread, changes, dtype):
    model, packed = toy(**changes), batch()
    expected = loss_and_gradients(model, dtype, packed)
    with emulated_cuda():
        found = loss_and_gradients(model, dtype, packed)
    assert len(found) == 1 + 2 + 2 * 4
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert max(error(*pair) for pair in zip(found, expected, strict=True)) <= allowed


def test_one_table_of_tiles_serves_a_whole_step(one_thread, monkeypatch):
    """Every layer of every visit, forward and backward, goes by the table that the pass began with."""
    made, model, packed = [], toy(num_layers_per_stack=2), batch()
    table = attention._C.attention_table
    monkeypatch.setattr(
        attention._C, "attention_table", lambda **given: [made.append(given["query_rows"]), table(**given)]
    )
    with emulated_cuda():
        loss_and_gradients(model, torch.bfloat16, packed)
        loss_and_gradients(model, torch.float32, packed)  # whose kernels take none
    assert made == [94]


def test_logits_are_those_of_the_cpu(one_thread):
    model, ids = toy(), torch.arange(22).view(2, 11)
    with torch.no_grad():
        expected = model(ids, prefix_length=[3, 11])
        with emulated_cuda():
            found = model(ids, prefix_length=[3, 11])
    assert error(found, expected) <= 1e-5


def test_same_bits_for_every_schedule(one_thread):
    model, packed = toy(), batch((5, 12), (2, 12))
    assert same_bits_for_every_schedule(lambda: loss_and_gradients(model, torch.float32, packed, horizon=3))


class Recorder:
    """In the place of the compiled module: keeps the device of every operand, and the last argument."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.streams: list[object] = []

    def __getattr__(self, op):
        def record(*operands):
            self.devices |= {x.device.type for x in operands if isinstance(x, Tensor)}
            self.streams.append(operands[-1])

        return record


@torch.no_grad()
def test_every_operand_of_a_kernel_is_where_the_inputs_are(monkeypatch):
    """What a CPU tensor made on the way would break, seen without a device: on "meta", in the ops' own code."""
    recorder = Recorder()
    for page in (attention, sublayers, rms_norm, rms_norm_inject, cross_entropy):
        monkeypatch.setattr(page, "_C", recorder)
        monkeypatch.setattr(page, "to_dlpack", lambda x: x)
        monkeypatch.setattr(page, "stream_of", lambda x: "stream")
    monkeypatch.setattr(attention, "runs_on_cuda", lambda x: True)
    model = toy(**XPOS).bfloat16().to("meta")
    packed, block = batch().to(torch.device("meta")), model.L_module.layers[0]
    x = torch.empty(len(packed.ids), 24, dtype=torch.bfloat16, device="meta")
    gqkv, o, gate_up, down = block.parameters()
    positional = (model.rope_table, packed.positions, packed.offsets, packed.prefix, model.xpos_log_decay, None, 64)
    rms_norm._add_rms_norm._init_fn(x, x, 1e-6)
    rms_norm._rms_norm_backward._init_fn(x, x, x, 1e-6)
    _, *kept = sublayers._attention_sublayer._init_fn(x, gqkv, o, 2, *positional)
    sums = torch.empty_like(gqkv), torch.empty_like(o), True, False
    sublayers._attention_sublayer_backward._init_fn(x, None, *kept, gqkv, o, *positional, 1e-6, x, *sums)
    state, _, *kept = rms_norm_inject._rms_norm_inject._init_fn(x, x, x, 1e-6)
    rms_norm_inject._rms_norm_inject_backward._init_fn(state, *kept, x, x, x, 1e-6, True)
    _, u, ab, *_ = sublayers._mlp_sublayer._init_fn(x, x, gate_up, down, 1e-6)
    sums = torch.empty_like(gate_up), torch.empty_like(down), True, False
    sublayers._mlp_sublayer_backward._init_fn(u, ab, None, None, gate_up, down, 1e-6, x, None, *sums)
    rows = (x, model.lm_head.weight, packed.supervised, packed.targets)
    _, lse = cross_entropy._cross_entropy._init_fn(*rows)
    cross_entropy._cross_entropy_backward._init_fn(*rows, lse, torch.tensor(1.0, device="meta"), True)
    assert recorder.devices == {"meta"}
    assert recorder.streams == 15 * ["stream"]


def test_a_model_for_cuda_says_what_is_missing(monkeypatch):
    model = toy()
    for target in ("cuda", "cuda:1", torch.device("cuda")):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(RuntimeError, match=r"device 'cuda': torch \S+ is built without CUDA; use device 'cpu'"):
            model.to(target)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="torch finds no CUDA device on this machine"):
            model.to(device=target)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend._C, "__file__", "/nowhere/_C.so")
    with pytest.raises(RuntimeError, match="this hrmcore is built without CUDA kernels"):
        model.to("cuda", torch.bfloat16)
    assert model.to(torch.bfloat16) is model
    assert model.lm_head.weight.dtype == torch.bfloat16
