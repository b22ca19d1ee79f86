"""Growing: the function stays, the optimizer's state travels, new units differ and move, what is not growing is named.

The oracles are transformers' implementation, autograd, and optimizers that were fed transported gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.rounding import UNIT, reordering
from torch import Tensor
from transformers import HrmTextForCausalLM

import hrmcore
from hrmcore import optim
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.growth.operators import Growth, grow
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = HRMConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=24,
    num_layers_per_stack=2,
    num_attention_heads=2,
    head_dim=16,
    H_cycles=2,
    L_cycles=2,
    max_position_embeddings=64,
    eos_token_id=3,
)
WIDTH, FFN, HEADS, DEPTH, WORDS = (
    {"hidden_size": 48},
    {"intermediate_size": 40},
    {"num_attention_heads": 4},
    {"num_layers_per_stack": 3},
    {"vocab_size": 70},
)
EVERYTHING = WIDTH | FFN | HEADS | DEPTH | WORDS
IDS = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))


def make_model(config: HRMConfig = CONFIG) -> HRM:
    torch.manual_seed(0)
    return HRM(config)


@torch.no_grad()
def logits(model: HRM) -> Tensor:
    """Of the first 50 tokens, over a prefix and a response."""
    return model(IDS, prefix_length=7)[..., :50]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def packed(vocab: int = 50) -> PackedBatch:
    """Three sequences of 8 instruction and 16 response tokens; every word occurs."""
    generator = torch.Generator().manual_seed(5)
    return PackedBatch(
        ids=torch.randperm(72, generator=generator) % vocab,
        offsets=torch.tensor([0, 24, 48, 72], dtype=torch.int32),
        prefix=torch.full((3,), 8, dtype=torch.int32),
        positions=torch.arange(24, dtype=torch.int32).repeat(3),
        supervised=torch.cat([torch.arange(7, 24) + start for start in (0, 24, 48)]),
        targets=torch.randint(vocab, (51,), generator=generator),
        records=(0, 1, 2),
    )


# The function


@pytest.mark.parametrize(
    "sizes",
    [WIDTH, {"hidden_size": 128}, FFN, HEADS, WORDS, EVERYTHING, EVERYTHING | {"interleaved": True}],
    ids=str,
)
def test_one_growth_keeps_the_logits(sizes: dict[str, Any]) -> None:
    model = make_model()
    bigger = grow(model, **sizes)
    assert difference(logits(bigger), logits(model)) <= reordering(bigger.config)


@pytest.mark.parametrize(
    "sizes",
    [DEPTH, DEPTH | {"interleaved": True}, {"num_layers_per_stack": 5, "interleaved": True}],
    ids=str,
)
def test_more_depth_keeps_the_bits_of_the_logits(sizes: dict[str, Any]) -> None:
    """A new layer adds 0 to the residual stream, and every product keeps its shape."""
    model = make_model()
    assert torch.equal(logits(grow(model, **sizes)), logits(model))


def test_more_ffn_keeps_the_logits_of_a_trained_model() -> None:
    """The embedded one: its logits are large, and its FFN's sums long enough that a library splits them.

    The new units add exact zeros to sums of 640 terms, say, and a library may then take the other terms in another
    order: reordering() allows 1.7e-5 for that.
    """
    model = HRM.from_pretrained(Path(hrmcore.__file__).parent / "assets" / "tiny").requires_grad_(False)
    ids = torch.randint(10, 365, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids, 30)
    for size in (513, 640, 1024):
        bigger = grow(model, intermediate_size=size)
        assert difference(bigger(ids, 30), expected) <= reordering(bigger.config)


def test_any_order_of_four_growths_keeps_the_logits() -> None:
    model = make_model()
    expected = logits(model)
    for order in itertools.permutations((WIDTH, FFN, HEADS, DEPTH)):
        bigger = model
        for sizes in order:
            bigger = grow(bigger, **sizes)
        assert bigger.config == CONFIG.replace(**WIDTH, **FFN, **HEADS, **DEPTH, embedding_scale=None)
        assert difference(logits(bigger), expected) <= reordering(bigger.config)


def test_other_constants_are_kept() -> None:
    """A scale of the embedding that is not sqrt(D), causal text, another eps: all of them in the way of a wrong sum."""
    constants = {"embedding_scale": 3.7, "prefix_lm": False, "rms_norm_eps": 0.1, "rope_theta": 500.0}
    config = CONFIG.replace(position_encoding="xpos", xpos_scale_base=64, attention_window=64, **constants)
    model = make_model(config)
    bigger = grow(model, **EVERYTHING)
    assert difference(logits(bigger), logits(model)) <= reordering(bigger.config)
    assert bigger.config.embedding_scale == pytest.approx(3.7 * math.sqrt(1.5))
    kept = {key: value for key, value in bigger.config.to_dict().items() if key not in (*EVERYTHING, "embedding_scale")}
    assert kept.items() <= config.to_dict().items()


def test_transformers_computes_the_same_before_and_after(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "small")
    bigger = grow(model, **EVERYTHING)
    bigger.save_pretrained(tmp_path / "large")
    kinds = (torch.arange(20) < 7).long().expand_as(IDS)
    small, large = (
        HrmTextForCausalLM.from_pretrained(tmp_path / name).eval()(input_ids=IDS, token_type_ids=kinds).logits
        for name in ("small", "large")
    )
    assert large.shape[-1] == 70
    assert difference(large[..., :50], small) <= reordering(bigger.config)


def test_growing_leaves_the_model_and_shares_nothing_with_it() -> None:
    model = make_model().eval()
    model.embed_tokens.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bigger = hrmcore.grow(model, **FFN, **DEPTH)
    with torch.no_grad():
        for tensor in bigger.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not bigger.training
    assert [name for name, p in bigger.named_parameters() if not p.requires_grad] == ["embed_tokens.weight"]


def test_new_entries_depend_on_the_seed_and_the_name_alone() -> None:
    model = make_model()
    first, again, other = (grow(model, **EVERYTHING, seed=seed).state_dict() for seed in (4, 4, 5))
    torch.manual_seed(99)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        zero = name == "z_L_init" or name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(tensor, other[name]) == zero, name
    layers = [first[f"{stack}_module.layers.2.gqkv_proj.weight"] for stack in "LH"]
    assert not torch.equal(*layers)


def test_new_layers_lie_on_top_or_between_the_old_ones() -> None:
    for interleaved, expected in ((False, [0, 1, None, None, None]), (True, [0, None, 1, None, None])):
        growth = Growth.of(CONFIG, {"num_layers_per_stack": 5}, interleaved=interleaved)
        names = [f"H_module.layers.{layer}.o_proj.weight" for layer in range(5)]
        sources = [None if layer is None else names[layer] for layer in expected]
        assert [growth.source(name) for name in names] == sources


def test_new_reading_entries_are_as_large_as_initialised_ones() -> None:
    bigger = grow(make_model(CONFIG.replace(hidden_size=256)), hidden_size=1024).state_dict()
    for name in ("L_module.layers.0.gqkv_proj.weight", "lm_head.weight"):
        assert float(bigger[name][:, 256:].std()) == pytest.approx(1 / 32, rel=0.03)


# Optimizers

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": optim.AdamW,
    "adamatan2": optim.AdamAtan2,
    "sophia-g": optim.Sophia,
    "sophia-h": lambda params, **options: optim.Sophia(params, variant="H", **options),
}
S = math.sqrt(48 / 32)
FACTORS = {
    "embed_tokens": 1.0,
    "gqkv_proj": 1 / S,
    "gate_up_proj": 1 / S,
    "lm_head": 1 / S,
    "o_proj": S,
    "down_proj": S,
}


def kind(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1]


def placed(name: str, old: Tensor, shape: torch.Size) -> Tensor:
    """The old entries where they lie in the larger tensor, zeros around: written without the code under test."""
    parts = 4 if kind(name) in ("gqkv_proj", "gate_up_proj") else 1  # halves of gate and of up
    columns = 2 if kind(name) == "down_proj" else 1
    rows = []
    for block in old.chunk(parts):
        pieces = block.chunk(columns, dim=1)
        right, below = shape[1] // columns - pieces[0].shape[1], shape[0] // parts - block.shape[0]
        rows.append(torch.cat([F.pad(piece, (0, right, 0, below)) for piece in pieces], dim=1))
    return torch.cat(rows)


def backward(model: HRM, horizon: int | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(packed(), horizon=horizon).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_scaled_weights_are_divided_by_the_scale() -> None:
    """Autograd's word for what the transport of the state rests on."""
    model = make_model()
    # The head's new rows would change the loss: no new words.
    growth = Growth.of(CONFIG, WIDTH | FFN | HEADS | DEPTH)
    old, new = backward(model), backward(growth.model(model))
    for name, gradient in old.items():
        assert growth.factor(name) == pytest.approx(FACTORS[kind(name)])
        mask = placed(name, torch.ones_like(gradient), new[name].shape)
        expected = placed(name, gradient / FACTORS[kind(name)], new[name].shape)
        assert float((new[name] * mask - expected).norm() / expected.norm()) <= 1e-5, name


