"""The fused decode step on CUDA: one token for each of up to 8 requests. Kernels: csrc/engine/cuda_step.{h,cu}.

Shapes: B requests, V vocabulary, D width, H heads, d head_dim, F ffn width, R and K a matrix's rows and columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import DTYPES, TILE, in_fragments, matrix_bytes, paired
from hrmcore.model import HRM, Block, Positions, Stack
from hrmcore.ops.backend import stream_of

MOST_REQUESTS: int = _C.max_batch

Form = Literal["graph", "persistent"]

_HEAD_DIMS = (16, 32, 64, 128)


def pack(model: HRM, dtype: str) -> Tensor:
    """All that the step multiplies with, in its order: L's layers, H's unless they are L's, the head. Bytes.

    As in the CPU engine, the head of an int4 model is int8.
    """
    heads = 4 * model.config.num_attention_heads

    def matrices() -> Iterator[Tensor]:
        for stack in stacks(model):
            for layer in stack.layers:
                assert isinstance(layer, Block)
                yield in_fragments(paired(layer.gqkv_proj.weight, heads), dtype)
                yield in_fragments(layer.o_proj.weight, dtype)
                yield in_fragments(paired(layer.gate_up_proj.weight, 1), dtype)
                yield in_fragments(layer.down_proj.weight, dtype)
        yield in_fragments(model.lm_head.weight, "int8" if dtype == "int4" else dtype)

    with torch.no_grad():
        return torch.cat([matrix.flatten() for matrix in matrices()])


def stacks(model: HRM) -> list[Stack]:
    """The stacks that have weights of their own."""
    return [model.L_module] if model.H_module is model.L_module else [model.L_module, model.H_module]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step asks of global memory, by what they are. What several blocks ask for counts several times."""

    weights: int
    cache: int
    activations: int
    activations_once: int  # those that nobody has asked for in the same phase

    @property
    def floor(self) -> int:
        """What must come from memory: every weight once a visit, the visible keys and values once."""
        return self.weights + self.cache

    @property
    def total(self) -> int:
        return self.floor + self.activations

    @property
    def from_memory(self) -> int:
        """What comes from memory when a cache holds what a phase's blocks all ask for: a few KB a request."""
        return self.floor + self.activations_once


