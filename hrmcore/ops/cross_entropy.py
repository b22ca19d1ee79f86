"""Cross-entropy of supervised rows, in chunks: the logits of all rows never exist together.

Kernels: csrc/ops/cross_entropy.{h,cpp,cu}; the GEMMs are torch's. On CUDA the host reads nothing: rows there are not
checked, those out of range are taken for the nearest in range.

Shapes: T tokens, R supervised rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.ops.backend import DEVICES, reference_active, stream_of
from hrmcore.ops.weights import gemm_weight_backward_

CHUNK_ELEMENTS = 1 << 23  # the most logits that exist at one time on the CPU; 32 MiB in float32
CHUNK_ROWS_ON_CUDA = 2048  # each chunk adds to the head's whole gradient: fewer, larger ones add less
NO_TARGET = -1  # of a row that has no loss
ROW_MULTIPLE = 64  # a GEMM's rows are padded to it: oneDNN (bfloat16) compiles a kernel for each new shape


def cross_entropy_ref(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """The specification: sum over r of log sum_v exp(logits_rv) - logits_r[targets_r], logits = hidden[rows] weight^T.

    At least float32, a scalar.
    """
    logits = F.linear(hidden[rows], weight.to(hidden.dtype))
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, ignore_index=NO_TARGET, reduction="sum")


def cross_entropy(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, in nats, of the tokens that follow `rows`; a float32 scalar.

    hidden: (T, D) float32 or bfloat16; weight: (V, D), rounded to hidden's dtype for the products; rows: (R) int64,
    strictly rising, in [0, T); targets: (R) int64 in [0, V), or NO_TARGET where a row has no loss. Sums in float64.
    Backward computes the logits again: only one chunk of them exists at any time. Raises ValueError on a wrong dtype or
    shape, and on the CPU on a wrong row or target.
    """
    if reference_active():
        return cross_entropy_ref(hidden, weight, rows, targets)
    return _cross_entropy(hidden, weight, rows, targets)[0]


