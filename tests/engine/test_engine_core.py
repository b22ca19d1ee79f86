"""The packed engine against HRM.forward (float32) and against float64 emulations of each packing."""

from __future__ import annotations

import functools
import random
import resource
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.engines import distance, set_weights
from torch import Tensor

from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import INT4_DIVISORS
from hrmcore.model import HRM
from hrmcore.ops.rope import rope_table

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

# The sets whose kernels differ most from the plain ones, as far as this processor has them.
WIDE_ISAS = [isa for isa in ("vnni", "bf16", "amx") if isa in _C.supported_isas()] or _C.supported_isas()[-1:]
# The sets whose prefixes of so many tokens and more meet such weights in tiles.
TILES = {
    "bfloat16": {"bf16": 1, "amx": 1},
    "int8": {"avx2": 24, "avxvnni": 24, "avx512": 24, "vnni": 24, "bf16": 24, "amx": 1},
    "int4": {"avxvnni": 24, "vnni": 24, "bf16": 24, "amx": 1},
}

SHAPES = {
    # heads x head_dim != width, widths that fill no panel, every cycle count
    "tiny": HRMConfig(97, 42, 56, 1, 3, 8, 1, 1, max_position_embeddings=300),
    "d32": HRMConfig(130, 96, 200, 2, 2, 32, 2, 3, max_position_embeddings=300),
    "d64": HRMConfig(300, 129, 352, 2, 3, 64, 3, 2, max_position_embeddings=300),
    "d128": HRMConfig(257, 320, 512, 1, 2, 128, 2, 4, max_position_embeddings=300),
}


@functools.cache
def make_model(shape: str) -> HRM:
    torch.manual_seed(0)
    return HRM(SHAPES[shape]).eval()


@functools.cache
def expected_logits(shape: str, length: int, prefix: int) -> Tensor:
    with torch.no_grad():
        return make_model(shape)(torch.tensor([some_ids(SHAPES[shape], length)]), prefix)[0]


def make_engine(
    model: HRM,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    threads: int = 1,
    cache_tokens: int = 4096,
    window: int = 0,
) -> _C.Engine:
    config = model.config
    engine = _C.Engine(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        L_layers=config.depths[0],
        H_layers=config.depths[1],
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        H_cycles=config.H_cycles,
        L_cycles=config.L_cycles,
        eps=config.rms_norm_eps,
        embedding_scale=config.embedding_scale,
        rope=rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta),
        dtype=dtype,
        kv_dtype=kv_dtype or ("float32" if dtype == "float32" else "bfloat16"),
        threads=threads,
        cache_tokens=cache_tokens,
        window=window,
    )
    set_weights(engine, model)
    return engine


def step(engine: _C.Engine, requests: list[int], ids: list[list[int]], every_row: bool = False) -> torch.Tensor:
    rows = sum(map(len, ids)) if every_row else len(ids)
    logits = torch.full((rows, engine.vocab_size), float("nan"))
    engine.step(requests, ids, logits, every_row)
    return logits


def all_logits(engine: _C.Engine, ids: list[int], prefix: int) -> torch.Tensor:
    request = engine.open(prefix)
    logits = step(engine, [request], [ids], every_row=True)
    engine.close(request)
    return logits


def some_ids(config: HRMConfig, count: int, seed: int = 1) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_the_model(shape: str, isa: str) -> None:
    engine = make_engine(make_model(shape))
    for length, prefix in [(1, 0), (1, 1), (7, 3), (70, 65), (131, 131), (131, 0)]:
        logits = all_logits(engine, some_ids(SHAPES[shape], length), prefix)
        assert distance(logits, expected_logits(shape, length, prefix)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1, 20, 66])
def test_cached_decoding_equals_the_model(shape: str, prefix: int) -> None:
    engine = make_engine(make_model(shape))
    ids = some_ids(SHAPES[shape], 131)
    request = engine.open(prefix)
    first = max(prefix, 1)
    rows = [step(engine, [request], [ids[:first]])]
    rows += [step(engine, [request], [[token]]) for token in ids[first:]]
    assert distance(torch.cat(rows), expected_logits(shape, 131, prefix)[first - 1 :]) < 1e-5


