"""What a training state carries of a run, and what must agree before a run goes on from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrmcore.checkpoint.hrm_text import load_model, resolve
from hrmcore.checkpoint.training_state import is_state, load_state, restore, shapes_of
from hrmcore.data.records import Corpus
from hrmcore.lora import adapted_model
from hrmcore.model import HRM
from hrmcore.train.adapter import frozen_fingerprint
from hrmcore.train.run_file import TrainConfig


@dataclass(frozen=True)
class Progress:
    """How far a run has come; `position` is that of its BatchStream."""

    step: int
    tokens: int
    skipped: int
    typical_loss: float | None
    position: tuple[int, int]

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Progress:
        """From a state's metadata."""
        epoch, batch = json.loads(metadata["data_position"])
        return cls(
            step=int(metadata["step"]),
            tokens=int(metadata["tokens"]),
            skipped=int(metadata["skipped"]),
            typical_loss=json.loads(metadata.get("typical_loss", "null")),  # older states have none
            position=(epoch, batch),
        )


def metadata_of(
    progress: Progress, config: TrainConfig, growth: Mapping[str, str], fingerprint: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a state: all strings. `growth` is what the GrowthSchedule carries."""
    return {
        "step": str(progress.step),
        "tokens": str(progress.tokens),
        "skipped": str(progress.skipped),
        "typical_loss": json.dumps(progress.typical_loss),
        "optimizer": config.optimizer,
        **growth,
        **({"lora": json.dumps(dataclasses.asdict(config.lora))} if config.lora else {}),
        "data_fingerprint": json.dumps(fingerprint),
        "data_position": json.dumps(progress.position),
        "rng": json.dumps({"seed": config.seed}),  # every draw is a function of seed, epoch and step
    }


def fingerprint_of(config: TrainConfig, corpus: Corpus, checksum: str) -> dict[str, Any]:
    """What the order and the contents of the batches depend on; with [lora] also the frozen weights."""
    return {
        "records": len(corpus),
        "tokens": int(corpus.offsets[-1]),
        "sha256": checksum,
        "seed": config.seed,
        "batch_tokens": config.batch_tokens,
        "accumulate": config.accumulate,
        "objective": config.objective,
        **frozen_fingerprint(config),
    }


def tensors_of(model: HRM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a state by name: the weights, and what the optimizer keeps for each of them."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def check_same_run(path: Path, metadata: Mapping[str, str], optimizer: str, fingerprint: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, when a state is of another optimizer, other data or another order."""
    if metadata["optimizer"] != optimizer:
        raise ValueError(f"{path}: was trained with {metadata['optimizer']}, not with {optimizer}")
    known = {"objective": "response"} | json.loads(metadata["data_fingerprint"])  # older states name none
    for name in dict.fromkeys([*fingerprint, *known]):
        ours, theirs = fingerprint.get(name), known.get(name)
        if theirs != ours:
            what = "the training data" if name in ("records", "tokens", "sha256") else name
            raise ValueError(
                f"{path}: {what} changed since (its {name} is {theirs}, now {ours}), so the run cannot go on "
                "where it stood; name another out, and this state as init_from to keep its weights"
            )


def restore_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill a run's tensors from the state at `path`. Raises ValueError when names or shapes are not the same."""
    shapes = shapes_of(path)
    wrong = sorted(set(tensors) ^ set(shapes)) or sorted(n for n in tensors if tuple(tensors[n].shape) != shapes[n])
    if wrong:
        raise ValueError(f"{path}: the state is of another model or optimizer: {wrong[0]} does not fit the run file")
    restore(path, tensors)


def first_model(config: TrainConfig) -> HRM:
    """The model that a run begins with: random, or of `init_from`; from a state its averaged weights are taken."""
    torch.manual_seed(config.seed)
    source = config.init_from
    if source is None:
        return HRM(config.model)
    if config.lora:
        return adapted_model(source, config.lora)
    if not is_state(source):
        return load_model(resolve(source))
    tensors, _ = load_state(source)
    model = HRM(config.model)
    weights = {name: tensors[f"model.{name}"] for name in model.state_dict()}
    model.load_state_dict({name: tensors.get(f"optimizer.ema.{name}", tensor) for name, tensor in weights.items()})
    return model
