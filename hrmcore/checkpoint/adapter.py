"""Low-rank adapters on the disk, in the layout of the peft library, and merged into their checkpoint.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. The names in it are those of the modules
of transformers: `peft.PeftModel.from_pretrained(model, folder)` loads it. `factors` are A (r, N) and B (M, r) of each
adapted layer, by that name: `model.L_module.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrmcore.checkpoint.folder_writer import file_copies, write_files
from hrmcore.checkpoint.hrm_text import (
    CONFIG_FILE,
    key_table,
    read_tensors,
    released_config,
    resolve,
)
from hrmcore.checkpoint.safetensors_reader import WEIGHTS_FILE
from hrmcore.checkpoint.safetensors_writer import write_tensors
from hrmcore.config import PARTS, LoraConfig, part_rows

Factors = Mapping[str, tuple[Tensor, Tensor]]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: str | Path, lora: LoraConfig, factors: Factors, base: str | Path) -> None:
    """Write an adapter, float32; `base` is the checkpoint that it belongs to. A file appears whole or not at all."""
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    shapes = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    text = json.dumps(_peft_config(lora, base), indent=2) + "\n"

    def write_weights(path: Path) -> None:
        write_tensors(path, shapes, tensors.__getitem__, lambda *_: {"format": "pt"})

    def write_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    Path(folder).mkdir(parents=True, exist_ok=True)
    write_files(Path(folder), {ADAPTER_WEIGHTS: write_weights, ADAPTER_CONFIG: write_config})


def _peft_config(lora: LoraConfig, base: str | Path) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.parts),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def merge_adapter(
    base: str | Path, lora: LoraConfig, factors: Factors, out: str | Path, tokenizer_folder: str | Path | None = None
) -> None:
    """Write the checkpoint W + alpha / rank · B·A of a checkpoint folder or cached hub id, a tensor at a time.

    Every tensor keeps its type; the sum is computed in float32 from the weights as they are stored, whatever the
    adapter was trained over. Raises ValueError when a sum does not fit its type, FileNotFoundError when
    `tokenizer_folder` has no tokenizer.
    """
    out, source = Path(out), resolve(base)
    copies = file_copies(tokenizer_folder)
    if out.is_dir() and out.samefile(source):
        raise ValueError(f"{out}: is the checkpoint itself, which is left as it is; name another folder")
    tensors = read_tensors(source)
    keys = {key.released: key.name for key in key_table(tensors.config)}
    shapes = {key.released: (tensors.dtype(key.name), key.shape) for key in key_table(tensors.config)}

    def merged(released: str) -> Tensor:
        weight = _merged(keys[released], tensors[keys[released]], lora, factors, part_rows_of)
        tensors.release()
        return weight

    part_rows_of = {projection: part_rows(projection, tensors.config) for projection in PARTS}
    config = json.dumps(released_config(tensors.config, tensors.dtype("lm_head.weight")), indent=2) + "\n"

    def write_weights(path: Path) -> None:
        write_tensors(path, shapes, merged, lambda *_: {"format": "pt"})

    def write_config(path: Path) -> None:
        path.write_text(config, encoding="utf-8")

    out.mkdir(parents=True, exist_ok=True)
    write_files(out, {**copies, WEIGHTS_FILE: write_weights, CONFIG_FILE: write_config})


def _merged(
    name: str, weight: Tensor, lora: LoraConfig, factors: Factors, rows: Mapping[str, Mapping[str, slice]]
) -> Tensor:
    """A weight with what its adapters add to its rows; itself when it has none."""
    layer, _, projection = name.removesuffix(".weight").rpartition(".")
    adapted = {part: at for part, at in rows.get(projection, {}).items() if f"model.{layer}.{part}" in factors}
    if not adapted:
        return weight
    total = weight.to(torch.float32, copy=True)
    for part, at in adapted.items():
        a, b = (factor.float().cpu() for factor in factors[f"model.{layer}.{part}"])
        total[at].addmm_(b, a, alpha=lora.scaling)
    result = total.to(weight.dtype)
    if not bool(result.isfinite().all()):
        raise ValueError(f"{name}: with its adapter it does not fit {weight.dtype}: up to {total.abs().max():.3g}")
    return result
