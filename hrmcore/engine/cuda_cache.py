"""The KV cache on CUDA, in bfloat16 or int8: its shape, its pages, and in torch what the kernels write into it.

Shapes: T tokens, H heads, d head_dim, G a key's scales (one for each 32 channels).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.engine.runner import PAGE

KV_DTYPES = ("bfloat16", "int8")
SCALE_CHANNELS = 32  # of a key that share a scale
_SCALE_BYTES = 16  # of a token: the key's, the value's
_LEAST_SCALE = 2.0**-100  # below it numbers are taken for zeros


def bytes_per_token(config: HRMConfig, dtype: torch.dtype) -> int:
    """What one token adds to the cache."""
    one = Int8Page(config.head_dim).bytes // PAGE if dtype == torch.uint8 else 2 * config.head_dim * dtype.itemsize
    return config.cache_slots * config.num_attention_heads * one


def empty_cache(config: HRMConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache without pages: (slots, 2, rows, H, d), or in int8 (slots, pages, H, bytes) uint8."""
    slots, heads, head_dim = config.cache_slots, config.num_attention_heads, config.head_dim
    shape = (slots, 0, heads, Int8Page(head_dim).bytes) if dtype == torch.uint8 else (slots, 2, 0, heads, head_dim)
    return torch.empty(shape, dtype=dtype, device=device)


def pages_of(kv: Tensor, first: int, count: int) -> Tensor:
    """A view of some pages of either kind of cache."""
    if kv.dtype == torch.uint8:
        return kv[:, first : first + count]
    return kv[:, :, first * PAGE : (first + count) * PAGE]


def page_count(kv: Tensor) -> int:
    """How many pages a cache of either kind has."""
    return kv.shape[1] if kv.dtype == torch.uint8 else kv.shape[2] // PAGE


def grown(kv: Tensor, pages: int) -> Tensor:
    """A larger cache of so many pages that begins with the ones of this."""
    old = page_count(kv)
    axis, size = (1, pages) if kv.dtype == torch.uint8 else (2, pages * PAGE)
    larger = kv.new_empty(*kv.shape[:axis], size, *kv.shape[axis + 1 :])
    pages_of(larger, 0, old).copy_(kv)
    return larger


class Int8Parts(NamedTuple):
    """Views of one slot's pages in int8: (pages, H, 64, d or G), scales of keys bfloat16, of values (pages, H, 64)."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor


class Int8Page:
    """Where things lie in a page of a slot and head in int8, in bytes (csrc/decode/int8_page.h)."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.groups = max(1, head_dim // SCALE_CHANNELS)
        self.bytes = PAGE * (2 * head_dim + _SCALE_BYTES)

    def parts(self, pages: Tensor) -> Int8Parts:
        """Of pages (pages, H, bytes) uint8."""
        numbers = pages[..., : 2 * PAGE * self.head_dim].unflatten(-1, (2, PAGE, self.head_dim))
        scales = pages[..., 2 * PAGE * self.head_dim :].unflatten(-1, (PAGE, _SCALE_BYTES))
        return Int8Parts(
            numbers[:, :, 0],
            numbers[:, :, 1],
            scales[..., : 2 * self.groups].view(torch.bfloat16),
            scales[..., 8:12].view(torch.float32)[..., 0],
        )


def store_int8(pages: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
    """Round keys and values (T, H, d) into these rows (T) int64 of one slot's pages (pages, H, bytes) uint8.

    The numbers of csrc/decode/int8_page.h but for rounding. A number that is not finite leaves such a scale.
    """
    page = Int8Page(k.shape[-1])
    parts = page.parts(pages)
    page_numbers, inner = rows // PAGE, rows % PAGE
    grouped = k.float().unflatten(-1, (page.groups, -1))
    scales = (grouped.abs().amax(-1) * (1 / 127)).bfloat16()
    parts.keys[page_numbers, :, inner] = _as_bytes(grouped, scales.float()).flatten(-2)
    parts.key_scales[page_numbers, :, inner] = _not_too_small(scales)
    value_scales = v.float().abs().amax(-1) * (1 / 127)
    parts.values[page_numbers, :, inner] = _as_bytes(v.float(), value_scales)
    parts.value_scales[page_numbers, :, inner] = _not_too_small(value_scales)


def from_int8(pages: Tensor, rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values (T, H, d) float32 of these rows (T) of one slot's pages."""
    page = Int8Page(head_dim)
    parts = page.parts(pages)
    at = (rows // PAGE, slice(None), rows % PAGE)
    keys = (parts.keys[at].float() - 128).unflatten(-1, (page.groups, -1)) * parts.key_scales[at].float()[..., None]
    return keys.flatten(-2), (parts.values[at].float() - 128) * parts.value_scales[at][..., None]


def _not_too_small(scales: Tensor) -> Tensor:
    return torch.where(scales < _LEAST_SCALE, torch.zeros_like(scales), scales)


def _as_bytes(x: Tensor, scales: Tensor) -> Tensor:
    scales = _not_too_small(scales)[..., None]
    whole = torch.where(scales == 0, torch.zeros_like(x), (x * (1 / scales)).round())
    return (whole.nan_to_num(0.0).clamp(-127, 127) + 128).to(torch.uint8)
