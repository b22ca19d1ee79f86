"""The baselines as configurations of the one recurrence: shared stacks (TRM), looped and plain Transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrmcore.checkpoint.hrm_text import read_config
from hrmcore.config import HRMConfig
from hrmcore.engine.engine import load
from hrmcore.lens import look
from hrmcore.model import HRM, Layout
from hrmcore.planner import memory, parameters

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])


def config(**changes: Any) -> HRMConfig:
    values: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers_per_stack": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return HRMConfig(**values | changes)


@pytest.fixture
def shared() -> HRM:
    torch.manual_seed(0)
    return HRM(config(shared_stacks=True))


def untied(model: HRM) -> HRM:
    """An HRM of two stacks with the weights of the one."""
    two = HRM(model.config.replace(shared_stacks=False))
    state = model.state_dict()
    two.load_state_dict(state | {name.replace("L_module", "H_module"): weight for name, weight in state.items()})
    return two


def test_shared_stacks_are_one(shared: HRM) -> None:
    two = untied(shared)
    assert torch.equal(shared(IDS), two(IDS))
    assert not [name for name in shared.state_dict() if name.startswith("H_module")]
    assert sum(p.numel() for p in shared.parameters()) == parameters(shared.config)
    for model in (shared, two):
        model(IDS, 3).square().sum().backward()
    for name, parameter in shared.named_parameters():
        expected = two.get_parameter(name).grad
        assert expected is not None
        if name.startswith("L_module"):  # what both stacks asked of it
            other = two.get_parameter(name.replace("L_module", "H_module")).grad
            assert other is not None
            expected = expected + other
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_copy_and_a_state_keep_the_stacks_one(shared: HRM) -> None:
    other = copy.deepcopy(shared)
    assert other.H_module is other.L_module
    assert other.L_module is not shared.L_module
    fresh = HRM(shared.config)
    fresh.load_state_dict(shared.state_dict())
    assert torch.equal(fresh(IDS), shared(IDS))


def test_shared_stacks_are_released_as_two(shared: HRM, tmp_path: Path) -> None:
    """The format knows two stacks: what is written computes the same, here, in our engine and in transformers."""
    from transformers import AutoModelForCausalLM

    shared.save_pretrained(tmp_path)
    expected = shared(IDS).detach()
    assert read_config(tmp_path) == shared.config.replace(shared_stacks=False)
    assert torch.equal(HRM.from_pretrained(tmp_path)(IDS), expected)
    ours = load(tmp_path, dtype="float32").logits(IDS[0].tolist())
    assert float((ours - expected[0]).norm() / expected.norm()) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS, token_type_ids=torch.ones_like(IDS)).logits.detach()
    assert float((theirs - expected).norm() / expected.norm()) < 1e-5


def test_the_lens_sees_shared_stacks_once_a_visit(shared: HRM) -> None:
    seen, twice = look(shared, IDS[0].tolist()), look(untied(shared), IDS[0].tolist())
    assert seen.steps == twice.steps
    assert torch.equal(seen.logits[-1], shared(IDS)[0, -1])


def test_one_stack_needs_less_memory() -> None:
    two, one = (memory(config(shared_stacks=shared), 5, 100, 0.5, 1, "float32") for shared in (False, True))
    assert one.weights / two.weights == parameters(config(shared_stacks=True)) / parameters(config())
    assert one.activations == two.activations
    assert one.peak < two.peak


def test_one_cycle_of_each_is_a_transformer() -> None:
    """Every layer once, in order: L's on the embedding, H's on that plus the embedding."""
    torch.manual_seed(0)
    model = HRM(config(H_cycles=1, L_cycles=1))
    layout = Layout.of([7], [7])
    order: list[str] = []
    for name, stack in (("L", model.L_module), ("H", model.H_module)):
        for index, block in enumerate(stack.layers):
            block.register_forward_hook(lambda *_, text=f"{name}{index}": order.append(text))
    states: list[Tensor] = [state for _, _, state in model.states(IDS[0], layout)]
    assert order == ["L0", "L1", "H0", "H1"]
    assert len(states) == model.config.visits == 2
