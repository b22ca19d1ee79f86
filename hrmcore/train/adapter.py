"""What a run with [lora] begins from and leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from hrmcore.checkpoint.adapter import merge_adapter, save_adapter
from hrmcore.checkpoint.hrm_text import resolve
from hrmcore.checkpoint.safetensors_reader import stored_tensors
from hrmcore.durable import sha256_of
from hrmcore.lora import factors_of
from hrmcore.model import HRM
from hrmcore.train.run_file import TrainConfig


def frozen_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """What must not change before a run with [lora] goes on: the table, and the weights that it leaves as they are."""
    if config.lora is None:
        return {}
    files = sorted({tensor.path for tensor in stored_tensors(resolve(str(config.init_from))).values()})
    digest = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    return {"lora": dataclasses.asdict(config.lora) | {"targets": list(config.lora.parts)}, "init_from": digest}


def export_adapter(config: TrainConfig, model: HRM, adapter: Path, checkpoint: Path) -> None:
    """Write the adapters of a model to `adapter`, and what they make of `init_from` to `checkpoint`."""
    assert config.lora is not None
    factors, base = factors_of(model), str(config.init_from)
    save_adapter(adapter, config.lora, factors, base)
    merge_adapter(base, config.lora, factors, checkpoint, config.tokenizer)
