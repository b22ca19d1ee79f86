"""The model: logits against transformers, gradients against a model in plain torch, both written by others or anew.

Every test runs on the kernels and on the ops' references.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.model import HRM, Layout
from hrmcore.ops.backend import reference_active, reference_ops
from hrmcore.ops.sublayers import mlp_sublayer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["kernels", "references"])
def _ops(request: pytest.FixtureRequest) -> Iterator[None]:
    with reference_ops() if request.param == "references" else contextlib.nullcontext():
        yield


def config(**changes: Any) -> HRMConfig:
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_layers_per_stack": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
    return HRMConfig(**values | changes)


def random_model(config: HRMConfig, seed: int = 0) -> HRM:
    """Weights larger than the initialisation's, so that attention is not nearly uniform."""
    torch.manual_seed(seed)
    model = HRM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0 if "gqkv" in name else 1.0)
    return model


def in_transformers(model: HRM) -> HrmTextForCausalLM:
    """The same weights in transformers' model, carried over by hand and not by hrmcore.checkpoint."""
    c = model.config
    theirs = HrmTextForCausalLM(
        HrmTextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers_per_stack,
            num_attention_heads=c.num_attention_heads,
            head_dim=c.head_dim,
            H_cycles=c.H_cycles,
            L_cycles=c.L_cycles,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            embedding_scale=c.embedding_scale,
            prefix_lm=c.prefix_lm,
        )
    )
    state = {
        "lm_head.weight": model.lm_head.weight,
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.z_L_init": model.z_L_init,
    }
    for stack in ("L_module", "H_module"):
        for layer, block in enumerate(getattr(model, stack).layers):
            prefix = f"model.{stack}.layers.{layer}."
            for part, rows in zip(("gate", "q", "k", "v"), block.gqkv_proj.weight.chunk(4), strict=True):
                state[f"{prefix}self_attn.{part}_proj.weight"] = rows
            for part, rows in zip(("gate", "up"), block.gate_up_proj.weight.chunk(2), strict=True):
                state[f"{prefix}mlp.{part}_proj.weight"] = rows
            state[f"{prefix}self_attn.o_proj.weight"] = block.o_proj.weight
            state[f"{prefix}mlp.down_proj.weight"] = block.down_proj.weight
    theirs.load_state_dict(state)
    return theirs.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


SHAPES = [
    config(),
    config(H_cycles=1, L_cycles=1, num_layers_per_stack=1, head_dim=64),
    config(H_cycles=1, L_cycles=4, head_dim=128, num_attention_heads=3),
    config(H_cycles=2, L_cycles=2, head_dim=64, num_attention_heads=1, rope_theta=500.0),
    config(H_cycles=3, L_cycles=1, head_dim=32, num_attention_heads=6, rms_norm_eps=1e-3),
    config(H_cycles=3, L_cycles=4, num_layers_per_stack=1, hidden_size=96, head_dim=128),
    config(H_cycles=2, L_cycles=3, hidden_size=128, head_dim=32, num_attention_heads=4, embedding_scale=0.5),
]


