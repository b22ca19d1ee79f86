"""What a training run costs, before money is spent: parameters, FLOPs, memory, hours, dollars. Imports no torch.

Letters: D width, A attention width (heads × head_dim), F ffn width, V vocabulary, K gradient horizon. FLOPs are the
model's, two for a multiply-add: recomputation in backward is not counted, and the last MLP of unsupervised tokens is,
although the kernels skip it. Hours therefore follow from model FLOPs utilization (MFU) as it is commonly stated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from hrmcore.config import HRMConfig, LoraConfig, default_intermediate_size
from hrmcore.gpus import Device

LOGITS_AT_ONCE = 1 << 23  # the most that a chunk of hrmcore.ops.cross_entropy holds
PRECISIONS = {"bfloat16": 2, "float32": 4}  # bytes of an activation
MAX_TOKENS = 1e18


@dataclass(frozen=True)
class Horizon:
    """The gradient horizon K over a run: from `first` linearly to `last` over the first `fraction` of the tokens."""

    first: int = 2
    last: int = 5
    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.last:
            raise ValueError(f"horizons must satisfy 2 <= first <= last, got {self.first} and {self.last}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"the horizon's fraction must be in [0, 1], got {self.fraction:g}")

    def shares(self, start: float, stop: float) -> list[tuple[int, float]]:
        """(K, share of the whole run) between two points of the run, both in [0, 1]; K is a whole number, rounded down.

        The published trainer's schedule (arXiv 2605.20613), the one of `hrmcore train`.
        """
        steps = range(self.first, self.last)
        width = self.fraction / len(steps) if steps else 0.0
        bounds = [0.0, *(width * (index + 1) for index in range(len(steps))), 1.0]
        found = []
        for k, (low, high) in zip(range(self.first, self.last + 1), itertools.pairwise(bounds), strict=True):
            if (share := min(high, stop) - max(low, start)) > 0:
                found.append((k, share))
        return found


@dataclass(frozen=True)
class Record:
    """The mean record of a data set: tokens of the instruction (seen both ways) and of the response (supervised)."""

    prompt: float
    response: float

    def __post_init__(self) -> None:
        for name in ("prompt", "response"):
            length = getattr(self, name)
            if not 0 <= length <= MAX_TOKENS:
                raise ValueError(f"{name} tokens must be 0 or more, got {length:g}")
        if not self.prompt + self.response >= 1:
            raise ValueError("a record needs at least one token")

    @property
    def supervised(self) -> float:
        """Share of the tokens that carry loss."""
        return self.response / (self.prompt + self.response)

    @property
    def pairs(self) -> float:
        """Visible (query, key) pairs a token: key j is visible to query i iff j < max(prompt, i + 1)."""
        pairs = self.prompt**2 + self.response * self.prompt + self.response * (self.response + 1) / 2
        return pairs / (self.prompt + self.response)


@dataclass(frozen=True)
class Flops:
    """Training FLOPs by part: the linear layers of both stacks, the head, the attention scores and sums."""

    stacks: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.stacks + self.head + self.attention


def layer_weights(config: HRMConfig) -> int:
    """Weights of one block: gate, q, k, v, o (5·A·D) and gate, up, down (3·F·D)."""
    return config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)


def parameters(config: HRMConfig) -> int:
    """Trained parameters: two stacks, or one that is shared, the embedding and the head, which are not tied."""
    return _layers(config) * layer_weights(config) + 2 * config.vocab_size * config.hidden_size


def _layers(config: HRMConfig) -> int:
    """Layers with weights of their own, however often a token passes them."""
    l_layers, h_layers = config.depths
    return l_layers if config.shared_stacks else l_layers + h_layers


def backward_visits(config: HRMConfig, horizon: int | None) -> tuple[int, int]:
    """How many of a token's visits of L and of H carry gradient when the horizon is K; None is every visit.

    H gets min(H_cycles, K − 1) of the K, L the rest, at most all of its visits. Raises ValueError when K is below 2.
    """
    l_visits, h_visits = config.H_cycles * config.L_cycles, config.H_cycles
    if horizon is None:
        return l_visits, h_visits
    if horizon < 2:
        raise ValueError(f"horizon must be at least 2 (one H and one L step), got {horizon}")
    h_grad = min(h_visits, horizon - 1)
    return min(l_visits, horizon - h_grad), h_grad


def adapter_parameters(config: HRMConfig, lora: LoraConfig) -> int:
    """Parameters that `[lora]` trains."""
    return _layers(config) * lora.weights(config)


def training_flops(
    config: HRMConfig,
    horizon: int | None,
    tokens: float,
    supervised: float = 0.0,
    pairs: float = 0.0,
    lora: LoraConfig | None = None,
) -> Flops:
    """FLOPs of one forward and backward pass over `tokens` tokens, of which `supervised` carry loss.

    `pairs` are the visible (query, key) pairs, summed over the sequences. A weight costs 2 forward and 4 backward; a
    pair 4·A forward (scores, sum) and 8·A backward, at every layer of every visit. The input gradient of the first
    block that carries gradient is counted although K <= H_cycles does not need it: 8·A·D a token. With `lora` a frozen
    weight costs 2 backward: it has no gradient of its own; the adapters' cost 4.
    """
    forward = config.cache_slots  # layers that a token passes, and those of them that carry gradient
    backward = sum(map(mul, backward_visits(config, horizon), config.depths))
    trained = layer_weights(config) if lora is None else lora.weights(config)
    frozen = 0 if lora is None else layer_weights(config)
    of_layers = (2 * forward + 4 * backward) * trained + (2 * forward + 2 * backward) * frozen
    return Flops(
        stacks=tokens * of_layers,
        head=supervised * (6 if lora is None else 4) * config.vocab_size * config.hidden_size,
        attention=pairs * (4 * forward + 8 * backward) * config.attention_width,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by part, and the most that a training step holds of them at once.

    Ranks shard weights, gradients and the optimizer's moments. `cast` are the weights in the arithmetic's precision.
    """

    weights: float
    cast: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    peak: float

    def state(self, average: float = 4.0) -> float:
        """Of a training state: what is trained, its moments, and an average of so many bytes a number.

        One GPU copies it to main memory that is page-locked, as large as that, and kept from the first state on.
        """
        return self.optimizer * (12 + average) / 8