def feed(optimizer: Any, params: dict[str, Tensor], gradients: list[dict[str, Tensor]], curvature: Any) -> None:
    for step, given in enumerate(gradients):
        for name, parameter in params.items():
            parameter.grad = given.get(name)
        if isinstance(optimizer, optim.Sophia):
            if step % 2 == 0:
                optimizer.update_hessian(*curvature(params))
            optimizer.step(**({"batch_tokens": 51} if optimizer.variant == "G" else {}))
        else:
            optimizer.step()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("which", list(KINDS))
def test_the_state_is_what_transported_gradients_would_have_left(
    which: str, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    growth = Growth.of(CONFIG, EVERYTHING, interleaved=interleaved)
    bigger, fed = growth.model(model), growth.model(model)
    old, new = dict(model.named_parameters()), dict(fed.named_parameters())
    origin = {name: growth.source(name) for name in new}
    generator = torch.Generator().manual_seed(3)
    gradients = [{name: torch.randn(p.shape, generator=generator) for name, p in old.items()} for _ in range(5)]
    transported = [
        {
            name: placed(name, given[source] / FACTORS[kind(name)], parameter.shape)
            for name, parameter in new.items()
            if (source := origin[name]) is not None
        }
        for given in gradients
    ]
    # Sophia-H: the loss is a sum of c p² / 2, so the curvature is c; the larger model has the same loss of the old
    # weights, p ÷ a, and none of the new ones. Directions of ones, for both draw them in other shapes.
    monkeypatch.setattr(torch, "randn", lambda shape, generator=None, device=None: torch.ones(shape))
    c = {name: p.detach().abs() + 0.1 for name, p in old.items()}

    def small_loss(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (sum((c[n] * p**2).sum() for n, p in params.items()) / 2,) if which == "sophia-h" else ()

    def large_loss(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        terms = [
            (placed(name, c[source] / FACTORS[kind(name)] ** 2, p.shape) * p**2).sum()
            for name, p in params.items()
            if (source := origin[name]) is not None
        ]
        return (sum(terms) / 2,) if which == "sophia-h" else ()

    first = KINDS[which](model.parameters(), lr=1e-3)
    feed(first, old, gradients, small_loss)
    grown = growth.optimizer(first, model, bigger)
    other = KINDS[which](fed.parameters(), lr=1e-3)
    feed(other, new, transported, large_loss)
    for name, parameter in bigger.named_parameters():
        ours, theirs = grown.state[parameter], other.state[new[name]]
        assert ours.keys() == theirs.keys()
        assert len(ours) == 3
        for key, value in theirs.items():
            assert value.any() == (origin[name] is not None), (name, key)
            # Five steps of three operations on either side, and the factor: at most 32 roundings.
            assert difference(ours[key], value) <= 32 * UNIT if value.any() else not ours[key].any(), (name, key)


@pytest.mark.parametrize("which", list(KINDS))
def test_the_average_of_the_weights_grows_as_they_do(which: str) -> None:
    """EMAs of weights that wander, and of those weights grown: with lr 0, so that only the average moves."""
    model = make_model()
    growth = Growth.of(CONFIG, EVERYTHING)
    bigger, fed = growth.model(model), growth.model(model)
    options = {"lr": 0.0, "ema": 0.6}
    first, other = KINDS[which](model.parameters(), **options), KINDS[which](fed.parameters(), **options)
    zeros = [{name: torch.zeros_like(p) for name, p in m.named_parameters()} for m in (model, fed)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            fed.load_state_dict(growth.model(model).state_dict())
        feed(
            first,
            dict(model.named_parameters()),
            zeros[:1],
            lambda params: (_zero(params),) if which == "sophia-h" else (),
        )
        feed(
            other,
            dict(fed.named_parameters()),
            zeros[1:],
            lambda params: (_zero(params),) if which == "sophia-h" else (),
        )
    grown = growth.optimizer(first, model, bigger)
    for name, parameter in fed.named_parameters():
        ours, theirs = grown.state[bigger.get_parameter(name)]["ema"], other.state[parameter]["ema"]
        # Four steps of three operations on either side, and the factor: at most 32 roundings.
        assert difference(ours, theirs) <= 32 * UNIT if theirs.any() else not ours.any(), name
    assert not torch.equal(grown.state[bigger.lm_head.weight]["ema"], bigger.lm_head.weight)


def _zero(params: dict[str, Tensor]) -> Tensor:
    """A loss that is twice differentiable and has no curvature worth the name."""
    return sum((0 * p**2).sum() for p in params.values())  # type: ignore[return-value]


def test_options_groups_and_what_was_frozen_are_kept() -> None:
    model = make_model()
    head = [model.lm_head.weight]
    rest = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    model.embed_tokens.weight.requires_grad_(False)
    optimizer = optim.Sophia(
        [{"params": rest, "lr": 1e-2}, {"params": head, "weight_decay": 0.0}], variant="H", ema=0.9
    )
    growth = Growth.of(CONFIG, DEPTH)
    bigger = growth.model(model)
    grown = growth.optimizer(optimizer, model, bigger)
    assert isinstance(grown, optim.Sophia)
    assert grown.variant == "H"
    assert [group["params"] for group in grown.param_groups] == [
        [p for name, p in bigger.named_parameters() if name != "lm_head.weight"],
        [bigger.lm_head.weight],
    ]
    for ours, theirs in zip(grown.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert not grown.state.get(bigger.embed_tokens.weight)


# Training goes on


@pytest.mark.parametrize("mask_steps", [0, 20])
def test_every_new_row_and_column_moves_and_no_two_units_are_equal(mask_steps: int) -> None:
    model = make_model()
    mode = "ramped" if mask_steps else "zero"
    growth = Growth.of(CONFIG, EVERYTHING, mode=mode, mask_steps=mask_steps)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    backward(model)
    optimizer.step()
    bigger = growth.model(model)
    optimizer = growth.optimizer(optimizer, model, bigger)
    before = {name: p.detach().clone() for name, p in bigger.named_parameters()}
    batch = packed(vocab=70)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        loss = bigger.loss(batch)
        loss.backward()
        optimizer.step()
        growth.advance(bigger, step + 1)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in bigger.named_parameters():
        moved = parameter.detach() != before[name]
        old = torch.zeros_like(moved) if growth.source(name) is None else placed_mask(name, moved.shape)
        assert moved.any(1)[~old.any(1)].all(), f"{name}: a new row stands still"
        assert moved.any(0)[~old.any(0)].all(), f"{name}: a new column stands still"
        assert len(parameter.unique(dim=0)) == len(parameter), f"{name}: two rows are equal"
        assert len(parameter.unique(dim=1)[0]) == parameter.shape[1], f"{name}: two columns are equal"


def placed_mask(name: str, shape: torch.Size) -> Tensor:
    old = dict(make_model().named_parameters())[name]
    return placed(name, torch.ones_like(old), shape).bool()


def test_mode_ramped_begins_at_the_old_function_and_ends_at_random_entries() -> None:
    model = make_model()
    growth = Growth.of(CONFIG, EVERYTHING, mode="ramped", mask_steps=4)
    bigger = growth.model(model)
    start = {name: tensor.clone() for name, tensor in bigger.state_dict().items()}
    assert difference(logits(bigger), logits(model)) <= 2e-5
    for step in range(1, 9):
        growth.advance(bigger, step)
        scalar = min(step / 4, 1.0)
        for name, tensor in bigger.state_dict().items():
            expected = start[name] + scalar * growth.ramped_entries(name)
            assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-7), (name, step)
    assert difference(logits(bigger), logits(model)) > 0.01
    state = bigger.state_dict()
    for name in ("L_module.layers.0.o_proj.weight", "H_module.layers.1.down_proj.weight"):
        old = placed_mask(name, state[name].shape)
        assert torch.equal(state[name][old], start[name][old])
        assert state[name][~old].all()
    assert state["H_module.layers.2.down_proj.weight"].all()
    assert state["embed_tokens.weight"].all()
    assert state["z_L_init"].all()


# Refusals


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 16}, "hidden_size would shrink from 32 to 16"),
        ({"hidden_size": 48, "num_layers_per_stack": 1}, "num_layers_per_stack would shrink from 2 to 1"),
        ({"hidden_size": 33}, "hidden_size 33 must be a multiple of num_attention_heads 2"),
        ({"num_attention_heads": 3}, "hidden_size 32 must be a multiple of num_attention_heads 3"),
        ({"H_cycles": 3}, "cycles change the model's function; if that is meant, ask for change_function"),
        ({"L_cycles": 1, "change_function": True}, "L_cycles would shrink from 2 to 1"),
        ({}, "no size differs"),
        ({"hidden_size": 32}, "no size differs"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number of at least 1, got '48'"),
        ({"intermediate_size": 1.5}, "intermediate_size must be of type int, got 1.5"),
        ({"hidden_size": 48, "mode": "gentle"}, "mode must be one of zero, ramped, got 'gentle'"),
        ({"hidden_size": 48, "mode": "ramped"}, "mode 'ramped' takes mask_steps of at least 1"),
        ({"hidden_size": 48, "mask_steps": 5}, "mode 'ramped' takes mask_steps"),
    ],
    ids=str,
)
def test_what_is_not_growing_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grow(make_model(), **sizes)


def test_cycles_change_only_when_asked_for() -> None:
    model = make_model()
    bigger = grow(model, H_cycles=3, change_function=True)
    assert bigger.config.H_cycles == 3
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in bigger.state_dict().items())