def traffic(config: HRMConfig, positions: Sequence[int], blocks: int, dtype: str = "bfloat16") -> Traffic:
    """What the kernels of csrc/decode/phases.cuh read for requests that hold so many tokens, on so many blocks.

    The tests hold it to the emulator's count.
    """
    width, ffn, heads, attention = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.attention_width,
    )
    threads, block, requests = 256, _C.page_tokens, len(positions)
    head_dtype = "int8" if dtype == "int4" else dtype

    def active(rows: int) -> int:
        return min(blocks, -(-rows // TILE))

    layer = sum(
        matrix_bytes(rows, columns, dtype)
        for rows, columns in ((4 * attention, width), (width, attention), (2 * ffn, width), (width, ffn))
    )
    cache = 0  # of one layer, as all that follows
    parts_read = attention_read = attention_once = 0
    faded = config.position_encoding != "rope"
    for position in positions:
        window = config.attention_window
        first = max(0, (position // window - 1) * window) // block if window else 0
        seen = position // block + 1 - first
        parts = min(-(-seen // 4), 4)
        joined = 4 * parts if parts > 1 else 0  # the parts' weights, of one head
        cache += 4 * attention * (position + 1 - first * block)
        attention_read += parts * (8 * attention + 32 * heads * threads * faded) + 4 * heads * seen * threads // 32
        parts_read += active(width) * attention // 8 * (16 * parts + joined)
        attention_once += 8 * attention + 4 * seen + 2 * attention * parts + heads * joined
    between = requests * (active(4 * attention) * 2 * width + 8 * attention)
    others = active(2 * ffn) * 2 * width + active(width) * 2 * ffn + 8 * width
    per_layer = between + attention_read + parts_read + requests * others
    per_layer_once = attention_once + 2 * config.head_dim * faded + 4 * config.head_dim * len(set(positions))
    per_layer_once += requests * (2 * width + 2 * width + 2 * ffn + 8 * width)
    entering = 8 * requests * width  # beyond the bfloat16 copy that every other layer begins with
    entering_read = blocks * requests * 10 * width - requests * active(4 * attention) * 2 * width
    first_entering = requests * (2 * width + 4) + 4 * width - 10 * requests * width
    first_entering_read = blocks * requests * (6 * width + width // 2) - blocks * requests * 10 * width
    places = 8 * requests
    return Traffic(
        weights=config.cache_slots * layer + matrix_bytes(config.vocab_size, width, head_dtype),
        cache=config.cache_slots * cache,
        activations=config.cache_slots * per_layer
        + config.visits * entering_read
        + first_entering_read
        + requests * active(config.vocab_size) * 2 * width
        + blocks * places,
        activations_once=config.cache_slots * per_layer_once
        + config.visits * entering
        + first_entering
        + 2 * requests * width
        + places,
    )


@dataclass(frozen=True)
class _Captured:
    """A step's launches in a CUDA graph, and the operands that it reads and writes."""

    tokens: Tensor
    positions: Tensor
    tables: Tensor
    logits: Tensor
    graph: torch.cuda.CUDAGraph

    def replay(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.tables.copy_(tables)
        self.graph.replay()
        return self.logits.clone()


class CudaStep:
    """One model's decode step: `step(tokens, positions, tables, kv)` gives the logits (B, V) float32.

    `form` is "persistent" (one cooperative launch) or "graph" (a launch a phase, on a GPU captured as a CUDA graph at
    the first step of a shape and replayed from then on); the bits are the same.
    `blocks` is the grid, 0 for one block a multiprocessor; `dtype` that of the weights: bfloat16, int8 or int4. Raises
    ValueError on a model that the kernels do not take: head_dim other than 16, 32, 64 or 128, widths that are no
    multiple of 16.
    """

    def __init__(self, model: HRM, form: Form = "persistent", blocks: int = 0, dtype: str = "bfloat16") -> None:
        config = model.config
        for name, value, fits in (
            ("head_dim", config.head_dim, config.head_dim in _HEAD_DIMS),
            ("hidden_size", config.hidden_size, config.hidden_size % TILE == 0),
            ("intermediate_size", config.intermediate_size, config.intermediate_size % TILE == 0),
        ):
            if not fits:
                expected = "one of 16, 32, 64, 128" if name == "head_dim" else f"a multiple of {TILE}"
                raise ValueError(f"the decode step on CUDA takes a {name} that is {expected}, got {value}")
        if dtype not in DTYPES:
            raise ValueError(f"the decode step on CUDA takes weights in {', '.join(DTYPES)}, got {dtype!r}")
        self.config: HRMConfig = config
        self.form = form
        self._graphs: dict[tuple[int, int], _Captured] = {}  # by the requests and the tables' length
        self._graphs_cache: int | None = None  # where the cache lies that they work on
        self.weights = pack(model, dtype)
        self._embedding = model.embed_tokens.weight.detach().to(torch.bfloat16)
        device = self.weights.device
        where = Positions.of(config, config.context)
        layers = [len(stack.layers) for stack in stacks(model)]
        size = _C.cuda_step_workspace_bytes(
            config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
        )
        self._tensors = {
            "embedding": self._embedding,
            "z_init": model.z_L_init.float(),
            "rope": where.table.to(device),
            "weights": self.weights,
            "workspace": torch.zeros(size, dtype=torch.uint8, device=device),
        }
        self._rates = None if where.rates is None else where.rates.to(device)
        self._numbers = {
            "ffn": config.intermediate_size,
            "L_layers": layers[0],
            "H_layers": layers[1] if len(layers) > 1 else 0,
            "H_cycles": config.H_cycles,
            "L_cycles": config.L_cycles,
            "eps": config.rms_norm_eps,
            "embedding_scale": config.embedding_scale,
            "window": config.attention_window,
            "dtype": dtype,
            "persistent": form == "persistent",
            "blocks": blocks,
        }

    def __call__(self, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor) -> Tensor:
        """Append a token to each request's cache; the logits (B, V) float32 that follow.

        tokens and positions (how many tokens the cache holds) are (B) int32, B at most 8; `tables` (B, C) int32 are the
        numbers of each request's blocks of 64 rows; kv is (slots, 2, rows, H, d) bfloat16. Values out of range are
        taken to be the nearest in range.
        """
        if self.form == "graph" and tokens.is_cuda:
            return self._replayed(tokens, positions, tables, kv)
        logits = torch.empty(len(tokens), self.config.vocab_size, device=tokens.device)
        self._launch(tokens, positions, tables, kv, logits)
        return logits

    def _replayed(self, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor) -> Tensor:
        if self._graphs_cache != kv.data_ptr():
            self._graphs.clear()
            self._graphs_cache = kv.data_ptr()
        length = 1 << (tables.shape[1] - 1).bit_length()  # so that growing sequences meet few shapes
        key = (len(tokens), length)
        tables = torch.nn.functional.pad(tables, (0, length - tables.shape[1]))
        if key not in self._graphs:
            logits = torch.empty(len(tokens), self.config.vocab_size, device=tokens.device)
            captured = _Captured(tokens.clone(), positions.clone(), tables.clone(), logits, torch.cuda.CUDAGraph())
            operands = captured.tokens, captured.positions, captured.tables, kv, logits
            self._launch(*operands)  # loads the kernels, which a capture must not; the replay does the same again
            with torch.cuda.graph(captured.graph):
                self._launch(*operands)
            self._graphs[key] = captured
        return self._graphs[key].replay(tokens, positions, tables)

    def _launch(self, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor, logits: Tensor) -> None:
        given = {"tokens": tokens, "positions": positions, "tables": tables, "kv": kv, "logits": logits}
        with torch.cuda.device(tokens.device) if tokens.is_cuda else contextlib.nullcontext():
            _C.cuda_step(
                **{name: to_dlpack(tensor) for name, tensor in (given | self._tensors).items()},
                log_decay=None if self._rates is None else to_dlpack(self._rates),
                **self._numbers,
                stream=stream_of(tokens),
            )