def activation_elements(config: HRMConfig, layers: int, recompute: str = "sublayer") -> int:
    """Numbers per token that one visit with gradient, of a stack of `layers` layers, keeps; log-sum-exps not counted.

    Every block keeps the inputs of both norms (2·D), the gqkv projection, rotated in place, with the attention's output
    (5·A), and the gate_up projection (2·F); the stack's last norm keeps its output or its input (D). The rest is
    computed again, but with `recompute` "none" both norms' outputs (2·D) and SwiGLU's (F) are kept, too. The last visit
    of all keeps its last 2·D and 2·F, or 3·D and 3·F, for supervised tokens alone, see `memory`.
    """
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    more = 2 * width + ffn if recompute == "none" else 0
    return layers * (2 * width + 5 * attention + 2 * ffn + more) + width


def memory(
    config: HRMConfig,
    horizon: int | None,
    batch_tokens: int,
    supervised: float,
    ranks: int,
    precision: str,
    recompute: str = "sublayer",
) -> Memory:
    """What a training step of `batch_tokens` tokens a rank holds, in bytes; `supervised` is the share with loss.

    Weights, gradients and the optimizer's two moments are float32. Each visit with gradient keeps its activations in
    the precision of the arithmetic and, per head, a float32 log-sum-exp; with `recompute` "visit" only the last one
    does, the others what they began with. One rank in bfloat16 casts the blocks' weights once a step, and the head's
    where it is used; several ranks gather them all. The head holds one chunk of logits and, in float32, the gradient of
    its weight; attention sums the gradients of keys and values in float32 on the CPU.
    """
    width = PRECISIONS[precision]
    count, head = parameters(config), config.vocab_size * config.hidden_size
    layer = layer_weights(config)
    h_stack, both = config.depths[1] * layer, _layers(config) * layer
    l_visit, h_visit = _visits(config, batch_tokens, width, recompute)
    # The last block's MLP and the last norm see supervised tokens alone. Backward does them first, then that block's
    # attention: its gradients of the gqkv projection and of the attention's output are added to what is still kept.
    copies = 3 if recompute == "none" else 2
    last_mlp = copies * width * batch_tokens * (config.hidden_size + config.intermediate_size)
    unneeded = (1 - supervised) * last_mlp
    last_visit = h_visit - unneeded
    l_count, h_count = backward_visits(config, horizon)
    if recompute == "visit":
        others: float = width * batch_tokens * config.hidden_size * _states_kept(config, l_count, h_count)
    else:
        others = l_count * l_visit + (h_count - 1) * h_visit
    work = batch_tokens * config.attention_width * (5 * width + (8 if precision == "bfloat16" else 0))
    logits = width * min(batch_tokens * supervised * config.vocab_size, LOGITS_AT_ONCE)
    casts = width * (both + head) if ranks == 1 and precision == "bfloat16" else 0
    gathered = width * count if ranks > 1 else 0
    kept, gradient = others + last_visit, 4 / ranks
    # Backward goes through the visits one by one, an H first and then an L. It frees what a visit kept as it allocates
    # the gradient of the stack's weights; the other visits of that stack add to that gradient.
    moments = [
        kept + logits + gradient * head,
        kept - supervised * last_mlp + work + gradient * (head + layer),
        others + gradient * (head + h_stack),
        gradient * count,
    ]
    if recompute == "visit":  # one of the others is there again in full while backward begins with its last MLP
        more = width * batch_tokens * (config.hidden_size + 3 * config.intermediate_size)
        moments.append(others + l_visit + more + gradient * (head + h_stack))
        if l_count + h_count > 2:
            again = max(l_visit, h_visit if h_count > 1 else 0)
            moments.append(others + again + more + gradient * (head + both))
    else:
        moments.append(others - l_visit + gradient * (head + both))
    return Memory(
        weights=4 * count / ranks,
        cast=casts + gathered,
        optimizer=8 * count / ranks,
        gradients=gradient * count,
        activations=kept,
        logits=logits,
        peak=12 * count / ranks + casts + gathered + max(moments),
    )


