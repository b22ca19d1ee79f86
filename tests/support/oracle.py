"""What the op tests share: the error measure, operands framed by NaNs, and the same-bits check."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C

DTYPES = [torch.float32, torch.bfloat16]
FRAME = 0.6875


@cache
def listed(cases: Callable[[torch.dtype], Iterator[dict[str, Any]]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """An op's cases in one dtype, made once and shared: not to be written to."""
    return list(cases(dtype))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """norm(out - reference) / norm(reference), the reference in float64. A NaN or a wrong shape is an error of inf."""
    assert reference.dtype == torch.float64
    assert out.shape == reference.shape
    error = (out.double() - reference).norm() / reference.norm()
    return float("inf") if error.isnan() else error.item()


def bound(out: Tensor, float32: float) -> float:
    """The relative error allowed: `float32` in that dtype, one rounding of the exact result in bfloat16.

    One rounding changes a number by at most 2^-8 and the norm of many numbers by about 1.7e-3; a second rounding on the
    way would show.
    """
    return float32 if out.dtype == torch.float32 else 2.0**-8 if out.numel() < 100 else 2.0**-9


def framed(x: Tensor, frame: float = torch.nan) -> Tensor:
    """A copy of `x` that is the inside of a larger buffer of NaNs: a read past its rows or columns shows."""
    if x.dim() == 1:
        buffer = torch.full((len(x) + 6,), frame, dtype=x.dtype)
        buffer[3:-3] = x
        return buffer[3:-3]
    buffer = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 6), frame, dtype=x.dtype)
    inside = buffer[1:-1, ..., 3:-3]
    inside.copy_(x)
    return inside


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output of NaNs in a frame of one number; `only_inside_written` then sees missed and stray writes."""
    return framed(torch.full(shape, torch.nan, dtype=dtype), FRAME)


def only_inside_written(output: Tensor) -> bool:
    """True when every element of a `poisoned` output was written and none around it."""
    buffer = output._base
    assert buffer is not None
    around = torch.ones(buffer.shape, dtype=torch.bool)
    around[1:-1, ..., 3:-3] = False
    return not output.isnan().any() and bool((buffer[around] == FRAME).all())


def call(kernel: Callable[..., None], *operands: object) -> None:
    """Call a kernel of `_C` on tensors, None and numbers."""
    kernel(*[to_dlpack(x) if isinstance(x, Tensor) else x for x in operands])


def same_bits(compute: Callable[[], Sequence[Tensor]]) -> bool:
    """True when 1, 2 and 3 threads, and repeated runs, give identical results."""
    results = []
    for threads in (1, 2, 3, 3, 1):
        _C.set_num_threads(threads)
        results.append(compute())
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