@pytest.mark.parametrize("length", [1, 21, 150])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@torch.no_grad()
def test_logits_are_those_of_transformers(shape: int, length: int) -> None:
    ours = random_model(SHAPES[shape], seed=shape)
    theirs = in_transformers(ours)
    ids = torch.randint(61, (1, length), generator=torch.Generator().manual_seed(shape))
    for prefix in sorted({0, 1, length // 3, length}):
        kinds = (torch.arange(length) < prefix).long()[None]
        expected = theirs(input_ids=ids, token_type_ids=kinds).logits
        logits = ours(ids, prefix_length=prefix)
        assert logits.dtype == torch.float32
        assert logits.shape == (1, length, 61)
        assert relative(logits, expected) <= 1e-5, prefix


@torch.no_grad()
def test_without_prefix_lm_all_is_causal() -> None:
    ours = random_model(config(prefix_lm=False))
    ids = torch.arange(20)[None]
    expected = in_transformers(ours)(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits
    for prefix in (None, 0, 7):
        assert relative(ours(ids, prefix_length=prefix), expected) <= 1e-5


@torch.no_grad()
def test_the_prefix_changes_what_is_computed() -> None:
    """Guards the comparison above: with a mask that ignores the prefix, these would be equal."""
    model = random_model(config())
    ids = torch.arange(20)[None]
    assert relative(model(ids, prefix_length=10), model(ids, prefix_length=0)) > 1e-2
    assert torch.equal(model(ids), model(ids, prefix_length=20))


@torch.no_grad()
def test_a_batch_is_its_rows() -> None:
    model = random_model(config())
    ids = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(1))
    prefixes = [0, 5, 33, 12]
    batched = model(ids, prefix_length=prefixes)
    for row, prefix in enumerate(prefixes):
        assert relative(batched[row], model(ids[row : row + 1], prefix_length=prefix)[0]) <= 1e-6


@torch.no_grad()
def test_the_same_twice_gives_the_same_bits() -> None:
    model = random_model(config())
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(ids, prefix_length=9), model(ids, prefix_length=9))


# Which visits carry gradient, from the paper's rule by hand: ("H", h), or ("L", h, l).
H0, H1, H2 = ("H", 0), ("H", 1), ("H", 2)
GRADED: dict[tuple[int, int], dict[int, set[tuple[Any, ...]]]] = {
    (2, 3): {
        2: {H1, ("L", 1, 2)},
        3: {H1, H0, ("L", 1, 2)},
        4: {H1, H0, ("L", 1, 2), ("L", 1, 1)},
        5: {H1, H0, ("L", 1, 2), ("L", 1, 1), ("L", 1, 0)},
    },
    (3, 2): {
        2: {H2, ("L", 2, 1)},
        3: {H2, H1, ("L", 2, 1)},
        4: {H2, H1, H0, ("L", 2, 1)},
        5: {H2, H1, H0, ("L", 2, 1), ("L", 2, 0)},
    },
    (1, 4): {
        2: {H0, ("L", 0, 3)},
        3: {H0, ("L", 0, 3), ("L", 0, 2)},
        4: {H0, ("L", 0, 3), ("L", 0, 2), ("L", 0, 1)},
        5: {H0, ("L", 0, 3), ("L", 0, 2), ("L", 0, 1), ("L", 0, 0)},
    },
    (2, 1): {
        2: {H1, ("L", 1, 0)},
        3: {H1, H0, ("L", 1, 0)},
        4: {H1, H0, ("L", 1, 0), ("L", 0, 0)},
        5: {H1, H0, ("L", 1, 0), ("L", 0, 0)},
    },
}
HORIZONS = [(cycles, horizon) for cycles, rows in GRADED.items() for horizon in rows]


def plain_logits(w: dict[str, Tensor], c: HRMConfig, ids: Tensor, prefix: int, graded: set[tuple[Any, ...]]) -> Tensor:
    """The model's definition in plain torch, (T) ids -> (T, V); states of visits that are not graded are detached."""
    length, heads, half = len(ids), c.num_attention_heads, c.head_dim // 2
    position = torch.arange(length, dtype=torch.float64)
    angle = position[:, None] * c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    visible = torch.arange(length)[None] < torch.clamp(torch.arange(1, length + 1), min=prefix)[:, None]

    def rms(u: Tensor) -> Tensor:
        return u / torch.sqrt((u * u).mean(-1, keepdim=True) + c.rms_norm_eps)

    def rotated(u: Tensor) -> Tensor:
        a, b = u[..., :half], u[..., half:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def stack(name: str, u: Tensor) -> Tensor:
        for layer in range(c.num_layers_per_stack):
            gqkv, o, gate_up, down = (
                w[f"{name}.layers.{layer}.{part}_proj.weight"] for part in ("gqkv", "o", "gate_up", "down")
            )
            gate, q, k, v = ((rms(u) @ rows.T).view(length, heads, -1) for rows in gqkv.chunk(4))
            scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / math.sqrt(c.head_dim)
            weights = torch.softmax(scores.masked_fill(~visible, -math.inf), -1)
            u = u + (torch.sigmoid(gate) * torch.einsum("hij,jhd->ihd", weights, v)).flatten(1) @ o.T
            a, b = (rms(u) @ gate_up.T).chunk(2, -1)
            u = u + (F.silu(a) * b) @ down.T
        return rms(u)

    assert c.embedding_scale is not None
    z_high = w["embed_tokens.weight"][ids] * c.embedding_scale
    z_low = w["z_L_init"].expand_as(z_high)
    for h in range(c.H_cycles):
        for l in range(c.L_cycles):  # noqa: E741
            z_low = stack("L_module", z_low + z_high)
            z_low = z_low if ("L", h, l) in graded else z_low.detach()
        z_high = stack("H_module", z_high + z_low)
        z_high = z_high if ("H", h) in graded else z_high.detach()
    return z_high @ w["lm_head.weight"].T


def packed(sequences: list[tuple[int, int]], vocab: int) -> PackedBatch:
    """Random sequences of (input length, prefix) packed for training: from the last prefix token on, all predict."""
    generator = torch.Generator().manual_seed(5)
    offsets = torch.tensor([0, *(length for length, _ in sequences)]).cumsum(0)
    supervised = [
        torch.arange(prefix - 1, length) + start
        for (length, prefix), start in zip(sequences, offsets.tolist(), strict=False)
    ]
    return PackedBatch(
        ids=torch.randint(vocab, (int(offsets[-1]),), generator=generator),
        offsets=offsets.int(),
        prefix=torch.tensor([prefix for _, prefix in sequences], dtype=torch.int32),
        positions=torch.cat([torch.arange(length) for length, _ in sequences]).int(),
        supervised=torch.cat(supervised),
        targets=torch.randint(vocab, (sum(map(len, supervised)),), generator=generator),
        records=tuple(range(len(sequences))),
    )


@pytest.mark.parametrize("position_encoding", ["rope", "xpos"])
def test_a_model_in_bfloat16_keeps_its_tables_and_its_loss(position_encoding: str) -> None:
    """Against the same rounded weights in float32 under autocast, which training uses; the tables lose nothing."""
    model = random_model(config(position_encoding=position_encoding))
    batch = packed([(40, 12), (7, 1), (23, 23)], model.config.vocab_size)
    table = model.rope_table.clone()
    half = random_model(model.config).to(torch.bfloat16)
    assert half.rope_table.dtype == torch.float32
    assert torch.equal(half.rope_table, table)
    model.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    losses = [half.loss(batch)]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses.append(model.loss(batch))
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-3)
    for ours, exact in zip(half.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        assert float((ours.grad.float() - exact.grad).norm() / exact.grad.norm()) < 2**-7
    assert torch.equal(half.float().rope_table, table)


def plain_loss(w: dict[str, Tensor], c: HRMConfig, batch: PackedBatch, graded: set[tuple[Any, ...]]) -> Tensor:
    bounds = batch.offsets.tolist()
    rows = [
        plain_logits(w, c, batch.ids[start:end], prefix if c.prefix_lm else 0, graded)
        for start, end, prefix in zip(bounds[:-1], bounds[1:], batch.prefix.tolist(), strict=True)
    ]
    log_probabilities = torch.cat(rows).log_softmax(-1)[batch.supervised]
    return -log_probabilities.gather(1, batch.targets[:, None]).sum()


def leaves(model: HRM) -> dict[str, Tensor]:
    trained = dict(model.named_parameters())
    return {name: value.detach().double().requires_grad_(name in trained) for name, value in model.state_dict().items()}


SEQUENCES = [(23, 9), (1, 1), (40, 39), (12, 1)]


def check_gradients(model: HRM, horizon: int | None, graded: set[tuple[Any, ...]]) -> None:
    batch, w = packed(SEQUENCES, 61), leaves(model)
    loss, expected = model.loss(batch, horizon), plain_loss(w, model.config, batch, graded)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        gradient = w[name].grad
        if gradient is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert relative(parameter.grad, gradient) <= 1e-4, name


@pytest.mark.parametrize(("cycles", "horizon"), HORIZONS)
def test_gradients_at_each_horizon(cycles: tuple[int, int], horizon: int) -> None:
    model = random_model(config(H_cycles=cycles[0], L_cycles=cycles[1]), seed=horizon)
    check_gradients(model, horizon, GRADED[cycles][horizon])


def test_gradients_without_a_horizon() -> None:
    every = {("H", h) for h in range(2)} | {("L", h, low) for h in range(2) for low in range(3)}
    check_gradients(random_model(config()), None, every)


def test_gradients_of_a_causal_model() -> None:
    check_gradients(random_model(config(prefix_lm=False)), 5, GRADED[2, 3][5])


def test_the_embedding_gets_no_gradient_at_horizon_2_and_does_at_3() -> None:
    for horizon in (2, 3):
        model = random_model(config())
        model.loss(packed(SEQUENCES, 61), horizon).backward()
        assert (model.embed_tokens.weight.grad is None) == (horizon == 2)
        assert model.z_L_init.grad is None


@pytest.mark.parametrize(("cycles", "horizon"), HORIZONS)
def test_visits_outside_the_horizon_record_nothing(cycles: tuple[int, int], horizon: int) -> None:
    model = random_model(config(H_cycles=cycles[0], L_cycles=cycles[1], num_layers_per_stack=1))
    batch = packed([(5, 2)], 61)
    layout = Layout(batch.offsets, batch.prefix, batch.positions)
    for h, l, state in model.states(batch.ids, layout, horizon=horizon):  # noqa: E741
        visit = ("H", h) if l == cycles[1] else ("L", h, l)
        assert state.requires_grad == (visit in GRADED[cycles][horizon]), visit


def test_a_horizon_below_two_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon must be at least 2"):
        random_model(config()).loss(packed(SEQUENCES, 61), horizon=1)


def test_the_last_mlp_runs_on_supervised_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that the op sees in one step of two visits of two blocks, and that they get the states of all rows."""
    seen = []

    def watched(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        return mlp_sublayer(x, *others)

    monkeypatch.setattr("hrmcore.model.mlp_sublayer", watched)
    model, batch = random_model(config(H_cycles=1, L_cycles=1)), packed([(200, 190), (40, 10)], 61)
    model.loss(batch, horizon=2)
    assert seen == ([] if reference_active() else [240, 240, 240, 64])
    layout = Layout(batch.offsets, batch.prefix, batch.positions)
    with torch.no_grad():
        chosen, every = (model.hidden(batch.ids, layout, rows=rows) for rows in (batch.supervised, None))
    assert relative(chosen, every[batch.supervised]) <= 1e-6


def test_a_batch_without_supervised_tokens_gives_zeros() -> None:
    """What a rank without records contributes: a gradient for each weight that the others have one for."""
    model, batch = random_model(config()), packed(SEQUENCES, 61)
    loss = model.loss(replace(batch, supervised=batch.supervised[:0], targets=batch.targets[:0]), horizon=5)
    loss.backward()
    assert float(loss.detach()) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("rows", [[3, 2], [-1, 2], [2, 76], [4, 4]])
def test_supervised_rows_outside_the_batch_are_refused(rows: list[int]) -> None:
    batch = replace(packed(SEQUENCES, 61), supervised=torch.tensor(rows), targets=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="rows must be strictly rising"):
        random_model(config()).loss(batch)


def test_evaluation_leaves_no_graph() -> None:
    model = random_model(config())
    with torch.no_grad():
        assert not model.loss(packed(SEQUENCES, 61), horizon=5).requires_grad


def test_sampled_labels_are_the_models_own() -> None:
    """Their loss is the mean entropy of the model's distributions, within its sampling error; the seed decides."""
    model, batch = random_model(config()), packed(SEQUENCES, 61)
    with torch.no_grad():
        final = model.hidden(batch.ids, Layout(batch.offsets, batch.prefix, batch.positions))
        chances = model.lm_head(final[batch.supervised]).double().softmax(-1)
        draws = [model.loss(batch, sampler=torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 30))]
    surprise = -chances.log()
    entropy = (chances * surprise).sum(-1)
    variance = (chances * (surprise - entropy[:, None]) ** 2).sum()
    assert draws[0] == draws[1] != draws[2]
    assert abs(torch.stack(draws[1:]).mean() - entropy.sum()) <= 4 * (variance / 30).sqrt()


def test_the_loss_is_twice_differentiable_in_the_references() -> None:
    """What Sophia-H needs: a Hessian-vector product of the whole model, against a difference of gradients."""
    model, batch = random_model(config()).double(), packed(SEQUENCES[:2], 61)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(6)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model.loss(batch), parameters, create_graph=True))

    with reference_ops():
        product = torch.autograd.grad(gradients(), parameters, direction)
        shifted = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=step)
            shifted.append([g.detach() for g in gradients()])
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=-step)
    difference = torch.cat([((a - b) / 2e-6).flatten() for a, b in zip(*shifted, strict=True)])
    assert relative(torch.cat([p.flatten() for p in product]), difference) <= 1e-5