def _states_kept(config: HRMConfig, l_count: int, h_count: int) -> int:
    """Tensors (T, D) that all visits with gradient but the last, an H, keep when they are computed again.

    Each keeps the stream that it began with and its norm, and the state of the other stack, which the visits of L in
    one cycle share.
    """
    states = h_count - 1 + math.ceil(l_count / config.L_cycles)
    return 2 * (l_count + h_count - 1) + states


def _visits(config: HRMConfig, batch_tokens: int, width: int, recompute: str = "sublayer") -> tuple[float, float]:
    """Bytes that a visit of L, and one of H, keeps for backward where it is not computed again."""
    l_visit, h_visit = (
        batch_tokens
        * (width * activation_elements(config, layers, recompute) + 4 * layers * config.num_attention_heads)
        for layers in config.depths
    )
    return l_visit, h_visit


def adapted_memory(
    config: HRMConfig, horizon: int | None, batch_tokens: int, supervised: float, precision: str, lora: LoraConfig
) -> Memory:
    """What a training step with `[lora]` holds, in bytes; every rank holds all of it.

    The frozen weights are held as `lora.base`, embedding and head beside int8 in bfloat16. Adapters, their gradients
    and moments are float32, and few. Activations are those of `memory`. One frozen weight at a time is cast to the
    precision of the arithmetic, where it is held in another; gradients of an int8 product are scaled in float32.
    """
    width, held = PRECISIONS[precision], 4 if lora.base == "float32" else 2
    head, trained = config.vocab_size * config.hidden_size, adapter_parameters(config, lora)
    stacks = _layers(config) * layer_weights(config) * (1 if lora.base == "int8" else held)
    attention, ffn = config.attention_width, config.intermediate_size
    widest = max(4 * attention, 2 * ffn)
    last_mlp = 2 * width * batch_tokens * (config.hidden_size + ffn)
    kept = sum(map(mul, backward_visits(config, horizon), _visits(config, batch_tokens, width)))
    activations = kept - (1 - supervised) * last_mlp
    logits = width * min(batch_tokens * supervised * config.vocab_size, LOGITS_AT_ONCE)
    in_int8 = lora.base == "int8"
    cast = width * widest * config.hidden_size if in_int8 or held != width else 0
    head_cast = width * head if held != width else 0
    of_attention = attention * (5 * width + (8 if precision == "bfloat16" else 0))
    work = batch_tokens * (max(of_attention, 3 * ffn * width) + (widest * (4 + width) if in_int8 else 0))
    weights = stacks + 2 * held * head + 4 * trained
    return Memory(
        weights=weights,
        cast=max(cast, head_cast),
        optimizer=8 * trained,
        gradients=4 * trained,
        activations=activations,
        logits=logits,
        peak=weights + 12 * trained + activations + max(logits + head_cast, work + cast),
    )


