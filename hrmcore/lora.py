"""A model whose weights are frozen and whose projections have low-rank adapters: what `[lora]` trains.

The frozen weights are buffers that belong to no state_dict; the adapters are all the parameters there are. Optimizer,
training states and averages therefore hold nothing else. Source: arXiv 2106.09685; frozen weights in fewer bits after
arXiv 2305.14314, here int8 with a scale a row.

Shapes: T tokens, M rows and N columns of a weight, r rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrmcore.checkpoint.hrm_text import Tensors, read_tensors, resolve
from hrmcore.config import PARTS, HRMConfig, LoraConfig, part_rows
from hrmcore.model import HRM, Block, ForwardContext
from hrmcore.ops.adapted_sublayers import Half, Projection, adapted_attention, adapted_mlp


class Adapter(nn.Module):
    """The factors of a low-rank change of a part of a projection: A (r, N), B (rows, r), float32."""

    def __init__(self, rank: int, rows: int, columns: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, columns).uniform_(-1, 1) / math.sqrt(columns))  # as peft begins
        self.B = nn.Parameter(torch.zeros(rows, rank))


class AdaptedLinear(nn.Module):
    """A frozen linear layer, float32, bfloat16 or int8 with a scale a row, with adapters on some of its rows."""

    weight: Tensor  # (M, N)
    scale: Tensor | None  # (M) float32

    def __init__(self, weight: Tensor, scale: Tensor | None = None, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.scaling = scaling
        self.rows: dict[str, slice] = {}  # of each adapter, by its name

    def adapt(self, name: str, rows: slice, rank: int) -> None:
        """Give some rows an adapter; rows that come later must be given one later."""
        self.add_module(name, Adapter(rank, rows.stop - rows.start, self.weight.shape[1]))
        self.rows[name] = rows

    def forward(self, x: Tensor) -> Tensor:
        """x (T, N) -> (T, M), any floating dtype, in plain torch: the specification of `Projection`."""
        y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = (y * self.scale).to(y.dtype)
        pieces, end = [], 0
        for name, rows in self.rows.items():
            adapter = self.adapter(name)
            inner = F.linear(x, adapter.A.to(x.dtype))
            pieces += [y[:, end : rows.start], y[:, rows] + self.scaling * F.linear(inner, adapter.B.to(x.dtype))]
            end = rows.stop
        return torch.cat([*pieces, y[:, end:]], 1) if pieces else y

    def adapter(self, name: str) -> Adapter:
        """An adapter by its name."""
        return cast(Adapter, self.get_submodule(name))

    def projection(self) -> Projection:
        """The same for the fused ops."""
        return Projection(self.weight, self.scale, tuple(self.rows.values()), self.scaling)

    def factors(self) -> list[Tensor]:
        """A and B of every adapter in turn."""
        return [factor for name in self.rows for factor in self.adapter(name).parameters()]


class FrozenEmbedding(nn.Module):
    """An embedding (V, D) that is not trained; its rows come as float32, or what is wider."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T) int64 -> (T, D)."""
        rows = F.embedding(ids, self.weight)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


class AdaptedBlock(Block):
    """A block whose four projections are frozen and adapted."""

    def matrices(self) -> list[Tensor]:
        """None: frozen ones are cast where they are used, and factors are float32 until then."""
        return []

    def _attention(self, normed: Tensor, stream: Tensor, context: ForwardContext) -> Tensor:
        gqkv, o = self._projection("gqkv_proj"), self._projection("o_proj")
        half = Half(
            gqkv.projection(),
            o.projection(),
            self.config.rms_norm_eps,
            self.config.num_attention_heads,
            (context.table, context.positions),
            context.mask,
        )
        return adapted_attention(normed, stream, half, [*gqkv.factors(), *o.factors()])

    def _mlp(self, x: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        gate_up, down = self._projection("gate_up_proj"), self._projection("down_proj")
        half = Half(gate_up.projection(), down.projection(), self.config.rms_norm_eps)
        return adapted_mlp(x, residual, half, [*gate_up.factors(), *down.factors()])

    def _projection(self, name: str) -> AdaptedLinear:
        return cast(AdaptedLinear, self.get_submodule(name))


def adapted_model(source: str | Path, lora: LoraConfig) -> HRM:
    """The model of an hrm_text checkpoint folder or cached hub id, frozen, with new adapters that change nothing yet.

    It computes what the checkpoint does, but for the rounding to `lora.base`; embedding and head are kept in bfloat16
    beside int8. A is drawn from torch's generator. The files are read one tensor at a time, and never written to.
    Raises as `hrmcore.checkpoint.hrm_text.load_model` does.
    """
    tensors = read_tensors(resolve(source))
    config, held = tensors.config, torch.float32 if lora.base == "float32" else torch.bfloat16

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if not math.isfinite(float(tensor.float().sum())) and not bool(tensor.isfinite().all()):
            raise ValueError(f"{source}: {name!r} has a value that is NaN or infinite")
        return tensor

    with torch.device("meta"):
        model = HRM(config)
    model.z_L_init = read("z_L_init").to(torch.float32, copy=True)
    model.add_module("embed_tokens", FrozenEmbedding(_copied(read("embed_tokens.weight"), held, tensors)))
    for stack, depth in zip(("L_module", "H_module"), config.depths, strict=True):
        layers = getattr(model, stack).layers
        for layer in range(depth):
            with torch.device("meta"):
                block = AdaptedBlock(config)
            for projection in PARTS:
                weight = read(f"{stack}.layers.{layer}.{projection}.weight")
                setattr(block, projection, _adapted(projection, weight, config, lora))
                tensors.release()
            layers[layer] = block
    model.add_module("lm_head", AdaptedLinear(_copied(read("lm_head.weight"), held, tensors)))
    model.reset_positions(config.max_position_embeddings)
    return model


def _copied(tensor: Tensor, dtype: torch.dtype, tensors: Tensors) -> Tensor:
    copy = tensor.to(dtype, copy=True)
    tensors.release()
    return copy


def _adapted(projection: str, weight: Tensor, config: HRMConfig, lora: LoraConfig) -> AdaptedLinear:
    if lora.base == "int8":
        linear = AdaptedLinear(*quantised_rows(weight), scaling=lora.scaling)
    else:
        linear = AdaptedLinear(weight.to(getattr(torch, lora.base), copy=True), scaling=lora.scaling)
    for part, rows in part_rows(projection, config).items():
        if part in lora.parts:
            linear.adapt(_name(part), rows, lora.rank)
    return linear


def quantised_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (M, N) int8 and scales (M) float32: a row's largest magnitude is 127 scales; zeros stay zeros."""
    exact = weight.float()
    scale = exact.abs().amax(1) / 127
    whole = exact / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return whole.round_().clamp_(-127, 127).to(torch.int8), scale


def factors_of(model: HRM) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapter of a model, by the name that transformers gives the layer."""
    found = {}
    for stack, depth in zip(("L_module", "H_module"), model.config.depths, strict=True):
        for layer in range(depth):
            block = getattr(model, stack).layers[layer]
            for projection, parts in PARTS.items():
                linear: AdaptedLinear = getattr(block, projection)
                for part in parts:
                    if (name := _name(part)) in linear.rows:
                        adapter = linear.adapter(name)
                        found[f"model.{stack}.layers.{layer}.{part}"] = (adapter.A.detach(), adapter.B.detach())
    return found


def _name(part: str) -> str:
    return part.rpartition(".")[2]
