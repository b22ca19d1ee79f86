"""Rotary position embedding, half split. Kernel: csrc/ops/rope.{h,cpp,cu}.

xPos turns queries and keys by the same op; what it adds, the decay of scores with the distance, is done by the
attention (`xpos_log_decay`).

Shapes: T tokens, H heads, d head_dim, P positions in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore import positions as formulas
from hrmcore.ops.backend import DEVICES, reference_active, stream_of


def rope_table(length: int, head_dim: int, theta: float = 10000.0, exact: bool = False) -> Tensor:
    """The angles of positions 0 … length - 1 as (P, d) float32: a row is cos (d/2), then sin (d/2).

    Every step is rounded to float32 as in the released models: inv_freq_i = theta^(-2i/d), angle = position inv_freq_i.
    With `exact` only the result is rounded: at position 65,536 the other angles are off by up to 0.004.
    Raises ValueError on a length below 1, a head_dim that is odd or below 2, or a theta that is not positive.
    """
    if length < 1:
        raise ValueError(f"rope_table: length must be at least 1, got {length}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_table: head_dim must be even and at least 2, got {head_dim}")
    if not theta > 0:
        raise ValueError(f"rope_table: theta must be positive, got {theta}")
    dtype = torch.float64 if exact else torch.float32
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2).to(dtype) / head_dim)
    angles = torch.arange(length).to(dtype)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def xpos_log_decay(head_dim: int, scale_base: int = 512) -> Tensor:
    """The log decay of xPos, `hrmcore.positions.xpos_log_decay`, for `attention`; (d/2) float32."""
    return torch.from_numpy(formulas.xpos_log_decay(head_dim, scale_base))


def rope_ref(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: channel pair (i, i + d/2) turned by the angle of its position; returns (q', k'), (T, H, d).

    Source: arXiv 2104.09864.
    """
    cos, sin = table[positions.long(), None].chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k, both (T, H, d) float32 or bfloat16, by their tokens' positions; returns contiguous (q', k').

    `table` is (P, d) float32 as `rope_table` makes it, `positions` (T) int32 in [0, P). q and k may be strided views of
    a fused projection as long as d has unit stride. Raises ValueError on a wrong dtype, shape, device, stride or
    position. No gradient flows to the table.
    """
    if reference_active():
        return rope_ref(q, k, table, positions)
    return _rope(q, k, table, positions, False)


@torch.library.custom_op("hrmcore::rope", mutates_args=(), device_types=DEVICES)
def _rope(q: Tensor, k: Tensor, table: Tensor, positions: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    operands = [to_dlpack(x) for x in (q, k, table, positions, q_out, k_out)]
    _C.rope(*operands, inverse, stream_of(q))
    return q_out, k_out


@_rope.register_fake
def _(q: Tensor, k: Tensor, table: Tensor, positions: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, table, positions, ctx.inverse = inputs
    ctx.save_for_backward(table, positions)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    table, positions = ctx.saved_tensors
    q, k = _rope(grad_q.contiguous(), grad_k.contiguous(), table, positions, not ctx.inverse)
    return q, k, None, None, None


_rope.register_autograd(_backward, setup_context=_save)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: one element, ragged sizes, fused views, real shapes."""
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, head_dim, fused in [
        (1, 1, 2, False),
        (3, 2, 6, True),
        (5, 1, 34, False),
        (17, 3, 100, True),
        (64, 4, 64, True),
        (256, 12, 128, True),
    ]:
        slots = 4 if fused else 2
        buffer = torch.randn(tokens, slots, heads, head_dim, generator=generator).to(dtype)
        q, k = (buffer[:, slot] for slot in ((1, 2) if fused else (0, 1)))
        length = 2 * tokens
        positions = torch.randint(0, length, (tokens,), generator=generator, dtype=torch.int32)
        yield {"q": q, "k": k, "table": rope_table(length, head_dim), "positions": positions}


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs that it must compute: backward is the same rotation."""
    q, k, positions = case["q"], case["k"], case["positions"]
    angles = 4 * len(positions) * (q.shape[-1] + 1)
    return {"bytes": 2 * (q.nbytes + k.nbytes) + angles, "flops": 3 * (q.numel() + k.numel())}
