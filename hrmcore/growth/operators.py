"""Growing a model in the middle of its training without changing its function (FLM-101B, arXiv 2309.03852).

Wider, deeper, more heads, more FFN, more words: what a tensor's axes count (`KINDS`) and one rule (`Growth.tensor`)
say how every weight, average and optimizer moment grows, so that memory and files are grown by the same code.

Letters: D width of the residual stream, A attention width (heads × head_dim), F ffn width, V vocabulary; a prime is the
size after growing, s = sqrt(D'/D).

Why the function stays: let the old coordinates of the residual stream be s times what they were, and the new ones 0.
Its mean square is then what it was, and the norms, which have no gain, turn it into s times the old vector with the
same eps. Weights that read the stream are divided by s, weights that write to it are multiplied by s, and no number
further on changes. Operators after arXiv 2305.02869.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrmcore.config import RANGES, HRMConfig
from hrmcore.model import HRM, truncated_normal_
from hrmcore.optim import AdamAtan2, AdamW, Sophia

MODES = ("zero", "ramped", "masked")  # the last is an older name of the second

# What may differ between a model and the one it grows into; embedding_scale follows from the width. As sizes,
# num_layers_per_stack is the depth of both stacks, L_layers and H_layers that of one.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers_per_stack",
    "L_layers",
    "H_layers",
    "num_attention_heads",
    "H_cycles",
    "L_cycles",
)
_CYCLES = ("H_cycles", "L_cycles")
_STACKS = ("L_layers", "H_layers")


@dataclass(frozen=True)
class Kind:
    """What the axes of a tensor count, and how it uses the residual stream.

    `axes` name properties of HRMConfig. The first axis is `parts` projections, one below the other, each of that size.
    The old entries of a weight are multiplied by s ** `power`. A weight that `writes` adds its new entries to the
    residual stream, or lets something new into it: they begin at 0. Other new entries begin random.
    """

    axes: tuple[str, ...]
    parts: int = 1
    power: int = 0
    writes: bool = False

    def shape(self, config: HRMConfig) -> tuple[int, ...]:
        """The tensor's shape in a model."""
        first, *others = (getattr(config, axis) for axis in self.axes)
        return (self.parts * first, *others)


KINDS = {
    # embedding_scale grows by s, and with it what the embedding writes.
    "embed_tokens": Kind(("vocab_size", "hidden_size"), writes=True),
    "z_L_init": Kind(("hidden_size",), power=1, writes=True),
    "gqkv_proj": Kind(("attention_width", "hidden_size"), parts=4, power=-1),
    "o_proj": Kind(("hidden_size", "attention_width"), power=1, writes=True),
    "gate_up_proj": Kind(("intermediate_size", "hidden_size"), parts=2, power=-1),
    "down_proj": Kind(("hidden_size", "intermediate_size"), power=1, writes=True),
    "lm_head": Kind(("vocab_size", "hidden_size"), power=-1),
}

_BLOCK = 1 << 18  # numbers drawn at a time

GROWTH_KEY = "growth"  # of a training state's metadata

# A weight scaled by a has gradients divided by a. What an optimizer keeps for a weight (a slot) -> the power of a that
# scales the old entries of it.
SLOTS = {"ema": 1, "exp_avg": -1, "exp_avg_sq": -2, "hessian": -2}


