"""Gated prefix attention over packed sequences. Kernels: csrc/ops/attention.{h,cpp,cu}, attention_backward.{cpp,cu}.

Shapes: T query rows, Tk key rows, H heads, d head_dim, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import DEVICES, reference_active, runs_on_cuda, stream_of


@dataclass(frozen=True)
class PackedMask:
    """Where the sequences of a packed call lie, which keys each query sees, and how scores decay with the distance.

    Query i of a sequence stands at p = (key length - query length) + i and sees key j iff j < max(prefix, p + 1), and
    with a window W only if |p // W - j // W| <= 1: its own block of W tokens and the blocks beside it (a token of a
    response sees the block before). With `log_decay` (xPos), channels c and c + d/2 of the score q k^T are multiplied
    by exp(log_decay[c] |p - j|). Sources: arXiv 2605.20613 (PrefixLM mask), 2212.10554 (xPos, window).
    """

    offsets: Tensor  # (S + 1) int32: sequence s owns the query rows from offsets[s] to offsets[s + 1]
    prefix: Tensor  # (S) int32: every query of sequence s sees its first prefix[s] keys
    key_offsets: Tensor | None = None  # (S + 1) int32: the same as offsets for key rows; None: keys lie as queries do
    log_decay: Tensor | None = None  # (d/2) float32 in [-0.5, 0], as `xpos_log_decay` makes them; None: no decay
    window: int = 0  # a multiple of 64; 0: no window
    tiles: Tensor | None = None  # (N, 8) int32, from `with_tiles`; None: each call that needs a table makes its own

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
        """The fields in an order of their own, for torch.library's schemas, which take tensors and numbers alone."""
        return self.offsets, self.prefix, self.key_offsets, self.log_decay, self.tiles, self.window

    def to(self, device: torch.device) -> PackedMask:
        """The same on a device, without tiles."""
        key_offsets, log_decay = (None if x is None else x.to(device) for x in (self.key_offsets, self.log_decay))
        return PackedMask(self.offsets.to(device), self.prefix.to(device), key_offsets, log_decay, self.window)

    def with_tiles(self, x: Tensor, keys: int | None = None) -> PackedMask:
        """The same with the table of tiles that the bfloat16 kernels of CUDA go by; itself where none is needed.

        x: (T, ...), of the dtype and the device that attention will have; `keys` is Tk, by default T. The table depends
        on the mask alone: made once for a batch, it serves every layer of every visit, forward and backward.
        """
        if self.tiles is not None or not _needs_workspace(x):
            return self
        keys = len(x) if keys is None else keys
        return replace(self, tiles=_attention_table(*_offsets(self), len(x), keys, self.window))

    def sequences(self) -> Iterator[tuple[slice, slice, int]]:
        """The query rows, the key rows and the prefix of each sequence. Waits for the device."""
        query_bounds = self.offsets.tolist()
        key_bounds = query_bounds if self.key_offsets is None else self.key_offsets.tolist()
        for s, prefix in enumerate(self.prefix.tolist()):
            yield slice(*query_bounds[s : s + 2]), slice(*key_bounds[s : s + 2]), prefix


