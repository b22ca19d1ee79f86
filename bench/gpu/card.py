"""The card that the models of this room are of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class H200:
    """One NVIDIA H200: what was measured on it on 2026-11-27 (docs/results/cuda.md), and what is assumed."""

    processors: int = 132
    product: float = 777e12  # FLOP/s of a bfloat16 product of 8,192
    copy: float = 4.14e12  # bytes/s of memory, read and written together
    second_level: float = 5.5e12  # assumed: bytes/s of the second-level cache
    launch: float = 1.8e-6  # seconds of a graph's kernel, fitted by step_model.py to measured phases
