"""Sophia's curvature samples (arXiv 2305.14342, section 2.3): what the trainer does every k steps.

A sample is a function of weights, batches and seed alone, so a resumed run draws what the uninterrupted one drew.
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
    model: HRM, batches: Sequence[PackedBatch], labels: int, horizon: int, generator: torch.Generator
) -> None:
    """Add to the gradients those of the labels' summed loss over √B, B labels drawn from the model's distribution.

    So a squared gradient is B·ĥ, whatever the batch's size: it goes into an optimizer that steps with batch_tokens=1.
    B is `labels`, all ranks' supervised tokens; the batches are this rank's.
    """
    for batch in batches:
        (model.loss(batch, horizon=horizon, sampler=generator) / math.sqrt(labels)).backward()


def hutchinson(
    optimizer: Sophia, model: HRM, batches: Sequence[PackedBatch], horizon: int, generator: torch.Generator
) -> None:
    """Give the optimizer a Hessian product of the batches' mean loss with a normal vector, in float32.

    The fused backward ops are not twice differentiable, so this runs on the reference ops, whose attention holds a
    T × T table for every sequence.
    """
    labels = sum(len(batch.targets) for batch in batches)
    with reference_ops():
        loss = torch.stack([model.loss(batch, horizon=horizon) for batch in batches]).sum() / labels
        optimizer.update_hessian(loss, generator=generator)


def generator_of(seed: int, step: int, rank: int = 0, device: torch.device | None = None) -> torch.Generator:
    """The random numbers of a step's curvature sample on a rank; no state is needed to have them again.

    On a CUDA device they are others than on the CPU.
    """
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1)  # torch takes the lower 32 bits of a seed only
    return torch.Generator(device or "cpu").manual_seed(int(mixed[0]))
