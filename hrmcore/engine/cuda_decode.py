"""The fused decode step on CUDA: one token for each of up to 32 requests. Kernels: csrc/decode/decode_step.{h,cu}.

Shapes: B requests, V vocabulary, D width, H heads, d head_dim, F ffn width, R and K a matrix's rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.engine.mma_layout import MMA_DTYPES, TILE, bytes_of, in_fragments, paired
from hrmcore.engine.runner import PAGE
from hrmcore.model import HRM, Block, Positions, Stack
from hrmcore.ops.backend import stream_of

MOST_REQUESTS: int = _C.max_batch  # of any device; CudaStep.most_requests says how many this one takes

PACKED_AT_ONCE = 1 << 22  # weights; packing takes up to 19 bytes for each

Form = Literal["graph", "persistent"]

_HEAD_DIMS = (16, 32, 64, 128)


class Matrix(NamedTuple):
    """A matrix as the step takes it."""

    weight: Tensor  # (R, K)
    pieces: int  # into which its rows are cut to be paired (mma_layout.paired); 0: they stay in order
    dtype: str


def matrices(model: HRM, dtype: str) -> Iterator[Matrix]:
    """All of the model in the step's order: L's layers, H's unless they are L's, the head; in a layer gqkv, o, gate_up,
    down. As in the CPU engine, the head of an int4 model is int8.
    """
    heads = 4 * model.config.num_attention_heads
    for stack in stacks(model):
        for layer in stack.layers:
            assert isinstance(layer, Block)
            yield Matrix(layer.gqkv_proj.weight, heads, dtype)
            yield Matrix(layer.o_proj.weight, 0, dtype)
            yield Matrix(layer.gate_up_proj.weight, 1, dtype)
            yield Matrix(layer.down_proj.weight, 0, dtype)
    yield Matrix(model.lm_head.weight, 0, "int8" if dtype == "int4" else dtype)


@torch.no_grad()
def pack(model: HRM, dtype: str) -> Tensor:
    """All matrices of the model, one after the other, as bytes, on the device of its embedding.

    They may lie in main memory: no more than one at a time is on the device, and PACKED_AT_ONCE of its weights are
    packed at a time.
    """
    found, device = list(matrices(model, dtype)), model.embed_tokens.weight.device
    sizes = [bytes_of(matrix.weight, matrix.dtype) for matrix in found]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    for matrix, place in zip(found, packed.split(sizes), strict=True):
        for part in _parts(matrix, device):
            fragments = in_fragments(part, matrix.dtype).flatten()
            place[: len(fragments)] = fragments
            place = place[len(fragments) :]
    return packed


def _parts(matrix: Matrix, device: torch.device) -> Iterator[Tensor]:
    """A matrix on the device, some tiles of its rows at a time, in the step's order."""
    weight = paired(matrix.weight.to(device), matrix.pieces) if matrix.pieces else matrix.weight
    tiles = max(1, PACKED_AT_ONCE // (TILE * weight.shape[1]))
    return (part.to(device) for part in weight.split(tiles * TILE))


def stacks(model: HRM) -> list[Stack]:
    """The stacks that have weights of their own."""
    return [model.L_module] if model.H_module is model.L_module else [model.L_module, model.H_module]


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph of one decode step, and the tensors that it reads and writes."""

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
    """One model's decode step: calling it with (tokens, positions, tables, kv) gives the logits (B, V) float32.

    `form` is "persistent" (one cooperative launch) or "graph" (a launch for each phase; on a GPU, these are captured as
    a CUDA graph at the first step of a shape and replayed from then on). Both give the same bits. `blocks` is the grid:
    0 is one thread block for each multiprocessor. `dtype` is that of the weights: bfloat16, int8 or int4; `kv_dtype`
    that of the cache: bfloat16 or int8.

    Raises ValueError on a model that the kernels do not take: a head_dim other than 16, 32, 64 or 128, or a width that
    is not a multiple of 16.
    """

    def __init__(
        self,
        model: HRM,
        form: Form = "persistent",
        blocks: int = 0,
        dtype: str = "bfloat16",
        kv_dtype: str = "bfloat16",
    ) -> None:
        config = model.config
        _check(config, dtype)
        self.kv_dtype = kv_dtype
        self.config: HRMConfig = config
        self.form = form
        self._graphs: dict[tuple[int, int], _Captured] = {}  # by the batch and the tables' length
        self._most_requests: dict[int, int] = {}  # by the tables' length
        self._graphs_cache: int | None = None  # address of the KV cache that they work on
        self.weights = pack(model, dtype)
        device = self.weights.device
        positions = Positions.of(config, config.context)
        layers = [len(stack.layers) for stack in stacks(model)]
        size = _C.cuda_step_workspace_bytes(
            config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
        )
        self._tensors = {
            "embedding": model.embed_tokens.weight.detach().to(torch.bfloat16),
            "z_init": model.z_L_init.float(),
            "rope": positions.table.to(device),
            "weights": self.weights,
            "workspace": torch.zeros(size, dtype=torch.uint8, device=device),
        }
        self._log_decay = None if positions.log_decay is None else positions.log_decay.to(device)
        self._numbers: dict[str, Any] = {
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

        tokens and positions (how many tokens the cache holds) are (B) int32, B at most most_requests(C), and `tables`
        (B, C) int32 the numbers of each request's pages of 64 rows in kv, which is as cuda_cache.empty_cache makes it.
        Values out of range are taken to be the nearest in range.
        """
        if self.form == "graph" and tokens.is_cuda:
            return self._replayed(tokens, positions, tables, kv)
        logits = torch.empty(len(tokens), self.config.vocab_size, device=tokens.device)
        self._launch(tokens, positions, tables, kv, logits)
        return logits

    def most_requests(self, pages: int) -> int:
        """How many requests one call takes on this device, with tables of so many pages: up to MOST_REQUESTS.

        Their activations, angles and lists of pages must lie in the shared memory of a multiprocessor. The bits of a
        request do not depend on how many are in a call. Raises RuntimeError where not even one request fits.
        """
        length = self._table_length(pages)
        if length not in self._most_requests:
            device, config, numbers = self.weights.device, self.config, self._numbers
            most = _C.cuda_step_most_requests(
                width=config.hidden_size,
                heads=config.num_attention_heads,
                head_dim=config.head_dim,
                xpos=self._log_decay is not None,
                int8_cache=self.kv_dtype == "int8",
                table_length=length,
                **{name: numbers[name] for name in ("ffn", "window", "dtype", "blocks")},
                device=device.index or 0,
            )
            if most == 0:
                raise RuntimeError(
                    f"the decode step of this model with {pages * PAGE:,} tokens in a request's cache does not fit in "
                    f"the shared memory of {device}; give a smaller attention_window, or use device 'cpu'"
                )
            self._most_requests[length] = most
        return self._most_requests[length]

    def _table_length(self, pages: int) -> int:
        """Of the tables that the kernels see: in graphs a power of two, so that growing sequences meet few shapes."""
        return pages if self.form == "persistent" else 1 << (pages - 1).bit_length()

    def _replayed(self, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor) -> Tensor:
        if self._graphs_cache != kv.data_ptr():
            self._graphs.clear()
            self._graphs_cache = kv.data_ptr()
        length = self._table_length(tables.shape[1])
        key = (len(tokens), length)
        tables = torch.nn.functional.pad(tables, (0, length - tables.shape[1]))
        if key not in self._graphs:
            logits = torch.empty(len(tokens), self.config.vocab_size, device=tokens.device)
            captured = _Captured(tokens.clone(), positions.clone(), tables.clone(), logits, torch.cuda.CUDAGraph())
            operands = captured.tokens, captured.positions, captured.tables, kv, logits
            self._launch(*operands)  # loads the kernels, which a capture must not; the replay does the same again
            with torch.cuda.device(tokens.device), torch.cuda.graph(captured.graph):
                self._launch(*operands)
            self._graphs[key] = captured
        return self._graphs[key].replay(tokens, positions, tables)

    def _launch(self, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor, logits: Tensor) -> None:
        operands = {"tokens": tokens, "positions": positions, "tables": tables, "kv": kv, "logits": logits}
        _C.cuda_step(
            **{name: to_dlpack(tensor) for name, tensor in (operands | self._tensors).items()},
            log_decay=None if self._log_decay is None else to_dlpack(self._log_decay),
            **self._numbers,
            stream=stream_of(tokens),
        )


def _check(config: HRMConfig, dtype: str) -> None:
    """Raises ValueError on what the kernels do not take."""
    for name, value, fits in (
        ("head_dim", config.head_dim, config.head_dim in _HEAD_DIMS),
        ("hidden_size", config.hidden_size, config.hidden_size % TILE == 0),
        ("intermediate_size", config.intermediate_size, config.intermediate_size % TILE == 0),
    ):
        if not fits:
            expected = "one of 16, 32, 64, 128" if name == "head_dim" else f"a multiple of {TILE}"
            raise ValueError(f"the decode step on CUDA takes a {name} that is {expected}, got {value}")
    if dtype not in MMA_DTYPES:
        raise ValueError(f"the decode step on CUDA takes weights in {', '.join(MMA_DTYPES)}, got {dtype!r}")
