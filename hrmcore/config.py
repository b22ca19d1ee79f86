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
