"""What a test needs to train: records, a tokenizer and a run file, in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hrmcore.checkpoint.training_state import load_state, state_path
from hrmcore.tokenizer import train_tokenizer

needs_shard_files = pytest.mark.skipif(
    find_spec("torch.distributed.checkpoint.hf_storage") is None,
    reason="this torch writes no shards in safetensors; 2.9 does",
)

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers_per_stack": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

Record = dict[str, str]
WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]


def repetitions(words: Sequence[str]) -> list[Record]:
    """Two words to be repeated, in every pair."""
    return [{"instruction": f"repeat {a} {b}", "response": f"{a} {b}"} for a in words for b in words]


def write_run(
    folder: Path,
    records: Sequence[Record],
    tokenizer: Path | None = None,
    model: Mapping[str, Any] | None = None,
    stages: str = "",
    **keys: Any,
) -> Path:
    """A run file in `folder`, its records beside it, with `keys` and what `model` changes of MODEL.

    Without a tokenizer one of 300 tokens is made of the instructions. `stages` is the text of [[grow]] tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        train_tokenizer((record["instruction"] for record in records), tokenizer, vocab_size=300)
    keys = {"train_files": [str(data)], "tokenizer": str(tokenizer), "out": f"{folder}/out"} | keys
    path = folder / "run.toml"
    path.write_text(f"{_toml(keys)}[model]\n{_toml(MODEL | dict(model or {}))}{stages}", encoding="utf-8")
    return path


def rewrite(path: Path, old: str, new: str) -> Path:
    """The file, with other text where `old` stood."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl in a run's folder."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final_state(out: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of the state after a step."""
    return load_state(state_path(out, step))[0]


def _toml(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