@dataclass(frozen=True)
class Growth:
    """From one config to a larger one. Raises ValueError, naming the key, where that is not growing.

    Old entries keep their place, except FFN units: each half of the old units begins a half of the new ones. New
    entries are drawn from `seed`, the tensor's name and both sizes: the same on every machine and in any order. New
    layers are blocks that add 0. They lie on top of the stack or, when `interleaved`, after each old layer in turn.
    More cycles change the function, which needs `change_function`.

    In mode "ramped" the new writing entries become random numbers times a scalar that rises linearly from 0 to 1 over
    `mask_steps` steps. They begin at 0 as in mode "zero", and the training loop calls `advance` after each step.

    `interleaved`, `change_function` and mode "ramped" are experimental: they do what is said here, but no measurement
    shows that a model trained on from them is better.
    """

    before: HRMConfig
    after: HRMConfig
    seed: int = 0
    mode: str = "zero"
    mask_steps: int = 0
    interleaved: bool = False
    change_function: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"grow: mode must be one of {', '.join(MODES[:2])}, got {self.mode!r}")
        if self.mask_steps < 0 or (self.mode != "zero") != (self.mask_steps > 0):
            raise ValueError(f"grow: mode 'ramped' takes mask_steps of at least 1, the others 0; got {self.mask_steps}")
        for field in dataclasses.fields(HRMConfig):
            if field.name not in ("num_layers_per_stack", "H_layers"):
                _check_growth(field.name, getattr(self.before, field.name), getattr(self.after, field.name))
        alike = self.before.H_layers is None and self.after.H_layers is None
        keys = ("num_layers_per_stack",) if alike else _STACKS
        for key, old, new in zip(keys, self.before.depths, self.after.depths, strict=False):
            _check_growth(key, old, new)
        if self.before == self.after:
            raise ValueError(f"grow: no size differs; give one of {', '.join(SIZES)}")
        if any(getattr(self.before, key) != getattr(self.after, key) for key in _CYCLES) and not self.change_function:
            raise ValueError(
                "grow: other cycles change the model's function; if that is meant, ask for change_function"
            )
        if self.after.embedding_scale != _embedding_scale(self.before, self.after.hidden_size):
            expected = _embedding_scale(self.before, self.after.hidden_size)
            raise ValueError(f"grow: embedding_scale must become {expected}, got {self.after.embedding_scale}")

    @classmethod
    def of(cls, config: HRMConfig, sizes: dict[str, int], **options: Any) -> Growth:
        """The growth of a config to some larger `sizes`, keys of HRMConfig; `options` are the fields of Growth.

        Raises ValueError as Growth does, and where the larger config is impossible.
        """
        if unknown := sorted(set(sizes) - set(SIZES)):
            raise ValueError(f"grow: {unknown[0]!r} is not a size that grows; those are {', '.join(SIZES)}")
        width = sizes.get("hidden_size", config.hidden_size)
        if type(width) is not int or width < 1:
            raise ValueError(f"grow: hidden_size must be a whole number of at least 1, got {width!r}")
        RANGES["hidden_size"].check("grow: hidden_size", width)
        changes = {key: size for key, size in sizes.items() if key not in ("num_layers_per_stack", *_STACKS)}
        both = sizes.get("num_layers_per_stack")
        l_layers, h_layers = (
            sizes.get(key, depth if both is None else both) for key, depth in zip(_STACKS, config.depths, strict=True)
        )
        changes |= {"num_layers_per_stack": l_layers, "H_layers": h_layers}
        return cls(config, config.replace(**changes, embedding_scale=_embedding_scale(config, width)), **options)

    def source(self, name: str) -> str | None:
        """The name, in the smaller model, of the tensor that this one grows from; None in a new layer."""
        if not (match := re.fullmatch(r"((\w)_module\.layers\.)(\d+)(\..*)", name)):
            return name
        stack = "LH".index(match[2])
        old, new = self.before.depths[stack], self.after.depths[stack]
        places = [layer * new // old for layer in range(old)] if self.interleaved else list(range(old))
        layer = int(match[3])
        return f"{match[1]}{places.index(layer)}{match[4]}" if layer in places else None

    def alike(self, name: str) -> str:
        """The tensor of the smaller model that this one grows from or, in a new layer, takes after."""
        return self.source(name) or re.sub(r"\.layers\.\d+\.", ".layers.0.", name)

    def factor(self, name: str, power: int = 1) -> float:
        """What the old entries of a weight are multiplied by (a in SLOTS), to some power."""
        ratio = self.after.hidden_size / self.before.hidden_size
        return float(ratio ** (power * kind_of(name).power / 2))

    def tensor(self, name: str, old: Tensor | None, slot: str = "weight") -> Tensor:
        """One tensor of the larger model, float32, from the one it grows from, or from None in a new layer.

        `slot` is "weight", or a key of SLOTS for what an optimizer keeps for that weight: averages of weights grow as
        the weights do, moments begin at 0 in new entries. Raises ValueError on another slot or a shape that does not
        fit.
        """
        kind = kind_of(name)
        if slot != "weight" and slot not in SLOTS:
            raise ValueError(f"{name}: unknown optimizer slot {slot!r}; known are {', '.join(SLOTS)}")
        power = SLOTS.get(slot, 1)
        grown = self._new(name, kind) if power == 1 else torch.zeros(kind.shape(self.after))
        if old is None:
            return grown
        if old.shape != kind.shape(self.before):
            raise ValueError(f"{name}: has shape {tuple(old.shape)}, expected {kind.shape(self.before)}")
        self._old_part(grown, kind).copy_(old.reshape(self._apart(kind, old.shape))).mul_(self.factor(name, power))
        return grown

    def model(self, model: HRM) -> HRM:
        """The larger model, in memory of its own; the smaller one is left as it is. Logits of old tokens are equal.

        Raises ValueError when the model is not of the config `before`.
        """
        if model.config != self.before:
            raise ValueError("grow: the model's config is not the one that this growth begins at")
        with torch.device("meta"):
            bigger = HRM(self.after)
        old = model.state_dict()
        like = model.lm_head.weight
        weights = {
            name: self.tensor(name, _lookup(old, self.source(name))).to(like.device, like.dtype)
            for name in bigger.state_dict()
        }
        bigger.load_state_dict(weights, assign=True)
        bigger.reset_positions(len(model.rope_table))
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in bigger.named_parameters():
            parameter.requires_grad_(trainable.get(self.source(name) or "", True))
        return bigger.train(model.training)

    def optimizer(self, optimizer: torch.optim.Optimizer, model: HRM, bigger: HRM) -> AdamW | AdamAtan2 | Sophia:
        """The optimizer of the larger model: same options and groups, its state transported.

        The state is the one that the old gradients, divided by the weight's factor and 0 for new entries, would have
        left. Parameters of new layers join the group of the same kind of parameter and begin without state. Raises
        ValueError on an optimizer that is not of hrmcore.optim, or that does not hold the smaller model's parameters.
        """
        if not isinstance(optimizer, AdamW | AdamAtan2 | Sophia):
            known = "AdamW, AdamAtan2 and Sophia of hrmcore.optim"
            raise ValueError(f"grow: {type(optimizer).__name__} is an unknown optimizer; known are {known}")
        # torch adds an option of its own to the defaults of an optimizer that has loaded a state_dict.
        options = {name: value for name, value in optimizer.defaults.items() if name != "differentiable"}
        if isinstance(optimizer, Sophia):
            options["variant"] = optimizer.variant
        larger = type(optimizer)(self._groups(optimizer, model, bigger), **options)
        old = dict(model.named_parameters())
        for name, parameter in bigger.named_parameters():
            origin = _lookup(old, self.source(name))
            if origin is not None and optimizer.state.get(origin):
                larger.state[parameter] = {
                    key: value.clone() if key == "step" else self.tensor(name, value, key).to(value.device, value.dtype)
                    for key, value in optimizer.state[origin].items()
                }
        return larger

    def _groups(self, optimizer: torch.optim.Optimizer, model: HRM, bigger: HRM) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, filled with the larger model's parameters."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        group_of = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError("grow: the optimizer holds parameters that are not of this model")
                group_of[names[parameter]] = index
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in optimizer.param_groups]
        for name, parameter in bigger.named_parameters():
            if self.alike(name) in group_of:
                groups[group_of[self.alike(name)]]["params"].append(parameter)
        return groups

    @torch.no_grad()
    def advance(self, model: HRM, step: int) -> None:
        """Mode ramped: after step number `step`, counted from 1 at the growth, raise the scalar to step / mask_steps.

        The scalar's rise times the random entries is added to the weights themselves: at every moment they are what is
        evaluated and saved. After `mask_steps` steps, and in mode zero, this does nothing.
        """
        if not 1 <= step <= self.mask_steps:
            return
        for name, weight in model.state_dict().items():
            if kind_of(name).writes:
                weight.add_(self.ramped_entries(name).to(weight.device, weight.dtype), alpha=1 / self.mask_steps)

    def ramped_entries(self, name: str) -> Tensor:
        """What the scalar of mode ramped multiplies in one tensor: random in new writing entries, 0 in all others."""
        kind = kind_of(name)
        entries = torch.zeros(kind.shape(self.after))
        if not kind.writes:
            return entries
        entries = self._random(name, kind)
        if self.source(name) is not None:
            self._old_part(entries, kind).zero_()
        if kind.axes[0] == "vocab_size":  # the rows of new tokens are random from the start
            entries[self.before.vocab_size :] = 0
        return entries

    def _new(self, name: str, kind: Kind) -> Tensor:
        """A weight as it would begin if all of it were new."""
        if not kind.writes:
            return self._random(name, kind)
        if kind.axes[0] != "vocab_size":
            return torch.zeros(kind.shape(self.after))
        rows = self._random(name, kind)
        rows[: self.before.vocab_size] = 0
        return rows

    def _random(self, name: str, kind: Kind) -> Tensor:
        """The initialisation of HRM.reset_parameters at the new size, from a generator of this tensor's own."""
        shape = kind.shape(self.after)
        described = f"{self.seed} {name} {kind.shape(self.before)} {shape}"
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big")
        )
        grown = torch.empty(shape)
        std = 1 / math.sqrt(shape[1]) if len(shape) == 2 else 1.0
        for block in grown.view(-1).split(_BLOCK):  # torch needs several times the memory of what it fills at once
            truncated_normal_(block, std, generator)
        return grown

    def _old_part(self, grown: Tensor, kind: Kind) -> Tensor:
        """The view of a grown tensor that the old entries fill, its projections apart."""
        old = self._apart(kind, kind.shape(self.before))
        return grown.view(self._apart(kind, grown.shape))[tuple(slice(size) for size in old)]

    def _apart(self, kind: Kind, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape with the projections of the first axis as an axis of their own, and so the halves of the FFN's units.

        Old units then begin each half. A matrix library that sums a long row in two halves keeps its order of before.
        """
        halves = 1 if self.before.intermediate_size % 2 or self.after.intermediate_size % 2 else 2
        apart = [kind.parts]
        for axis, size in zip(kind.axes, (shape[0] // kind.parts, *shape[1:]), strict=True):
            apart += [halves, size // halves] if axis == "intermediate_size" else [size]
        return tuple(apart)


def grow(
    model: HRM,
    *,
    hidden_size: int | None = None,
    num_layers_per_stack: int | None = None,
    L_layers: int | None = None,
    H_layers: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    vocab_size: int | None = None,
    H_cycles: int | None = None,
    L_cycles: int | None = None,
    **options: Any,
) -> HRM:
    """A larger HRM with the same function: logits of old tokens are equal up to the order of floating-point sums.

    Sizes that are None stay; num_layers_per_stack is the depth of both stacks, L_layers and H_layers that of one.
    `options` are the fields of Growth (seed, mode, mask_steps, interleaved, change_function); make a Growth yourself to
    grow an optimizer along, or to raise the scalar of mode "ramped". Raises ValueError on a size that shrinks, a head
    count that does not divide the width, and cycles without `change_function`.

    >>> bigger = hrmcore.grow(model, hidden_size=2 * model.config.hidden_size)
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_layers_per_stack": num_layers_per_stack,
        "L_layers": L_layers,
        "H_layers": H_layers,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "vocab_size": vocab_size,
        "H_cycles": H_cycles,
        "L_cycles": L_cycles,
    }
    given = {key: size for key, size in sizes.items() if size is not None}
    return Growth.of(model.config, given, **options).model(model)


