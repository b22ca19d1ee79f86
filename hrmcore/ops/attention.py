"""Gated prefix attention over packed sequences. Kernels: csrc/ops/attention.{h,cpp,cu}, attention_backward.{cpp,cu}.

Shapes: T query rows, Tk key rows, H heads, d head_dim, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import DEVICES, reference_active, stream_of


def _seen(query_count: int, key_count: int, visible: int, window: int = 0) -> Tensor:
    """(query_count, key_count) booleans of one sequence: which keys each query sees."""
    query, key = torch.arange(key_count - query_count, key_count)[:, None], torch.arange(key_count)
    seen = key < (query + 1).clamp(min=visible)
    return seen & ((query // window - key // window).abs() <= 1) if window else seen


def _scores(q: Tensor, k: Tensor, rates: Tensor | None) -> Tensor:
    """q k^T (H, queries, keys) of one sequence, its queries the last rows; faded where there are rates."""
    if rates is None:
        return torch.einsum("ihd,jhd->hij", q, k)
    (queries, heads, _), keys = q.shape, k.shape[0]
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs().to(q.device)
    scores = q.new_zeros(heads, queries, keys)
    for pair, rate in enumerate(rates.to(q.dtype)):  # one at a time: all together would be a (H, T, Tk, d) tensor
        channels = slice(pair, None, len(rates))
        scores = scores + torch.einsum("ihd,jhd->hij", q[..., channels], k[..., channels]) * (rate * distance).exp()
    return scores


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None = None,
    rates: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """The specification: out = sigmoid(gate) * softmax(q k^T / sqrt(d)) v, each sequence on its own; (T, H, d).

    Query i of a sequence stands at p = (key length - query length) + i and sees key j iff j < max(prefix, p + 1), and
    with a window W only if |p // W - j // W| <= 1. With rates (xPos), channels c and c + d/2 of q k^T are multiplied by
    exp(rates[c] |p - j|). Sources: arXiv 2605.20613 (PrefixLM mask and sigmoid gate), 2212.10554 (xPos, window).
    """
    query_bounds = offsets.tolist()
    key_bounds = query_bounds if key_offsets is None else key_offsets.tolist()
    outputs = [q.new_empty(0, *q.shape[1:])]
    for s, visible in enumerate(prefix.tolist()):
        rows, keys = slice(*query_bounds[s : s + 2]), slice(*key_bounds[s : s + 2])
        scores = _scores(q[rows], k[keys], rates) / math.sqrt(q.shape[-1])
        seen = _seen(scores.shape[1], scores.shape[2], visible, window).to(q.device)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append(torch.sigmoid(gate[rows]) * torch.einsum("hij,jhd->ihd", weights, v[keys]))
    return torch.cat(outputs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None = None,
    rates: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """sigmoid(gate) * softmax(q k^T / sqrt(d)) v over packed sequences; returns (T, H, d), contiguous.

    q, gate: (T, H, d); k, v: (Tk, H, d); float32 or bfloat16, unit stride in d; d a multiple of 8, at most 256.
    offsets, key_offsets: (S + 1) int32, sequence s owns the rows offsets[s] to offsets[s + 1]; key_offsets None means
    that the keys are packed as the queries are. prefix: (S) int32, how many first keys every query of a sequence sees.
    rates: (d/2) float32 in [-0.5, 0], as `xpos_rates` makes them for q and k that `rope` has turned; no gradient flows
    to them. window: a multiple of 64, or 0: each query sees its own block of so many tokens and the blocks beside it
    (of a response, the one before). Raises ValueError on a wrong dtype, shape, device or stride, on rates or a window
    out of range, and on offsets or prefix that do not fit the rows.
    """
    if reference_active():
        return attention_ref(q, k, v, gate, offsets, prefix, key_offsets, rates, window)
    return _attention(q, k, v, gate, offsets, prefix, key_offsets, rates, window)[0]


@torch.library.custom_op("hrmcore::attention", mutates_args=(), device_types=DEVICES)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None,
    rates: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    key_offsets = offsets if key_offsets is None else key_offsets
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    operands = map(to_dlpack, (q, k, v, gate, offsets, key_offsets, prefix, out, lse))
    _C.attention_forward(*operands, None if rates is None else to_dlpack(rates), window, stream_of(q))
    return out, lse


@torch.library.custom_op("hrmcore::attention_backward", mutates_args=(), device_types=DEVICES)
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    rates: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key_offsets = offsets if key_offsets is None else key_offsets
    grad_q, grad_gate = q.new_empty(q.shape), q.new_empty(q.shape)
    grad_k, grad_v = (k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))
    inputs = (q, k, v, gate, offsets, key_offsets, prefix, out, lse, grad_out.contiguous())
    operands = map(to_dlpack, (*inputs, grad_q, grad_k, grad_v, grad_gate))
    _C.attention_backward(*operands, None if rates is None else to_dlpack(rates), window, stream_of(q))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_gate


@_attention.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    *operands, rates, ctx.window = inputs
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*operands, out, lse, rates)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *saved, rates = ctx.saved_tensors
    return *_attention_backward(*saved, grad_out, rates, ctx.window), None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: ragged sizes, one token, longer keys, real shapes.

    v and gate are strided views of one fused (T, 4, H, d) buffer, as the projection leaves them.
    """
    generator = torch.Generator().manual_seed(0)
    for heads, head_dim, lengths, prefix, cached in [
        (1, 8, [1], [0], None),
        (2, 16, [1, 3, 2], [0, 1, 2], None),
        (3, 24, [5, 0, 17, 3], [2, 0, 17, 1], None),  # an empty sequence
        (1, 256, [70], [13], None),
        (2, 104, [33, 66], [0, 40], None),
        (4, 32, [31, 32, 33, 63, 64, 65, 1], [0, 32, 20, 63, 1, 7, 1], None),
        (2, 64, [129, 100, 200], [70, 0, 150], None),
        (2, 40, [1, 1, 3, 0], [0, 9, 70, 4], [4, 70, 130, 6]),  # cached decoding
        (3, 64, [70, 1, 40], [100, 0, 0], [60, 200, 64]),  # chunked prefill
        (6, 64, [20, 57, 120, 33, 96, 64, 41, 81], [12, 30, 60, 0, 96, 20, 1, 64], None),
        (4, 128, [400], [128], None),
    ]:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        key_offsets = offsets + torch.tensor([0, *(cached or [0] * len(lengths))]).cumsum(0)
        fused = torch.randn(int(key_offsets[-1]), 4, heads, head_dim, generator=generator).to(dtype)
        yield {
            "q": torch.randn(int(offsets[-1]), heads, head_dim, generator=generator).to(dtype),
            "k": torch.randn(int(key_offsets[-1]), heads, head_dim, generator=generator).to(dtype),
            "v": fused[:, 3],
            "gate": fused[: int(offsets[-1]), 0],
            "offsets": offsets.int(),
            "prefix": torch.tensor(prefix, dtype=torch.int32),
            "key_offsets": None if cached is None else key_offsets.int(),
        }


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs of its matrix products over the visible (query, key) pairs."""
    queries, keys = case["q"], case["k"]
    query_counts = case["offsets"].diff().tolist()
    key_counts = query_counts if case["key_offsets"] is None else case["key_offsets"].diff().tolist()
    sequences = zip(query_counts, key_counts, case["prefix"].tolist(), strict=True)
    pairs = sum(int(_seen(*sequence).sum()) for sequence in sequences)
    heads, head_dim = queries.shape[1:]
    lse = 4 * queries.shape[0] * heads
    if backward:
        return {"bytes": 6 * queries.nbytes + 4 * keys.nbytes + lse, "flops": 10 * pairs * heads * head_dim}
    return {"bytes": 3 * queries.nbytes + 2 * keys.nbytes + lse, "flops": 4 * pairs * heads * head_dim}


def peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None = None,
    rates: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """The same through torch's own fused attention, for benchmarks."""
    query_bounds = offsets.tolist()
    key_bounds = query_bounds if key_offsets is None else key_offsets.tolist()
    outputs = []
    for s, visible in enumerate(prefix.tolist()):
        rows, keys = slice(*query_bounds[s : s + 2]), slice(*key_bounds[s : s + 2])
        mask = _seen(rows.stop - rows.start, keys.stop - keys.start, visible)
        queries, sequence_keys, values = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        attended = F.scaled_dot_product_attention(queries, sequence_keys, values, attn_mask=mask)
        outputs.append(attended[0].transpose(0, 1))
    return torch.sigmoid(gate) * torch.cat(outputs)