def sample_targets(hidden: Tensor, weight: Tensor, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row a token drawn from softmax(hidden[rows] weight^T), (R) int64: the labels of Sophia-G's curvature.

    Source: arXiv 2305.14342, algorithm 2. Arguments and errors as for `cross_entropy`.
    """
    _check_operands(hidden, weight, rows)
    targets = torch.empty_like(rows)
    with torch.no_grad():
        for part, _, logits in _chunks(hidden, weight.to(hidden.dtype), rows):
            chances = logits[: part.stop - part.start].float().softmax(-1)
            # As torch.multinomial draws one of each row, but that on CUDA would wait for its checks of the chances.
            times = torch.empty_like(chances).exponential_(1, generator=generator)
            targets[part] = chances.div_(times).argmax(-1)
    return targets


@torch.library.custom_op("hrmcore::cross_entropy", mutates_args=(), device_types=DEVICES)
def _cross_entropy(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check_operands(hidden, weight, rows)
    if targets.shape != rows.shape:
        raise ValueError(f"cross_entropy: targets must be of shape {tuple(rows.shape)}, got {tuple(targets.shape)}")
    losses, lse = (hidden.new_empty(len(rows), dtype=dtype) for dtype in (torch.float64, torch.float32))
    for part, _, logits in _chunks(hidden, weight.to(hidden.dtype), rows):
        operands = (logits[: part.stop - part.start], targets[part], losses[part], lse[part])
        _C.cross_entropy_forward(*map(to_dlpack, operands), stream_of(hidden))
    return losses.sum().float(), lse


@torch.library.custom_op("hrmcore::cross_entropy_backward", mutates_args=(), device_types=DEVICES)
def _cross_entropy_backward(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, to_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and of weight; the latter is empty unless `to_weight`, which a frozen head is spared."""
    grad_hidden = torch.zeros_like(hidden)
    grad_weight = weight.new_zeros(weight.shape if to_weight else (0,), dtype=torch.float32)
    rounded, scale = weight.to(hidden.dtype), grad.detach().float().reshape(1)
    for part, states, logits in _chunks(hidden, rounded, rows):
        count = part.stop - part.start
        operands = (logits[:count], targets[part], lse[part], scale)
        _C.cross_entropy_backward(*map(to_dlpack, operands), stream_of(hidden))
        logits[count:] = 0
        grad_hidden[rows[part]] = torch.mm(logits, rounded)[:count]
        if to_weight:
            gemm_weight_backward_(grad_weight, False, logits, states)
    return grad_hidden, grad_weight.to(weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: its slice of `rows`, their hidden states and their logits, both padded with rows of zeros.

    All chunks share one buffer of logits.
    """
    least = CHUNK_ROWS_ON_CUDA if hidden.is_cuda else ROW_MULTIPLE
    most = max(least, CHUNK_ELEMENTS // weight.shape[0] // ROW_MULTIPLE * ROW_MULTIPLE)
    most = min(most, rows_filled(len(rows)))
    buffer = hidden.new_empty(most, weight.shape[0])
    if rows.is_cuda:
        rows = rows.clamp(0, len(hidden) - 1)
    for begin in range(0, len(rows), most):
        part = slice(begin, min(begin + most, len(rows)))
        count = part.stop - begin
        states = hidden.new_zeros(rows_filled(count), hidden.shape[1])
        torch.index_select(hidden, 0, rows[part], out=states[:count])
        yield part, states, torch.mm(states, weight.T, out=buffer[: len(states)])


def rows_filled(rows: int) -> int:
    """This number of rows, at least one, rounded up to a multiple of ROW_MULTIPLE."""
    return -(-max(1, rows) // ROW_MULTIPLE) * ROW_MULTIPLE


def check_rows(rows: Tensor, tokens: int) -> None:
    """Raises ValueError unless `rows` are (R) int64, strictly rising, in [0, tokens). Waits for the rows' device."""
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"cross_entropy: rows must be (R) int64, got {rows.dtype} {tuple(rows.shape)}")
    if len(rows) and not (rows[0] >= 0 and rows[-1] < tokens and bool((rows.diff() > 0).all())):
        raise ValueError(f"cross_entropy: rows must be strictly rising, in [0, T = {tokens})")


def _check_operands(hidden: Tensor, weight: Tensor, rows: Tensor) -> None:
    if hidden.dim() != 2 or hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"cross_entropy: hidden must be (T, D) float32 or bfloat16, got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_floating_point():
        raise ValueError(
            f"cross_entropy: weight must be (V, D) with D = {hidden.shape[1]}, got {weight.dtype} {tuple(weight.shape)}"
        )
    if rows.device.type == "cpu":  # elsewhere the host would wait; HRM checks a batch before it goes to the device
        check_rows(rows, len(hidden))


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(rows.shape, dtype=torch.float32)


@_cross_entropy_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, to_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), weight.new_empty(weight.shape if to_weight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None, None]:
    to_weight = ctx.needs_input_grad[1]
    grad_hidden, grad_weight = _cross_entropy_backward(*ctx.saved_tensors, grad, to_weight)
    return grad_hidden, grad_weight if to_weight else None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_save)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Arguments shared by tests and benchmarks, smallest first: one element, ragged sizes, all rows, a real shape."""
    generator = torch.Generator().manual_seed(0)
    for tokens, supervised, width, vocabulary in [
        (1, 1, 1, 2),
        (3, 2, 7, 5),
        (70, 67, 33, 100),
        (17, 17, 8, 3001),
        (256, 100, 128, 1000),
        (1024, 512, 512, 8192),
    ]:
        rows = torch.randperm(tokens, generator=generator)[:supervised].sort().values
        yield {
            "hidden": torch.randn(tokens, width, generator=generator).to(dtype),
            "weight": (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype),
            "rows": rows,
            "targets": torch.randint(vocabulary, (supervised,), generator=generator),
        }


def work(case: dict[str, Any], backward: bool = False) -> dict[str, int]:
    """The bytes that one call must move and the FLOPs of its GEMMs: one forward, three backward."""
    hidden, weight, supervised = case["hidden"], case["weight"], len(case["rows"])
    chosen, product = supervised * hidden[0].nbytes, 2 * supervised * weight.numel()
    if backward:
        return {"bytes": chosen + hidden.nbytes + 2 * weight.nbytes, "flops": 3 * product}
    return {"bytes": chosen + weight.nbytes, "flops": product}
