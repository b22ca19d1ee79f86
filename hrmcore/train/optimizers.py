"""The optimizer that a run file names."""

from __future__ import annotations

from typing import Any

import torch

from hrmcore import optim
from hrmcore.model import HRM
from hrmcore.train.run_file import TrainConfig


def make_optimizer(config: TrainConfig, model: HRM) -> optim.Sophia | optim.AdamAtan2 | optim.AdamW:
    """The optimizer that the run file names, over all parameters."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "ema": config.ema or None,
        "ema_dtype": getattr(torch, config.ema_dtype),
    }
    parameters = model.parameters()
    if config.optimizer.startswith("adamatan2"):
        form = "paper" if config.optimizer == "adamatan2-paper" else "hrm-text"
        return optim.AdamAtan2(parameters, **options, form=form)
    options["eps"] = config.eps
    if config.optimizer == "adamw":
        return optim.AdamW(parameters, **options)
    options["rho"] = config.rho
    return optim.Sophia(parameters, variant=config.optimizer[-1].upper(), **options)
