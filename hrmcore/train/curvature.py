"""Sophia's curvature samples (arXiv 2305.14342, section 2.3): what the trainer does every k steps.

A sample depends on weights, batches and seed alone. A resumed run therefore draws what an uninterrupted one draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from hrmcore.data.packing import PackedBatch
from hrmcore.model import HRM
from hrmcore.ops.backend import reference_ops
from hrmcore.optim import Sophia


def gauss_newton_bartlett(
    model: HRM,
    batches: Sequence[PackedBatch],
    labels: int,
    horizon: int,
    generator: torch.Generator,
    recompute: str = "sublayer",
) -> None:
    """Add to the gradients those of the labels' summed loss over √B, B labels drawn from the model's distribution.

    A squared gradient is then B·ĥ whatever the size of the batch, and the optimizer steps with batch_tokens=1. B is
    `labels`, the supervised tokens of all ranks; `batches` are those of this rank.
    """
    for batch in batches:
        loss = model.loss(batch, horizon=horizon, sampler=generator, recompute=recompute)
        (loss / math.sqrt(labels)).backward()


def hutchinson(
    optimizer: Sophia, model: HRM, batches: Sequence[PackedBatch], horizon: int, generator: torch.Generator
) -> None:
    """Give the optimizer a Hessian product of the batches' mean loss with a normal vector, in float32.

    The fused backward ops are not twice differentiable. This runs on the reference ops, and their attention holds a
    T × T table for every sequence of T tokens.
    """
    labels = sum(len(batch.targets) for batch in batches)
    with reference_ops():
        loss = torch.stack([model.loss(batch, horizon=horizon) for batch in batches]).sum() / labels
        optimizer.update_hessian(loss, generator=generator)


def generator_of(seed: int, step: int, rank: int = 0, device: torch.device | None = None) -> torch.Generator:
    """The random numbers of a step's curvature sample on a rank, the same whenever they are asked for.

    A CUDA device draws other numbers than the CPU.
    """
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1)  # torch takes the lower 32 bits of a seed only
    return torch.Generator(device or "cpu").manual_seed(int(mixed[0]))
