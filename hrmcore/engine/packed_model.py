"""A model whose products take the decode step's packed weights, in int8 or int4: the prefill's on CUDA.

It has no matrix but these; the embedding is the model's own. Kernel: csrc/decode/packed_product.{h,cu}.
Shapes: T tokens, D width, V vocabulary, R and K a matrix's rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.engine.cuda_decode import matrices, stacks
from hrmcore.engine.mma_layout import bytes_of
from hrmcore.model import HRM, ForwardContext
from hrmcore.ops.attention import attention
from hrmcore.ops.backend import stream_of
from hrmcore.ops.rms_norm import rms_norm
from hrmcore.ops.rope import rope


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (R, K) among a step's bytes. `pieces` are as in cuda_decode.Matrix."""

    weights: Tensor
    rows: int
    pieces: int
    dtype: str

    def multiply(
        self, x: Tensor, gated: bool = False, dtype: torch.dtype = torch.bfloat16, processors: int = 0
    ) -> Tensor:
        """x (T, K) bfloat16 -> x W^T (T, R), or silu(a) b (T, R / 2) of its halves a and b if `gated`.

        `processors` is for how many multiprocessors the work is shared out; 0 is the device's. The bits do not depend
        on it. Raises ValueError on operands of a wrong shape or dtype.
        """
        out = torch.empty(len(x), self.rows // 2 if gated else self.rows, dtype=dtype, device=x.device)
        _C.cuda_packed_product(
            x=to_dlpack(x),
            weights=to_dlpack(self.weights),
            out=to_dlpack(out),
            pieces=self.pieces,
            gated=gated,
            dtype=self.dtype,
            processors=processors,
            stream=stream_of(x),
        )
        return out


class PackedBlock(nn.Module):
    """What `model.Block` computes, for inference alone. SwiGLU is part of a product: what it takes is not rounded."""

    def __init__(self, heads: int, eps: float, matrices: list[PackedMatrix]) -> None:
        super().__init__()
        self._heads, self._eps = heads, eps
        self._gqkv, self._o, self._gate_up, self._down = matrices

    def forward(self, normed: Tensor, stream: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Takes the residual stream and its norm, both (T, D); returns two tensors whose sum is the new stream.

        With `context.rows` the two are of these tokens alone, (R, D).
        """
        gate, q, k, v = self._gqkv.multiply(normed).view(len(normed), 4, self._heads, -1).unbind(1)
        if context.cache is None:
            q, k = rope(q, k, context.table, context.positions)
        else:
            q, k, v = context.cache.extend(q, k, v, context)
        attended = attention(q, k, v, gate, context.mask).flatten(1)
        if context.rows is not None:
            attended, stream = (x.index_select(0, context.rows) for x in (attended, stream))
        normed, stream = rms_norm(self._o.multiply(attended), stream, self._eps)
        return self._down.multiply(self._gate_up.multiply(normed, gated=True)), stream


class PackedHead(nn.Module):
    """States (T, D) bfloat16 -> logits (T, V) float32."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self._matrix = matrix

    def forward(self, states: Tensor) -> Tensor:
        """The logits (T, V) float32 of states (T, D)."""
        return self._matrix.multiply(states.contiguous(), dtype=torch.float32)


def packed_model(model: HRM, weights: Tensor, dtype: str) -> HRM:
    """The model (in bfloat16) with its matrices as cuda_decode.pack has packed them; the embedding is shared."""
    config = model.config
    found = list(matrices(model, dtype))
    sizes = [bytes_of(matrix.weight, matrix.dtype) for matrix in found]
    packed = (
        PackedMatrix(place, len(matrix.weight), matrix.pieces, matrix.dtype)
        for matrix, place in zip(found, weights.split(sizes), strict=True)
    )
    with torch.device("meta"):
        ours = HRM(config)
    ours.embed_tokens = model.embed_tokens
    ours.z_L_init = model.z_L_init
    ours.reset_positions(len(model.rope_table))
    ours.shares_weights = False
    for stack in stacks(ours):
        blocks = [[next(packed) for _ in range(4)] for _ in stack.layers]
        stack.layers = nn.ModuleList(PackedBlock(config.num_attention_heads, config.rms_norm_eps, b) for b in blocks)
    ours.lm_head = PackedHead(next(packed))  # type: ignore[assignment]
    return ours.requires_grad_(False).eval()