def _seen(query_count: int, key_count: int, visible: int, window: int = 0) -> Tensor:
    """(query_count, key_count) booleans of one sequence: which keys each query sees."""
    query, key = torch.arange(key_count - query_count, key_count)[:, None], torch.arange(key_count)
    seen = key < (query + 1).clamp(min=visible)
    return seen & ((query // window - key // window).abs() <= 1) if window else seen


def _scores(q: Tensor, k: Tensor, log_decay: Tensor | None) -> Tensor:
    """q k^T (H, queries, keys) of one sequence, its queries the last rows, with the decay of xPos if there is one."""
    if log_decay is None:
        return torch.einsum("ihd,jhd->hij", q, k)
    (queries, heads, _), keys = q.shape, k.shape[0]
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs().to(q.device)
    scores = q.new_zeros(heads, queries, keys)
    for pair, slope in enumerate(log_decay.to(q.dtype)):  # one at a time: all together would be a (H, T, Tk, d) tensor
        channels = slice(pair, None, len(log_decay))
        scores = scores + torch.einsum("ihd,jhd->hij", q[..., channels], k[..., channels]) * (slope * distance).exp()
    return scores


def attention_ref(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: PackedMask) -> Tensor:
    """The specification: out = sigmoid(gate) * softmax(q k^T / sqrt(d)) v over the keys that `mask` shows; (T, H, d).

    Source: arXiv 2605.20613 (sigmoid gate).
    """
    outputs = [q.new_empty(0, *q.shape[1:])]
    for rows, keys, prefix in mask.sequences():
        scores = _scores(q[rows], k[keys], mask.log_decay) / math.sqrt(q.shape[-1])
        seen = _seen(scores.shape[1], scores.shape[2], prefix, mask.window).to(q.device)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append(torch.sigmoid(gate[rows]) * torch.einsum("hij,jhd->ihd", weights, v[keys]))
    return torch.cat(outputs)


def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: PackedMask) -> Tensor:
    """sigmoid(gate) * softmax(q k^T / sqrt(d)) v over packed sequences; returns (T, H, d), contiguous.

    q, gate: (T, H, d); k, v: (Tk, H, d); float32 or bfloat16, unit stride in d; d a multiple of 8, at most 256. With a
    decay, q and k are those that `rope` has turned; no gradient flows to `mask.log_decay`. Raises ValueError on a wrong
    dtype, shape, device or stride, on a log_decay or a window out of range, and on offsets or prefix that do not fit
    the rows.
    """
    if reference_active():
        return attention_ref(q, k, v, gate, mask)
    return _attention(q, k, v, gate, *mask.with_tiles(q, len(k)).flat)[0]


# The launches: every call of the kernels, for the ops of this page and of sublayers.py

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, gate


def launch_forward(operands: Operands, mask: PackedMask) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; returns the output (T, H, d) and the log-sum-exps of the scores (T, H) float32."""
    q, k = operands[:2]
    mask = mask.with_tiles(q, len(k))
    results = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    exported = map(to_dlpack, (*operands, *_offsets(mask), *results))
    _C.attention_forward(*exported, *_form(mask), stream_of(q))
    return results


def launch_backward(
    operands: Operands,
    mask: PackedMask,
    results: tuple[Tensor, Tensor],
    grad_out: Tensor,
    grads: Operands,
    overwrite: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run the backward kernel, given what `launch_forward` returned; writes the gradients of the operands to `grads`.

    With `overwrite` grad_out is lost. With a `rotation`, (table, positions) as in `rope`, q and k are rows that it has
    turned, keys lying as queries do, and their gradients those of the rows before: bfloat16 on CUDA turns them before
    it rounds them, all else in a launch of its own. The CPU sums the gradients of keys and values in float32, in place.
    """
    grad_q, grad_k, grad_v, grad_gate = grads
    grad_out = grad_out.contiguous()
    mask = mask.with_tiles(operands[0], len(operands[1]))
    workspace = backward_workspace(operands[0], grad_out if overwrite else None)
    sums = grad_k, grad_v
    if grad_k.dtype != torch.float32 and mask.tiles is None:
        sums = grad_k.new_empty(grad_k.shape, dtype=torch.float32), grad_v.new_empty(grad_v.shape, dtype=torch.float32)
    inputs = *operands, *_offsets(mask), *results, grad_out
    exported = map(to_dlpack, (*inputs, grad_q, *sums, grad_gate))
    turned_back = rotation if mask.tiles is not None else None
    exported_rotation = (None, None) if turned_back is None else tuple(map(to_dlpack, turned_back))
    _C.attention_backward(*exported, *_form(mask), *workspace, *exported_rotation, stream_of(grad_q))
    if sums[0] is not grad_k:
        grad_k.copy_(sums[0])
        grad_v.copy_(sums[1])
    if rotation is not None and turned_back is None:
        _C.rope(*map(to_dlpack, (grad_q, grad_k, *rotation, grad_q, grad_k)), True, stream_of(grad_q))


def backward_workspace(q: Tensor, ungated: Tensor | None = None) -> tuple[Any, Any]:
    """What the bfloat16 backward of CUDA writes for itself: dO (T, H, d), and two numbers a row and head."""
    if not _needs_workspace(q):
        return None, None
    ungated = torch.empty(q.shape, dtype=q.dtype, device=q.device) if ungated is None else ungated
    row_terms = torch.empty((2, q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return to_dlpack(ungated), to_dlpack(row_terms)


def _needs_workspace(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and runs_on_cuda(q)


def _offsets(mask: PackedMask) -> tuple[Tensor, Tensor, Tensor]:
    return mask.offsets, mask.offsets if mask.key_offsets is None else mask.key_offsets, mask.prefix


def _form(mask: PackedMask) -> tuple[Any, int, Any]:
    log_decay, tiles = (None if x is None else to_dlpack(x) for x in (mask.log_decay, mask.tiles))
    return log_decay, mask.window, tiles


@torch.library.custom_op("hrmcore::attention_table", mutates_args=(), device_types=DEVICES)
def _attention_table(
    offsets: Tensor, key_offsets: Tensor, prefix: Tensor, query_rows: int, key_rows: int, window: int
) -> Tensor:
    tiles = _empty_table(prefix, query_rows, key_rows)
    _C.attention_table(
        offsets=to_dlpack(offsets),
        key_offsets=to_dlpack(key_offsets),
        prefix=to_dlpack(prefix),
        query_rows=query_rows,
        key_rows=key_rows,
        window=window,
        tiles=to_dlpack(tiles),
        stream=stream_of(offsets),
    )
    return tiles


@_attention_table.register_fake
def _(offsets: Tensor, key_offsets: Tensor, prefix: Tensor, query_rows: int, key_rows: int, window: int) -> Tensor:
    return _empty_table(prefix, query_rows, key_rows)


def _empty_table(prefix: Tensor, *rows: int) -> Tensor:
    """(N, 8) int32: a line for each tile of 64 rows that S sequences of any lengths can have."""
    lines = sum(count // 64 + len(prefix) for count in rows)
    return torch.empty((lines, 8), dtype=torch.int32, device=prefix.device)


@torch.library.custom_op("hrmcore::attention", mutates_args=(), device_types=DEVICES)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None,
    log_decay: Tensor | None,
    tiles: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor]:
    return launch_forward((q, k, v, gate), PackedMask(offsets, prefix, key_offsets, log_decay, window, tiles))


@torch.library.custom_op("hrmcore::attention_backward", mutates_args=(), device_types=DEVICES)
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    prefix: Tensor,
    key_offsets: Tensor | None,
    log_decay: Tensor | None,
    tiles: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = PackedMask(offsets, prefix, key_offsets, log_decay, window, tiles)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gate.new_empty(gate.shape)
    launch_backward((q, k, v, gate), mask, (out, lse), grad_out, grads)
    return grads


@_attention.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], *output, *inputs[4:-1])
    ctx.window = inputs[-1]


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    operands, mask = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    return *_attention_backward(*operands, grad_out, *mask, ctx.window), *6 * [None]


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
        prefix_counts = torch.tensor(prefix, dtype=torch.int32)
        yield {
            "q": torch.randn(int(offsets[-1]), heads, head_dim, generator=generator).to(dtype),
            "k": torch.randn(int(key_offsets[-1]), heads, head_dim, generator=generator).to(dtype),
            "v": fused[:, 3],
            "gate": fused[: int(offsets[-1]), 0],
            "mask": PackedMask(offsets.int(), prefix_counts, None if cached is None else key_offsets.int()),
        }


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs of its GEMMs over the visible (query, key) pairs."""
    queries, keys, mask = case["q"], case["k"], case["mask"]
    pairs = sum(
        int(_seen(rows.stop - rows.start, seen.stop - seen.start, prefix, mask.window).sum())
        for rows, seen, prefix in mask.sequences()
    )
    heads, head_dim = queries.shape[1:]
    lse = 4 * queries.shape[0] * heads
    if backward:
        return {"bytes": 6 * queries.nbytes + 4 * keys.nbytes + lse, "flops": 10 * pairs * heads * head_dim}
    return {"bytes": 3 * queries.nbytes + 2 * keys.nbytes + lse, "flops": 4 * pairs * heads * head_dim}


def peer(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: PackedMask) -> Tensor:
    """The same, without decay or window, through torch's own fused attention, for benchmarks."""
    outputs = []
    for rows, keys, prefix in mask.sequences():
        seen = _seen(rows.stop - rows.start, keys.stop - keys.start, prefix)
        queries, sequence_keys, values = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        attended = F.scaled_dot_product_attention(queries, sequence_keys, values, attn_mask=seen)
        outputs.append(attended[0].transpose(0, 1))
    return torch.sigmoid(gate) * torch.cat(outputs)