def chunks_of(matrix: Tensor, columns: int) -> Tensor:
    """(R, K) -> (R, chunks, columns), the last chunk filled with zeros."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns)).unflatten(1, (-1, columns))


def groups_of(matrix: Tensor) -> Tensor:
    return chunks_of(matrix, 32)


def round_groups(matrix: Tensor, scale: Tensor) -> Tensor:
    """Rows of integers times scales (R, groups), back in the matrix's shape; int8, symmetric."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    q = (groups_of(matrix) * inverse).round().clamp(-127, 127)
    return (q * scale[..., None]).flatten(1)[:, : matrix.shape[1]]


def int8_weights(matrix: Tensor) -> Tensor:
    return round_groups(matrix, int8_scales(matrix))


def int8_scales(matrix: Tensor) -> Tensor:
    return (groups_of(matrix).abs().amax(-1) / 127).bfloat16().float()


def int4_candidates(matrix: Tensor) -> Tensor:
    """(R, groups, 12): the scales among which a group's is chosen."""
    groups = groups_of(matrix)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return (extreme / torch.tensor(INT4_DIVISORS)).bfloat16().float()


def int4_scales(matrix: Tensor, packed: Tensor) -> Tensor:
    """(R, groups): those that gave what is packed."""
    candidates = int4_candidates(matrix)
    whole = (groups_of(matrix)[..., None, :] / candidates[..., None]).round().clamp(-8, 7) * candidates[..., None]
    miss = (whole - groups_of(packed)[..., None, :]).abs().sum(-1).nan_to_num(0)
    return candidates.gather(-1, miss.argmin(-1, keepdim=True))[..., 0]


def int8_activations(x: Tensor) -> Tensor:
    return round_groups(x, groups_of(x).abs().amax(-1) / 127)


def packed_weights(engine: _C.Engine, model: HRM) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        if name != "rope_table":
            out = torch.full((1, *tensor.shape)[-2:], float("nan"))
            engine.get_weight(name, out)
            weights[name] = out.view(tensor.shape)
    return weights


class Unit(NamedTuple):
    """What the tiles compute with, in the first rows."""

    rows: int
    attention_rows: int  # of these
    weights: dict[str, Tensor]
    activations: Callable[[Tensor], Tensor]


def rounds_weights(isa: str) -> bool:
    """Whether a prefix's attention over a rounded cache has products of bfloat16."""
    return isa in ("bf16", "amx")


def unit_of(model: HRM, packed: dict[str, Tensor], dtype: str, rows: int) -> Unit:
    names = [name for name in packed if name.endswith("proj.weight")]
    attention_rows = rows if rounds_weights(_C.isa()) else 0
    if dtype == "bfloat16":
        return Unit(rows, attention_rows, {name: bfloat16(packed[name]) for name in names}, bfloat16)
    weights = {}
    for name in names:
        weight = model.state_dict()[name]
        scales = int8_scales(weight) if dtype == "int8" else int4_scales(weight, packed[name])
        weights[name] = one_scale(packed[name], scales, dtype)
    return Unit(rows, attention_rows, weights, unit_activations)


