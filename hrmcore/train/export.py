"""What a run leaves behind when it ends: checkpoint/, and with [lora] adapter/."""

from __future__ import annotations

from pathlib import Path

import torch

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.checkpoint.training_state import find_states, state_of
from hrmcore.model import HRM
from hrmcore.train import resume
from hrmcore.train.adapter import export_adapter
from hrmcore.train.run_file import TrainConfig


def write_checkpoint(config: TrainConfig, model: HRM, out: Path) -> Path:
    """Write a model (bfloat16) and the tokenizer to checkpoint/ in the run folder `out`; returns that folder.

    With [lora], write adapter/ for peft as well; the merged checkpoint has the types of the one it began with.
    """
    folder = out / "checkpoint"
    if config.lora:
        export_adapter(config, model, out / "adapter", folder)
    else:
        # The run file asked for xPos, if this is xPos; the checkpoint says so, and hrmcore loads it.
        save_model(model, folder, dtype=torch.bfloat16, tokenizer_folder=config.tokenizer, allow_xpos=True)
    return folder


def has_state(out: Path, step: int) -> bool:
    """Whether a run folder has the state after a step."""
    return step in dict(find_states(out))


def model_after(config: TrainConfig, out: Path, step: int, model: HRM) -> HRM:
    """The model of one of a run's states; with [lora] it is `model`, the run's own, which is done with training."""
    state = state_of(out, step)[1]
    if not config.lora:
        return resume.model_of_state(state)
    resume.return_to(model, state)
    return model
