"""What a training state carries of a run, and what must agree before a run goes on from one."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrmcore.checkpoint.hrm_text import load_model, resolve
from hrmcore.checkpoint.training_state import is_state, load_state, restore, shapes_of
from hrmcore.config import HRMConfig
from hrmcore.data.packing import EPOCH_START, Bookmark
from hrmcore.data.records import Corpus
from hrmcore.data.store import TOKENIZER
from hrmcore.durable import replacing
from hrmcore.lora import adapted_model
from hrmcore.model import HRM
from hrmcore.tokenizer import tokenizer_files
from hrmcore.train.adapter import frozen_fingerprint
from hrmcore.train.run_file import TrainConfig

FORM = "optimizer_form"  # of AdamAtan2; a state without it is of the time when there was only the paper's


@dataclass(frozen=True)
class Progress:
    """How far a run has come; `position` and `bookmark` are those of its BatchStream."""

    step: int
    tokens: int
    skipped: int
    typical_loss: float | None
    position: tuple[int, int]
    bookmark: Bookmark = EPOCH_START

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Progress:
        """From a state's metadata."""
        epoch, batch = json.loads(metadata["data_position"])
        first, start, left = json.loads(metadata.get("data_window", "[0, 0, []]"))  # older states have none
        return cls(
            step=int(metadata["step"]),
            tokens=int(metadata["tokens"]),
            skipped=int(metadata["skipped"]),
            typical_loss=json.loads(metadata.get("typical_loss", "null")),  # older states have none
            position=(epoch, batch),
            bookmark=Bookmark(first, start, tuple(left)),
        )


def metadata_of(
    progress: Progress, config: TrainConfig, more: Mapping[str, str], fingerprint: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a state: all strings. `more` is what growing and early stopping carry."""
    return {
        "step": str(progress.step),
        "tokens": str(progress.tokens),
        "skipped": str(progress.skipped),
        "typical_loss": json.dumps(progress.typical_loss),
        "optimizer": config.optimizer,
        **({FORM: "hrm-text"} if config.optimizer == "adamatan2" else {}),
        **({"lora": json.dumps(dataclasses.asdict(config.lora))} if config.lora else {}),
        **more,
        "data_fingerprint": json.dumps(fingerprint),
        "data_position": json.dumps(progress.position),
        "data_window": json.dumps(progress.bookmark),
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


def optimizer_of(metadata: Mapping[str, str]) -> str:
    """The optimizer that a state was trained with, as a run file names it."""
    name = metadata["optimizer"]
    return "adamatan2-paper" if name == "adamatan2" and FORM not in metadata else name


def as_trained(config: TrainConfig, metadata: Mapping[str, str]) -> TrainConfig:
    """The config with the form of AdamAtan2 that a state was trained with, so that old runs go on bit for bit."""
    if config.optimizer == "adamatan2" and optimizer_of(metadata) == "adamatan2-paper":
        return replace(config, optimizer="adamatan2-paper")
    return config


def check_same_run(path: Path, metadata: Mapping[str, str], optimizer: str, fingerprint: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, when a state is of another optimizer, other data or another order."""
    if (trained := optimizer_of(metadata)) != optimizer:
        raise ValueError(f"{path}: was trained with {trained}, not with {optimizer}")
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
    return model_of_state(source) if is_state(source) else load_model(resolve(source))


def model_of_state(path: str | Path) -> HRM:
    """The model of a training state, with the averaged weights where the run keeps them.

    Raises ValueError when the state is of a run with [lora], which holds adapters alone.
    """
    tensors, metadata = load_state(path)
    if "lora" in metadata:
        raise ValueError(f"{path}: holds the adapters of a run with [lora]; the run itself merges them when it ends")
    model = HRM(HRMConfig.from_dict(json.loads(metadata["model_config"])))
    _load_averaged(model, tensors)
    return model


def return_to(model: HRM, path: Path) -> None:
    """Give a run's model the weights of one of its states, the averaged ones where the run keeps them."""
    _load_averaged(model, load_state(path)[0])


def _load_averaged(model: HRM, tensors: Mapping[str, Tensor]) -> None:
    weights = {name: tensors[f"model.{name}"] for name in model.state_dict()}
    model.load_state_dict({name: tensors.get(f"optimizer.ema.{name}", tensor) for name, tensor in weights.items()})


def keep_tokenizer(source: str | Path, out: Path) -> None:
    """Copy the tokenizer's files into the run folder, so that any of its states can be exported."""
    folder = out / TOKENIZER
    folder.mkdir(exist_ok=True)
    for file in tokenizer_files(Path(source)):
        kept = folder / file.name
        if not kept.is_file() or not filecmp.cmp(file, kept, shallow=False):
            with replacing(kept) as [temporary]:
                shutil.copyfile(file, temporary)


def tokenizer_of_run(out: Path) -> Path:
    """The folder of a run that holds its tokenizer. Raises ValueError when none does."""
    for folder in (out / TOKENIZER, out / "checkpoint"):
        if tokenizer_files(folder):
            return folder
    raise ValueError(f"{out}: holds no tokenizer, as runs of before do not; name it with --tokenizer FOLDER")