def test_configs_that_differ_in_more_than_size_are_refused() -> None:
    larger = CONFIG.replace(hidden_size=64, embedding_scale=None)
    for key, value in {"head_dim": 32, "rope_theta": 9.0, "prefix_lm": False, "eos_token_id": None}.items():
        with pytest.raises(ValueError, match=f"{key} must stay"):
            Growth(CONFIG, larger.replace(**{key: value}))
    with pytest.raises(ValueError, match=r"embedding_scale must become 8\.0, got 5"):
        Growth(CONFIG, CONFIG.replace(hidden_size=64))
    with pytest.raises(ValueError, match="'head_dim' is not a size that grows"):
        Growth.of(CONFIG, {"head_dim": 32})


def test_models_and_optimizers_that_do_not_belong_are_refused() -> None:
    model = make_model()
    growth = Growth.of(CONFIG, FFN)
    bigger = growth.model(model)
    with pytest.raises(ValueError, match="config is not the one"):
        growth.model(bigger)
    with pytest.raises(ValueError, match="SGD is an unknown optimizer"):
        growth.optimizer(torch.optim.SGD(model.parameters()), model, bigger)
    with pytest.raises(ValueError, match="parameters that are not of this model"):
        growth.optimizer(optim.AdamW(make_model().parameters()), model, bigger)
    with pytest.raises(ValueError, match="unknown optimizer slot 'momentum'"):
        growth.tensor("lm_head.weight", model.lm_head.weight, "momentum")
    with pytest.raises(ValueError, match=r"lm_head\.weight: has shape \(50, 31\), expected \(50, 32\)"):
        growth.tensor("lm_head.weight", torch.zeros(50, 31))