def widest(
    config: HRMConfig, device: Device, horizon: int | None, batch_tokens: int, supervised: float, recompute: str
) -> HRMConfig:
    """The widest model with the depth, the cycles and the head_dim of `config` that a device trains.

    In bfloat16 on one device, with an average of the weights, a step's peak within its memory; the ffn is the default
    of the width. Raises ValueError where not even one head fits.
    """

    def of_heads(heads: int) -> HRMConfig:
        width = heads * config.head_dim
        ffn = default_intermediate_size(width)
        return config.replace(num_attention_heads=heads, hidden_size=width, intermediate_size=ffn)

    def fits(heads: int) -> bool:
        need = memory(of_heads(heads), horizon, batch_tokens, supervised, 1, "bfloat16", recompute)
        return need.peak + need.weights <= device.memory

    if not fits(1):
        raise ValueError(f"{device.name}: its memory does not take a model of one head")
    heads = 1
    while fits(heads + 1):
        heads += 1
    return of_heads(heads)


@dataclass(frozen=True)
class Stage:
    """A part of a growing run: from `start` tokens on, the model is `config`, called `name`."""

    start: float
    name: str
    config: HRMConfig


@dataclass(frozen=True)
class Budget:
    """What runs where: tokens of the whole run, devices, their utilization and price (dollars a device-hour)."""

    tokens: float
    device: Device
    count: int = 1
    utilization: float = 0.38
    price: float | None = None
    batch_tokens: int = 8192
    precision: str = "bfloat16"
    record: Record | None = None
    horizon: Horizon = Horizon()
    recompute: str = "sublayer"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise ValueError(f"tokens must be from 1 to {MAX_TOKENS:g}, got {self.tokens:g}")
        for name, most in (("count", 1_000_000), ("batch_tokens", 1 << 40)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization must be above 0 and at most 1, got {self.utilization:g}")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price must be 0 or more dollars a device-hour, got {self.price:g}")
        if self.lora is not None and self.recompute != "sublayer":
            raise ValueError(f"adapters are planned with recompute 'sublayer' alone, got {self.recompute!r}")

    def hours(self, flops: float) -> float:
        """Wall-clock hours that this number of FLOPs takes on all devices."""
        return flops / (self.device.peak * self.count * self.utilization) / 3600


