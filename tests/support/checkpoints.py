"""A small checkpoint and ways to rewrite it, for the tests of reading and of refusing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hrmcore.config import HRMConfig

CONFIG = HRMConfig(
    vocab_size=50,
    hidden_size=48,
    intermediate_size=40,
    num_layers_per_stack=2,
    num_attention_heads=2,
    head_dim=32,
    H_cycles=2,
    L_cycles=2,
    max_position_embeddings=64,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
    embedding_scale=3.5,
    pad_token_id=0,
    eos_token_id=(4, 7),
)


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


def split_form(tensors: dict[str, Tensor]) -> None:
    """Rename and cut the released names into those that transformers holds in memory."""
    for key in list(tensors):
        if key.endswith("attn.gqkv_proj.weight"):
            for part, rows in zip(("gate", "q", "k", "v"), tensors.pop(key).chunk(4), strict=True):
                tensors[key.replace("attn.gqkv_proj", f"self_attn.{part}_proj")] = rows
        elif key.endswith("attn.o_proj.weight"):
            tensors[key.replace("attn.o_proj", "self_attn.o_proj")] = tensors.pop(key)
        elif key.endswith("mlp.gate_up_proj.weight"):
            for part, rows in zip(("gate", "up"), tensors.pop(key).chunk(2), strict=True):
                tensors[key.replace("gate_up_proj", f"{part}_proj")] = rows


def shard(folder: Path, count: int = 3) -> None:
    """Deal the tensors of model.safetensors out to several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    weight_map = {key: names[index % count] for index, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