def state_metadata(growth: Growth, step: int) -> dict[str, str]:
    """What a training state's metadata says of a growth at a step: the model's config and, in mode ramped, the rest."""
    metadata = {"model_config": json.dumps(growth.after.to_dict())}
    if growth.mask_steps:
        metadata[GROWTH_KEY] = json.dumps({**dataclasses.asdict(growth), "step": step})
    return metadata


def growth_under_way(metadata: Mapping[str, str]) -> tuple[Growth, int] | None:
    """The growth in mode ramped that a training state was in the middle of, and the step at which it began."""
    if GROWTH_KEY not in metadata:
        return None
    values = json.loads(metadata[GROWTH_KEY])
    step = values.pop("step")
    before, after = (HRMConfig.from_dict(values.pop(key)) for key in ("before", "after"))
    return Growth(before, after, **values), step


def kind_of(name: str) -> Kind:
    """The kind of a tensor by its name in the module."""
    return KINDS[name.removesuffix(".weight").rpartition(".")[2]]


def _embedding_scale(config: HRMConfig, width: int) -> float:
    """embedding_scale × s, and exactly sqrt(D') where it was sqrt(D)."""
    assert config.embedding_scale is not None  # HRMConfig fills it in
    if config.embedding_scale == math.sqrt(config.hidden_size):
        return math.sqrt(width)
    return config.embedding_scale * math.sqrt(width / config.hidden_size)


def _check_growth(key: str, old: Any, new: Any) -> None:
    if key == "embedding_scale":
        return
    if key in SIZES:
        if new < old:
            raise ValueError(f"grow: {key} would shrink from {old} to {new}; models only grow")
    elif new != old:
        raise ValueError(f"grow: {key} must stay {old!r}, got {new!r}")


def _lookup(tensors: dict[str, Any], name: str | None) -> Any:
    return None if name is None else tensors[name]