@dataclass(frozen=True)
class StagePlan:
    """The cost of one stage."""

    name: str
    config: HRMConfig
    start: float
    tokens: float
    parameters: int
    flops: Flops
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """The cost of a run; `from_scratch` is what training the last stage's model over all tokens would take."""

    budget: Budget
    stages: tuple[StagePlan, ...]
    flops: Flops
    from_scratch: Flops

    @property
    def memory(self) -> Memory:
        """Of the stage that needs most."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.peak)

    @property
    def hours(self) -> float:
        """Wall-clock hours."""
        return self.budget.hours(self.flops.total)

    @property
    def dollars(self) -> float | None:
        """Price of the device-hours; None without a price."""
        return None if self.budget.price is None else self.hours * self.budget.count * self.budget.price


def plan(stages: Sequence[Stage], budget: Budget) -> Plan:
    """Plan a run that starts as the first stage's model and grows into the others'.

    Without a mean record in the budget, the head and attention terms are left out of the FLOPs (published training
    costs leave them out, too), and memory supposes that every token is supervised. Raises ValueError when the stages
    do not start at 0, rise, and end before the run does, or when one would shrink.
    """
    starts = [stage.start for stage in stages]
    shares = [bound / budget.tokens for bound in (*starts, budget.tokens)]
    if starts[:1] != [0] or any(not low < high for low, high in itertools.pairwise(shares)):
        shown = ", ".join(f"{start:g}" for start in starts[1:])
        raise ValueError(f"stages must start at rising token counts between 0 and {budget.tokens:g}, got {shown}")
    for before, after in itertools.pairwise(stages):
        _check_growth(before, after)
    ends = [*starts[1:], budget.tokens]
    planned = tuple(_plan_stage(stage, end, budget) for stage, end in zip(stages, ends, strict=True))
    whole = _flops(stages[-1].config, 0.0, budget.tokens, budget)
    return Plan(budget, planned, _sum([stage.flops for stage in planned]), whole)


def _check_growth(before: Stage, after: Stage) -> None:
    small, large = before.config, after.config
    sizes = {
        name: (getattr(small, name), getattr(large, name))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    }
    sizes |= dict(zip(("L's layers", "H's layers"), zip(small.depths, large.depths, strict=True), strict=True))
    for name, (old, new) in sizes.items():
        if new < old:
            raise ValueError(f"stage {after.name}: {name} would shrink from {old} to {new}; models only grow")


def _plan_stage(stage: Stage, end: float, budget: Budget) -> StagePlan:
    deepest, _ = budget.horizon.shares(stage.start / budget.tokens, end / budget.tokens)[-1]
    supervised = 1.0 if budget.record is None else budget.record.supervised
    lora = budget.lora
    of_step = stage.config, deepest, budget.batch_tokens, supervised
    if lora is None:
        needed = memory(*of_step, budget.count, budget.precision, budget.recompute)
    else:
        needed = adapted_memory(*of_step, budget.precision, lora)
    return StagePlan(
        name=stage.name,
        config=stage.config,
        start=stage.start,
        tokens=end - stage.start,
        parameters=parameters(stage.config),
        flops=_flops(stage.config, stage.start, end, budget),
        memory=needed,
    )


def _flops(config: HRMConfig, start: float, end: float, budget: Budget) -> Flops:
    record = budget.record
    supervised, pairs = (0.0, 0.0) if record is None else (record.supervised, record.pairs)
    parts = []
    for k, share in budget.horizon.shares(start / budget.tokens, end / budget.tokens):
        tokens = share * budget.tokens
        parts.append(training_flops(config, k, tokens, supervised * tokens, pairs * tokens, budget.lora))
    return _sum(parts)


def _sum(parts: Sequence[Flops]) -> Flops:
    return Flops(*(math.fsum(getattr(part, f.name) for part in parts) for f in dataclasses.fields(Flops)))
