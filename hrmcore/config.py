"""HRMConfig: the architecture of one model, frozen and validated. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRESETS: dict[str, dict[str, int]] = {
    # The published sizes (arXiv 2605.20613); layers are per stack, half of the total.
    "B": {"num_layers_per_stack": 6, "hidden_size": 1024, "num_attention_heads": 8},
    "L": {"num_layers_per_stack": 12, "hidden_size": 1280, "num_attention_heads": 10},
    "XL": {"num_layers_per_stack": 16, "hidden_size": 1536, "num_attention_heads": 12},
    "XXL": {"num_layers_per_stack": 36, "hidden_size": 1792, "num_attention_heads": 14},
}

# What the backward pass of a training step computes again: nothing, norms and SwiGLU's outputs, or every visit but the
# last as well (HRM.loss).
RECOMPUTE = ("none", "sublayer", "visit")

MAX_POSITIONS = 1 << 20  # the table of rotations is held whole: 0.5 GB at this length and head_dim 128
XPOS_POSITIONS = 65536  # the most tokens of an xPos model's sequence: up to here its arithmetic is tested
WINDOW_MULTIPLE = 64  # tokens: a tile of the attention kernels and a block of the KV cache


@dataclass(frozen=True)
class Range:
    """The values of a number that can be computed with: from `least` to `most`, and why no more."""

    least: float
    most: float
    why: str

    def check(self, name: str, value: float) -> None:
        """Raises ValueError naming the number; NaN is in no range."""
        if self.least <= value <= self.most:
            return
        if value < self.least:
            raise ValueError(f"{name} must be at least {self.least}, got {value}")
        raise ValueError(f"{name} must be at most {self.most} ({self.why}), got {value}")


_ADDRESSES = 1 << 47  # bytes that a process can have on the processors of today
_SHAPE = "what is larger fits no memory"
_FLOAT32 = "squares of it are taken in float32"

# What each key of a model may be. How they may go together is checked in HRMConfig.
RANGES: dict[str, Range] = {
    "vocab_size": Range(1, (1 << 31) - 1, "token ids are int32"),
    "hidden_size": Range(1, 1 << 24, _SHAPE),
    "intermediate_size": Range(1, 1 << 24, _SHAPE),
    "num_layers_per_stack": Range(1, 1 << 16, _SHAPE),
    "H_layers": Range(1, 1 << 16, _SHAPE),
    "num_attention_heads": Range(1, 1 << 16, _SHAPE),
    "head_dim": Range(1, 256, "the attention kernels hold a head in registers"),
    "H_cycles": Range(1, 1 << 16, "each is a pass over both stacks"),
    "L_cycles": Range(1, 1 << 16, "each is a pass over a stack"),
    "max_position_embeddings": Range(1, MAX_POSITIONS, "the table of rotations is held whole"),
    "rms_norm_eps": Range(1e-30, 1 - 2**-53, "it is a share of the mean square"),
    "rope_theta": Range(1 + 2**-52, 1e30, "powers of it are taken in float32"),
    "embedding_scale": Range(1e-15, 1e15, _FLOAT32),
    "xpos_scale_base": Range(64, MAX_POSITIONS, "no sequence is longer"),
    "attention_window": Range(0, MAX_POSITIONS, "no sequence is longer"),
}


def default_intermediate_size(hidden_size: int) -> int:
    """FFN width of the published models: 4·D·2/3, rounded, then up to a multiple of 256."""
    return -(-round(4 * hidden_size * 2 / 3) // 256) * 256


@dataclass(frozen=True)
class HRMConfig:
    """The shape and constants of an HRM. Raises ValueError on an unknown key or an impossible value.

    `hrmcore train --explain` prints the fields' explanations. In addition: `embedding_scale` None is the inverse of the
    initialisation's standard deviation. With an `attention_window`, a token of a response sees its own block and the
    one before, a token of the prefix also the one after. `H_layers` None means num_layers_per_stack, the only key of
    the released format; where the two differ, num_layers_per_stack is L's. `shared_stacks` follows arXiv 2510.04871.
    With H_cycles and L_cycles 1 the recurrence is a Transformer that passes each layer once, with L_cycles 1 and more
    H_cycles a looped one.
    """

    vocab_size: int = field(metadata={"explain": "rows of the embedding and of the head"})
    hidden_size: int = field(metadata={"explain": "width of the residual stream, a multiple of num_attention_heads"})
    intermediate_size: int = field(metadata={"explain": "units of the FFN; the published models have 8/3 of the width"})
    num_layers_per_stack: int = field(metadata={"explain": "layers of L and of H each"})
    num_attention_heads: int = field(metadata={"explain": "heads of attention"})
    head_dim: int = field(
        default=128,
        metadata={
            "explain": "channels of a head, a multiple of 8 up to 256; heads times head_dim need not be the width"
        },
    )
    H_cycles: int = field(default=2, metadata={"explain": "visits of H"})
    L_cycles: int = field(default=3, metadata={"explain": "visits of L before each visit of H"})
    max_position_embeddings: int = field(
        default=4096, metadata={"explain": "longest sequence in tokens; longer records are left out"}
    )
    rms_norm_eps: float = field(default=1e-6, metadata={"explain": "what every norm adds to the mean square"})
    rope_theta: float = field(
        default=10000.0, metadata={"explain": "base of the rotations: larger for longer sequences"}
    )
    embedding_scale: float | None = field(
        default=None, metadata={"explain": "what embeddings are multiplied by; None: sqrt(hidden_size)"}
    )
    prefix_lm: bool = field(
        default=True, metadata={"explain": "instructions are seen both ways; false: causal throughout"}
    )
    pad_token_id: int | None = field(
        default=None, metadata={"explain": "written into the checkpoint for other readers; packing pads nothing"}
    )
    eos_token_id: int | tuple[int, ...] | None = field(
        default=None, metadata={"explain": "the token, or tokens, that end an answer"}
    )
    position_encoding: str = field(
        default="rope", metadata={"explain": "'rope', or 'xpos': RoPE's scores, which decay with the distance"}
    )
    xpos_scale_base: int = field(
        default=512,
        metadata={"explain": "xPos: tokens of distance after which a channel's score has decayed by its factor"},
    )
    attention_window: int = field(
        default=0,
        metadata={
            "explain": "tokens of a block, a multiple of 64: attention reaches its own and the neighbours; 0: all"
        },
    )
    shared_stacks: bool = field(default=False, metadata={"explain": "L and H are one stack, as in TRM"})
    H_layers: int | None = field(
        default=None, metadata={"explain": "layers of H where L has others; only hrmcore loads such a model"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # as JSON and TOML write it
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), str(f.type))
        for name, allowed in RANGES.items():
            if (value := getattr(self, name)) is not None:
                allowed.check(f"config: {name}", value)
        if self.H_layers == self.num_layers_per_stack:
            object.__setattr__(self, "H_layers", None)
        elif self.H_layers is not None and self.shared_stacks:
            raise ValueError(f"config: shared_stacks are one stack, H_layers {self.H_layers} would make it two")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads  # the released format asks for it, although head_dim is free
            raise ValueError(
                f"config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}"
            )
        if self.head_dim % 8:
            raise ValueError(f"config: head_dim must be a multiple of 8 and at most 256, got {self.head_dim}")
        if self.embedding_scale is None:
            object.__setattr__(self, "embedding_scale", math.sqrt(self.hidden_size))
        if self.position_encoding not in ("rope", "xpos"):
            raise ValueError(f"config: position_encoding must be 'rope' or 'xpos', got {self.position_encoding!r}")
        if self.position_encoding == "rope" and self.xpos_scale_base != 512:
            raise ValueError("config: xpos_scale_base is for position_encoding 'xpos', not for 'rope'")
        if self.attention_window % WINDOW_MULTIPLE:
            raise ValueError(
                f"config: attention_window must be a multiple of {WINDOW_MULTIPLE}, or 0 for none, "
                f"got {self.attention_window}"
            )
        pads = () if self.pad_token_id is None else (self.pad_token_id,)
        for name, tokens in (("pad_token_id", pads), ("eos_token_id", self.eos_token_ids)):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"config: {name} must be in [0, vocab_size={self.vocab_size}), got {token}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        """What the keys come to together: no size overflows later, wherever it is computed."""
        if 4 * self.parameters > _ADDRESSES:
            raise ValueError(
                f"config: vocab_size, hidden_size, intermediate_size, heads and layers make {self.parameters:.3g} "
                f"weights; a process can address {_ADDRESSES // 4:.3g}"
            )
        cache = 8 * self.cache_slots * self.attention_width * self.context  # keys and values in float32
        if cache > _ADDRESSES:
            raise ValueError(
                f"config: H_cycles {self.H_cycles} and L_cycles {self.L_cycles} make {self.visits} visits and "
                f"{self.cache_slots} layers' keys and values a token: {cache:.3g} bytes for a context of "
                f"{self.context} tokens; a process can address {_ADDRESSES:.3g}: take fewer cycles or less context"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HRMConfig:
        """Build from a mapping; an unknown or missing key is a ValueError that names it."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"config: missing key {missing[0]!r}")
        return cls(**values)

    @classmethod
    def preset(cls, size: str, vocab_size: int = 65536) -> HRMConfig:
        """A published size: B, L, XL (HRM-Text-1B) or XXL."""
        if size not in PRESETS:
            raise ValueError(f"config: unknown size {size!r}; the sizes are {', '.join(PRESETS)}")
        shape = PRESETS[size]
        ffn = default_intermediate_size(shape["hidden_size"])
        return cls.from_dict({"vocab_size": vocab_size, "intermediate_size": ffn, **shape})

    def to_dict(self) -> dict[str, Any]:
        """All keys, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> HRMConfig:
        """A copy with some keys changed, validated again."""
        return self.from_dict(self.to_dict() | changes)

    @property
    def attention_width(self) -> int:
        """num_attention_heads × head_dim; need not equal hidden_size."""
        return self.num_attention_heads * self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: none, one or several."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def context(self) -> int:
        """The most tokens of one sequence: max_position_embeddings; at least 65,536 for xPos models."""
        if self.position_encoding == "xpos":
            return max(self.max_position_embeddings, XPOS_POSITIONS)
        return self.max_position_embeddings

    def check_length(self, tokens: int) -> None:
        """Raises ValueError when `tokens` is more than one sequence may have."""
        if tokens > self.context:
            key = " (max_position_embeddings)" if self.context == self.max_position_embeddings else " of an xPos model"
            raise ValueError(f"ids has {tokens} tokens, the context{key} is {self.context}")

    @property
    def depths(self) -> tuple[int, int]:
        """Layers of L and of H."""
        return self.num_layers_per_stack, self.H_layers or self.num_layers_per_stack

    @property
    def parameters(self) -> int:
        """Number of weights; of shared stacks, as if they were two."""
        width, attention, ffn = self.hidden_size, self.attention_width, self.intermediate_size
        layer = 5 * width * attention + 3 * width * ffn
        return (2 * self.vocab_size + 1) * width + sum(self.depths) * layer

    @property
    def visits(self) -> int:
        """How often a stack runs for one token: H_cycles · (L_cycles + 1)."""
        return self.H_cycles * (self.L_cycles + 1)

    @property
    def cache_slots(self) -> int:
        """KV cache slots: one for each (visit, layer)."""
        l_layers, h_layers = self.depths
        return self.H_cycles * (self.L_cycles * l_layers + h_layers)


# The projections of a block, and the parts of whose rows they are made, in order, as transformers names them.
PARTS = {
    "gqkv_proj": ("self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
ALL_PARTS = tuple(part for parts in PARTS.values() for part in parts)
ALL_TARGETS = "all-linear"
BASES = ("float32", "bfloat16", "int8")

LORA_RANGES: dict[str, Range] = {
    "rank": Range(1, 4096, "more trains more than the weights themselves"),
    "alpha": Range(1e-6, 1e6, "it is multiplied in float32"),
}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters over frozen weights: W + alpha / rank · B·A (arXiv 2106.09685).

    `hrmcore train --explain` prints the fields' explanations. A target is the end of a part's name, as in peft:
    `gate_proj` is two parts, `mlp.gate_proj` one. Raises ValueError on an impossible value.
    """

    rank: int = field(default=8, metadata={"explain": "rows of A and columns of B"})
    alpha: float = field(default=16.0, metadata={"explain": "B·A is multiplied by alpha / rank"})
    targets: tuple[str, ...] = field(
        default=(ALL_TARGETS,),
        metadata={
            "explain": f"what gets an adapter: {ALL_TARGETS}, or some of {', '.join(ALL_PARTS)}, or the ends of names"
        },
    )
    base: str = field(
        default="bfloat16",
        metadata={"explain": f"what the frozen weights are held as: {', '.join(BASES)} (a scale a row)"},
    )

    def __post_init__(self) -> None:
        for name, allowed in LORA_RANGES.items():
            allowed.check(f"lora: {name}", getattr(self, name))
        if not self.targets:
            raise ValueError(f"lora: targets is empty; leave it out for {ALL_TARGETS}")
        for target in self.targets:
            if not any(_names(target, part) for part in ALL_PARTS):
                known = ", ".join((ALL_TARGETS, *ALL_PARTS))
                raise ValueError(f"lora: targets has {target!r}, which is none of {known}, nor the end of one")
        if self.base not in BASES:
            raise ValueError(f"lora: base must be one of {BASES}, got {self.base!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """From a table; raises ValueError, naming the key, on one that is unknown or of another type."""
        known = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"lora: unknown key {unknown[0]!r}; the keys are {', '.join(known)}")
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
        checked: dict[str, Any] = {}
        for name, value in values.items():
            items = value if known[name].startswith("tuple") and isinstance(value, list) else [value]
            wanted = kinds["str" if known[name].startswith("tuple") else known[name]]
            if not all(isinstance(item, wanted) and not isinstance(item, bool) for item in items):
                raise ValueError(f"lora: {name} must be of type {known[name]}, got {value!r}")
            checked[name] = tuple(items) if known[name].startswith("tuple") else value
        return cls(**checked)

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have an adapter, in the order of ALL_PARTS."""
        return tuple(part for part in ALL_PARTS if any(_names(target, part) for target in self.targets))

    def weights(self, config: HRMConfig) -> int:
        """Trained weights of one block: rank · (rows + columns) of each part."""
        shapes = part_shapes(config)
        return sum(self.rank * sum(shapes[part]) for part in self.parts)


def _names(target: str, part: str) -> bool:
    return target == ALL_TARGETS or part == target or part.endswith(f".{target}")


def part_shapes(config: HRMConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of every part of a block's projections."""
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    shapes = {"gqkv_proj": (attention, width), "o_proj": (width, attention)}
    shapes |= {"gate_up_proj": (ffn, width), "down_proj": (width, ffn)}
    return {part: shapes[projection] for projection, parts in PARTS.items() for part in parts}


def part_rows(projection: str, config: HRMConfig) -> dict[str, slice]:
    """Where the parts of a projection lie among its rows, in their order."""
    rows = part_shapes(config)[PARTS[projection][0]][0]
    return {part: slice(number * rows, (number + 1) * rows) for number, part in enumerate(PARTS[projection])}


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "int | tuple[int, ...] | None": (int, type(None)),
}


def _check_type(name: str, value: object, annotation: str) -> None:
    if isinstance(value, tuple) and "tuple" in annotation:
        allowed = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    else:
        allowed = isinstance(value, _TYPES[annotation]) and (annotation == "bool" or not isinstance(value, bool))
    if not allowed:
        raise ValueError(f"config: {name} must be of type {annotation}, got {value!r}")