def test_the_loss_sums_over_sequences() -> None:
    """The rows of one packed batch, each in a batch of its own."""
    model, batch = random_model(config()), packed(SEQUENCES, 61)
    total = 0.0
    for index, (start, end) in enumerate(zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)):
        mine = (batch.supervised >= start) & (batch.supervised < end)
        single = replace(
            batch,
            ids=batch.ids[start:end],
            offsets=torch.tensor([0, end - start], dtype=torch.int32),
            prefix=batch.prefix[index : index + 1],
            positions=batch.positions[start:end],
            supervised=batch.supervised[mine] - start,
            targets=batch.targets[mine],
        )
        total += float(model.loss(single).detach())
    assert float(model.loss(batch).detach()) == pytest.approx(total, rel=1e-6)


BAD_CALLS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"ids": torch.zeros(4, dtype=torch.int64)}, r"ids must be a non-empty \(B, T\) int64 tensor"),
    (lambda: {"ids": torch.zeros(1, 4)}, "ids must be .*float32"),
    (lambda: {"ids": torch.zeros(1, 4, dtype=torch.int32)}, "ids must be .*int32"),
    (lambda: {"ids": torch.zeros(1, 0, dtype=torch.int64)}, "ids must be a non-empty"),
    (lambda: {"ids": [[1, 2]]}, "ids must be .* list"),
    (lambda: {"ids": torch.tensor([[1, 61]])}, r"ids must be in \[0, vocab_size=61\), got 61"),
    (lambda: {"ids": torch.tensor([[-1, 3]])}, r"ids must be in \[0, vocab_size=61\), got -1"),
    (lambda: {"ids": torch.zeros(1, 257, dtype=torch.int64)}, r"257 tokens, the context .* is 256"),
    *[
        (
            lambda wrong=wrong: {"ids": torch.zeros(2, 4, dtype=torch.int64), "prefix_length": wrong},
            "prefix_length must",
        )
        for wrong in (-1, 5, [1], [1, 5], [1, 1, 1], [1, -1], 1.5, "12", [1, 1.5], True)
    ],
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls_name_the_argument(call: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HRM(config(num_layers_per_stack=1))(**call())


def test_initialisation() -> None:
    """A normal cut at 3 sigma whose variance is that of the whole one, 1 / fan_in."""
    torch.manual_seed(0)
    model = HRM(config(vocab_size=700, hidden_size=1024, intermediate_size=640, head_dim=64, num_layers_per_stack=1))
    for name, weight in model.state_dict().items():
        std = 1.0 if name == "z_L_init" else weight.shape[1] ** -0.5
        count = weight.numel()
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(count), name
        assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name
        assert float(weight.abs().max()) <= 3.0445 * std, name  # 3 / sqrt(0.97334), the variance that a cut leaves
        if count > 100_000:
            assert float(weight.abs().max()) > 2.9 * std, name
            # The fourth moment tells a cut normal (2.84) from a normal (3) and from a uniform (1.8).
            assert float((weight / std).pow(4).mean()) == pytest.approx(2.84, abs=0.05), name


def test_the_seed_decides_the_initialisation() -> None:
    first, second, third = random_model(config(), 1), random_model(config(), 1), random_model(config(), 2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, third.state_dict()[name])


def test_the_state_holds_the_tensors_of_a_checkpoint_and_no_more() -> None:
    model = HRM(config())
    assert len(model.state_dict()) == 3 + 2 * 2 * 4
    assert "z_L_init" in model.state_dict()
    assert "z_L_init" not in dict(model.named_parameters())


def test_random_small_shapes_against_plain_torch() -> None:
    choose = random.Random(3)
    for seed in range(8):
        c = config(
            hidden_size=choose.choice([8, 24, 40]),
            intermediate_size=choose.choice([1, 3, 17]),
            num_attention_heads=choose.choice([1, 2, 4]),
            head_dim=choose.choice([8, 24, 40, 256]),
            num_layers_per_stack=choose.choice([1, 3]),
            H_cycles=choose.choice([1, 2]),
            L_cycles=choose.choice([1, 2]),
        )
        model = random_model(c, seed)
        length = choose.randrange(1, 70)
        prefix = choose.randrange(length + 1)
        ids = torch.randint(61, (length,))
        with torch.no_grad():
            expected = plain_logits(leaves(model), c, ids, prefix, set())
            # What is rounded on the way moves the logits as weights rounded once more would, a few times so far: a
            # shape of width 8 can multiply that by hundreds.
            rounded = {name: leaf * (1 + 2.0**-23 * torch.randn_like(leaf)) for name, leaf in leaves(model).items()}
            bound = 8 * relative(plain_logits(rounded, c, ids, prefix, set()), expected)
            assert bound < 1e-3, c
            assert relative(model(ids[None], prefix_length=prefix)[0], expected) <= bound, c