def one_scale(packed: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Groups with scales (R, groups), brought to one scale for each row and 256 columns; float64."""
    whole, worth, factor = (32768, 1.0, 1) if dtype == "int8" else (32512, 8 / 127, 16)
    top = chunks_of(scale, 8).abs().amax(-1).clamp(min=1e-30)  # (R, chunks)
    top = top.repeat_interleave(8, -1)[:, : scale.shape[1]]
    shares = (scale * (whole / top)).round().clamp(max=32767)
    q = (groups_of(packed) * torch.where(scale == 0, 0.0, 1 / scale)[..., None]).round() * factor
    rescaled = ((q.double() * shares[..., None] + 2**14) / 2**15).floor()
    return (rescaled * (top.double() * worth)[..., None]).flatten(1)[:, : packed.shape[1]]


def unit_activations(x: Tensor) -> Tensor:
    """int8 with one scale for each row and 256 columns."""
    columns = chunks_of(x, 256)
    scale = columns.abs().amax(-1, keepdim=True) / 127
    return ((columns / scale.clamp(min=1e-30)).round() * scale).flatten(1)[:, : x.shape[1]]


def emulate(
    config: HRMConfig,
    weights: dict[str, Tensor],
    ids: list[int],
    prefix: int,
    activations: Callable[[Tensor], Tensor],
    round_kv: Callable[[Tensor], Tensor],
    unit: Unit | None = None,
) -> Tensor:
    """HRM in float64 from the formulas of the paper, with what meets a weight and what is cached rounded as asked.

    The first rows are the tiles', if there is a unit that takes them: its own weights and activations in the stacks.
    With products of bfloat16 the queries and the weights of the keys are that, too, if what is cached is rounded.
    """
    rounded_rows = 0 if unit is None else unit.attention_rows
    eps, heads, dim, length = config.rms_norm_eps, config.num_attention_heads, config.head_dim, len(ids)
    cos, sin = rope_table(length, dim, config.rope_theta).double()[:, None].chunk(2, -1)
    last = torch.arange(1, length + 1).clamp(min=prefix)
    hidden_keys = torch.arange(length) >= last[:, None]
    w = {name: tensor.double() for name, tensor in weights.items()}

    def rms(u: Tensor) -> Tensor:
        return u / (u.square().mean(-1, keepdim=True) + eps).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        if unit is None or name == "lm_head.weight":
            return activations(x) @ w[name].T
        rounded = unit.activations(x[: unit.rows]) @ unit.weights[name].T
        return torch.cat([rounded, activations(x[unit.rows :]) @ w[name].T])

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def stack(u: Tensor, name: str) -> Tensor:
        for layer in range(config.num_layers_per_stack):
            prefix_name = f"{name}.layers.{layer}."
            gqkv = linear(rms(u), prefix_name + "gqkv_proj.weight").view(length, 4, heads, dim)
            gate, q, k, v = gqkv.unbind(1)
            tiles = 0 if round_kv is same else rounded_rows
            q = rotate(q) / dim**0.5
            q[:tiles] = bfloat16(q[:tiles])
            scores = torch.einsum("ihd,jhd->hij", q, round_kv(rotate(k))).masked_fill(hidden_keys, -torch.inf)
            shares = (scores - scores.amax(-1, keepdim=True)).exp()
            total = shares.sum(-1, keepdim=True)
            shares[:, :tiles] = bfloat16(shares[:, :tiles])
            mixed = torch.einsum("hij,jhd->ihd", shares / total, round_kv(v))
            u = u + linear((gate.sigmoid() * mixed).flatten(1), prefix_name + "o_proj.weight")
            a, b = linear(rms(u), prefix_name + "gate_up_proj.weight").chunk(2, -1)
            u = u + linear(torch.nn.functional.silu(a) * b, prefix_name + "down_proj.weight")
        return rms(u)

    z_H = config.embedding_scale * w["embed_tokens.weight"][ids]
    z_L = w["z_L_init"].expand_as(z_H)
    for _ in range(config.H_cycles):
        for _ in range(config.L_cycles):
            z_L = stack(z_L + z_H, "L_module")
        z_H = stack(z_H + z_L, "H_module")
    return linear(z_H, "lm_head.weight")


def same(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


PACKINGS = [
    ("float32", "float32", same, same),
    ("bfloat16", "float32", same, same),
    ("bfloat16", "bfloat16", same, bfloat16),
    ("int8", "float32", int8_activations, same),
    ("int4", "float32", int8_activations, same),
    ("int8", "bfloat16", int8_activations, bfloat16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "kv_dtype", "activations", "round_kv"), PACKINGS)
def test_single_tokens_equal_an_emulation(
    shape: str, dtype: str, kv_dtype: str, activations: Callable[[Tensor], Tensor], round_kv: Callable[[Tensor], Tensor]
) -> None:
    """Exact but for a rare value that float32 and float64 round to different sides; such a row may differ."""
    model = make_model(shape)
    engine = make_engine(model, dtype, kv_dtype)
    tokens = some_ids(model.config, 40)
    logits = step(engine, [engine.open(0) for _ in tokens], [[token] for token in tokens])
    weights = packed_weights(engine, model)
    emulated = [emulate(model.config, weights, [token], 0, activations, round_kv)[0] for token in tokens]
    rows = [distance(row, other) for row, other in zip(logits, emulated, strict=True)]
    exact = sum(row < 5e-6 for row in rows)
    assert exact == len(rows) if activations is round_kv else exact >= 0.6 * len(rows)


@pytest.mark.parametrize("isa", WIDE_ISAS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "kv_dtype", "activations", "round_kv"), PACKINGS)
def test_sequences_are_as_near_an_emulation_as_rounding_allows(
    shape: str,
    dtype: str,
    kv_dtype: str,
    activations: Callable[[Tensor], Tensor],
    round_kv: Callable[[Tensor], Tensor],
    isa: str,
) -> None:
    """In a sequence each such value reaches all later ones: the bound is what the rounding itself costs."""
    model = make_model(shape)
    engine = make_engine(model, dtype, kv_dtype)
    ids, weights = some_ids(model.config, 67), packed_weights(engine, model)
    unit = unit_of(model, weights, dtype, 25) if isa in TILES.get(dtype, ()) else None
    emulated = emulate(model.config, weights, ids, 25, activations, round_kv, unit)
    cost = distance(emulated, emulate(model.config, weights, ids, 25, same, same))
    assert distance(all_logits(engine, ids, 25), emulated) < max(1.5 * cost, 5e-6)


# Of longer prefixes too many of attention's weights are rounded for a prompt to be without such a value.
TILED = [
    (isa, *packing)
    for isa in _C.supported_isas()
    for packing in PACKINGS
    if isa in TILES.get(packing[0], ())
    and (packing[3] is same or not rounds_weights(isa) or TILES[packing[0]][isa] == 1)
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("isa", "dtype", "kv_dtype", "activations", "round_kv"), TILED, indirect=["isa"])
def test_a_prefix_of_one_token_repeated_equals_an_emulation(
    shape: str,
    dtype: str,
    kv_dtype: str,
    activations: Callable[[Tensor], Tensor],
    round_kv: Callable[[Tensor], Tensor],
    isa: str,
) -> None:
    """In tiles from a length on, exact but for a rare value that float32 and float64 round to different sides.

    Whatever attention's weights are, they mix equal values, so no such value reaches another row.
    """
    model, border = make_model(shape), TILES[dtype][isa]
    engine = make_engine(model, dtype, kv_dtype)
    weights, tokens = packed_weights(engine, model), some_ids(model.config, 20)
    for length in range(max(border - 1, 1), border + 1):
        prompts = [[token] * length for token in tokens]
        logits = step(engine, [engine.open(length) for _ in tokens], prompts)
        unit = unit_of(model, weights, dtype, length) if length == border else None
        emulated = [emulate(model.config, weights, ids, length, activations, round_kv, unit)[-1] for ids in prompts]
        rows = [distance(row, other) for row, other in zip(logits, emulated, strict=True)]
        assert sum(row < 5e-6 for row in rows) >= 0.5 * len(rows)


@pytest.mark.skipif("bf16" not in _C.supported_isas(), reason="the processor has no products in bfloat16")
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [0, 64, 128])
@pytest.mark.parametrize("prefix", [1, 17, 64, 131, 300])
def test_a_prefix_attends_alike_in_tiles(prefix: int, window: int, kv_dtype: str) -> None:
    model = make_model("d64")
    ids = some_ids(model.config, prefix)
    before, rows = _C.isa(), {}
    tiled = [isa for isa in ("bf16", "amx") if isa in _C.supported_isas()]
    for isa in ("vnni", *tiled):
        _C.set_isa(isa)
        rows[isa] = all_logits(make_engine(model, "bfloat16", kv_dtype, window=window), ids, prefix)
    _C.set_isa(before)
    for isa in tiled:
        assert 0 < distance(rows[isa], rows["vnni"]) < {"bfloat16": 1e-2, "int8": 3e-2}[kv_dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_of_each_weight(shape: str, isa: str) -> None:
    model = make_model(shape)
    packed = {dtype: packed_weights(make_engine(model, dtype), model) for dtype in ("float32", "bfloat16", "int8")}
    for name, weight in model.state_dict().items():
        if name != "rope_table":
            plain = name in ("embed_tokens.weight", "z_L_init")
            half = weight.bfloat16().float() if name != "z_L_init" else weight
            assert torch.equal(packed["float32"][name], weight), name
            assert torch.equal(packed["bfloat16"][name], half), name
            assert torch.equal(packed["int8"][name], half if plain else int8_weights(weight)), name


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_finds_the_best_of_its_scales(shape: str, isa: str) -> None:
    model = make_model(shape)
    packed = packed_weights(make_engine(model, "int4"), model)
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            continue
        groups = groups_of(weight)
        scales = int4_candidates(weight)[..., None]  # (R, groups, 12, 1)
        errors = ((groups[..., None, :] / scales).round().clamp(-8, 7) * scales - groups[..., None, :]).square().sum(-1)
        error = (groups_of(packed[name]) - groups).square().sum(-1)
        assert (error <= errors.nan_to_num(0).amin(-1) * (1 + 1e-5) + 1e-12).all(), name


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_a_rounded_cache_stays_close(kv_dtype: str) -> None:
    model = make_model("d64")
    logits = all_logits(make_engine(model, "float32", kv_dtype), some_ids(model.config, 131), 66)
    bound = {"bfloat16": 8e-3, "int8": 3e-2}[kv_dtype]
    assert 1e-4 < distance(logits, expected_logits("d64", 131, 66)) < bound


VARIANTS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16")]


@pytest.mark.parametrize(("dtype", "kv_dtype"), VARIANTS)
def test_bits_do_not_depend_on_the_batch_chunks_or_threads(dtype: str, kv_dtype: str, isa: str) -> None:
    model = make_model("d32")
    prompts = [(some_ids(model.config, n, seed=n), prefix) for n, prefix in [(40, 11), (70, 65), (3, 0), (96, 96)]]
    alone = []
    for ids, prefix in prompts:
        engine = make_engine(model, dtype, kv_dtype)
        request = engine.open(prefix)
        first = max(prefix, 1)
        rows = [step(engine, [request], [ids[:first]], every_row=True)]
        rows += [step(engine, [request], [[token]]) for token in ids[first:]]
        alone.append(torch.cat(rows))
    for threads in (1, 2, 3):
        engine = make_engine(model, dtype, kv_dtype, threads)
        assert engine.threads == threads
        # All together, whole.
        requests = [engine.open(prefix) for _, prefix in prompts]
        together = step(engine, requests, [ids for ids, _ in prompts], every_row=True)
        assert torch.equal(together, torch.cat(alone))
        for request in requests:
            engine.close(request)
        # Together in pieces of changing size, joining and leaving at different times.
        shuffle = random.Random(threads)
        open_requests: dict[int, tuple[int, int]] = {}
        waiting = list(range(len(prompts)))
        while waiting or open_requests:
            if waiting:
                index = waiting.pop()
                open_requests[engine.open(prompts[index][1])] = (index, 0)
            pieces, wanted = [], []
            for request, (index, done) in open_requests.items():
                ids, prefix = prompts[index]
                size = max(prefix, 1) if done == 0 else min(shuffle.randint(1, 15), len(ids) - done)
                pieces.append(ids[done : done + size])
                wanted.append(alone[index][done + size - 1])
                open_requests[request] = (index, done + size)
            assert torch.equal(step(engine, list(open_requests), pieces), torch.stack(wanted))
            for request in [r for r, (index, done) in open_requests.items() if done == len(prompts[index][0])]:
                engine.close(request)
                del open_requests[request]


@pytest.mark.memory
def test_memory_stays_flat_and_pages_come_back() -> None:
    model = make_model("tiny")
    engine = make_engine(model, "int8", threads=2)
    ids = some_ids(model.config, 130)

    def churn(times: int) -> int:
        for _ in range(times):
            requests = [engine.open(2), engine.open(0)]
            step(engine, requests, [ids[:3], ids[:1]])
            for request in requests:
                engine.close(request)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = churn(200)
    after = churn(2000)
    assert after - before < 1024  # KiB
    assert engine.cache_pages_used == 0
    assert engine.open_requests == 0


def test_errors_name_the_fault_and_leave_requests_unharmed() -> None:
    model = make_model("tiny")
    engine = make_engine(model, cache_tokens=192)
    ids = some_ids(model.config, 100)
    running = engine.open(5)
    step(engine, [running], [ids[:60]])
    other = engine.open(3)

    def refused(
        error: type[Exception], match: str, requests: list[int], tokens: list[list[int]], rows: int = 1
    ) -> None:
        logits = torch.zeros(rows, engine.vocab_size)
        with pytest.raises(error, match=match):
            engine.step(requests, tokens, logits, False)

    refused(ValueError, r"ids must be in \[0, 97\), got 97", [running], [[97]])
    refused(ValueError, r"ids must be in \[0, 97\), got -1", [running], [[-1]])
    refused(ValueError, "requests must be open, got request 99", [99], [[1]])
    refused(ValueError, "request 0 twice", [running, running], [[1], [1]], 2)
    refused(ValueError, "at least one token", [running], [[]])
    refused(ValueError, "at least one request", [], [], 0)
    refused(ValueError, "one list for each", [running], [])
    refused(ValueError, "all 3 tokens of the prefix", [other], [[1, 2]])
    refused(ValueError, "context of 300", [running], [[1] * 241])
    refused(ValueError, "logits must be of size 1", [running], [[1]], 2)
    refused(MemoryError, "2 of its 3 pages of 64 tokens are free", [running, other], [[1] * 10, ids], 2)
    assert engine.cache_pages_used == 1
    with pytest.raises(ValueError, match="request must be open, got request 99"):
        engine.close(99)
    with pytest.raises(ValueError, match="prefix_length must be between 0 and the context of 300"):
        engine.open(301)
    engine.close(other)
    refused(ValueError, "got request 1, which is not", [other], [[1]])
    rest = [step(engine, [running], [[token]]) for token in ids[60:]]
    whole = all_logits(make_engine(model), ids, 5)
    assert torch.equal(torch.cat(rest), whole[60:])


def test_a_broken_engine_is_refused() -> None:
    model = make_model("tiny")
    with pytest.raises(ValueError, match="kv_dtype must be float32, bfloat16 or int8"):
        make_engine(model, "int4", "int4")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, int8 or int4, got 'fp8'"):
        make_engine(model, "fp8", "float32")
    with pytest.raises(ValueError, match="cache_tokens must be at least 64"):
        make_engine(model, cache_tokens=63)
    with pytest.raises(ValueError, match="threads must be between 1 and 1024, got 0"):
        make_engine(model, threads=0)
    engine = make_engine(model)
    with pytest.raises(ValueError, match="name must be a tensor of the model, got 'head'"):
        engine.set_weight("head", torch.zeros(1))
    with pytest.raises(ValueError, match=r"lm_head.weight must be of size 97 \(rows\)"):
        engine.set_weight("lm_head.weight", torch.zeros(96, 42))
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got float64"):
        engine.set_weight("lm_head.weight", torch.zeros(97, 42, dtype=torch.float64))
    engine.allocate_weights()
    with pytest.raises(RuntimeError, match="no weights for"):
        step(engine, [engine.open(0)], [[1]])
