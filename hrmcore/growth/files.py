"""Growing from file to file: hrm_text checkpoints and training states, one tensor in memory at a time.

The source is memory-mapped and never written to. The result gets its name only once it is whole.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrmcore.checkpoint.hrm_text import CONFIG_FILE, key_table, read_tensors, released_config, resolve
from hrmcore.checkpoint.safetensors_reader import WEIGHTS_FILE
from hrmcore.checkpoint.safetensors_writer import write_tensors
from hrmcore.checkpoint.training_state import completed, find_states, is_state, restore, shapes_of, state_path, verify
from hrmcore.config import HRMConfig
from hrmcore.durable import new_folder
from hrmcore.growth.operators import GROWTH_KEY, Growth, state_metadata
from hrmcore.tokenizer import tokenizer_files

OPTIMIZERS = ("adamw", "adamatan2", "adamatan2-paper", "sophia-g", "sophia-h")


def grow_files(source: str | Path, out: str | Path, sizes: Mapping[str, int], **options: Any) -> Growth:
    """Grow a checkpoint, or the newest state of a run folder, or one state file, into the new folder `out`.

    `sizes` are keys of HRMConfig, `options` the fields of Growth. Raises FileExistsError when `out` exists,
    FileNotFoundError without the source, ValueError for what is not growing, is damaged, or cannot carry the request.
    """
    path = Path(source).expanduser()
    if states := find_states(path):
        path = states[0][1]
    if is_state(path):
        return _grow_state(path, Path(out), sizes, options)
    return _grow_checkpoint(resolve(source), Path(out), sizes, options)


def _grow_checkpoint(folder: Path, out: Path, sizes: Mapping[str, int], options: Mapping[str, Any]) -> Growth:
    """Weights keep their type where growing rounds nothing; where the width's factors round, all become float32."""
    tensors = read_tensors(folder)
    growth = Growth.of(tensors.config, dict(sizes), **options)
    if growth.mask_steps:
        raise ValueError(
            f"{folder}: a checkpoint cannot carry mode 'ramped', which rises with the steps of a run; "
            "grow a training state, or in the run with [[grow]]"
        )
    s = math.sqrt(growth.after.hidden_size / growth.before.hidden_size)
    exact = math.frexp(s)[0] == 0.5  # a power of two
    keys = {key.released: key for key in key_table(growth.after)}
    types = {
        name: tensors[growth.source(key.name) or "lm_head.weight"].dtype if exact else torch.float32
        for name, key in keys.items()
    }

    def grown(released: str) -> Tensor:
        name = keys[released].name
        source = growth.source(name)
        return growth.tensor(name, None if source is None else tensors[source]).to(types[released])

    with new_folder(out) as temporary:
        for file in tokenizer_files(folder):
            shutil.copyfile(file, temporary / file.name)
        shapes = {name: (types[name], key.shape) for name, key in keys.items()}
        write_tensors(temporary / WEIGHTS_FILE, shapes, grown, lambda *_: {"format": "pt"})
        config = json.dumps(released_config(growth.after, types["lm_head.weight"]), indent=2) + "\n"
        (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
    return growth


def _grow_state(path: Path, out: Path, sizes: Mapping[str, int], options: Mapping[str, Any]) -> Growth:
    names, metadata = verify(path)
    if metadata.get("optimizer") not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"{path}: its optimizer {metadata.get('optimizer')!r} is unknown; known are {known}")
    if GROWTH_KEY in metadata:
        raise ValueError(f"{path}: a growth in mode 'ramped' is still under way; train on to its end first")
    growth = Growth.of(HRMConfig.from_dict(json.loads(metadata["model_config"])), dict(sizes), **options)
    # Its run file begins at the grown shape: the stages of the run that it comes from are not those of the next.
    metadata = {**metadata, "grown": "[]", **state_metadata(growth, int(metadata["step"]))}
    entries = {entry.name: entry for entry in _entries(growth, set(names), path)}
    held = shapes_of(path)
    with new_folder(out) as temporary:

        def grown(name: str) -> Tensor:
            entry = entries[name]
            old = None
            if entry.origin is not None:
                old = torch.empty(held[entry.origin])
                restore(path, {entry.origin: old})
            if entry.slot == "step":
                return torch.tensor(0.0) if old is None else old
            return growth.tensor(entry.weight, old, entry.slot)

        shapes = {name: (torch.float32, entries[name].shape) for name in sorted(entries)}
        target = state_path(temporary, int(metadata["step"]))
        target.parent.mkdir()
        write_tensors(target, shapes, grown, completed(metadata))
    return growth


class _Entry(NamedTuple):
    """A tensor of a grown state: its name, the weight it belongs to, what it is of it, and what it grows from."""

    name: str
    weight: str
    slot: str  # "weight", "step" (the optimizer's count), or a slot that Growth.tensor knows
    shape: tuple[int, ...]
    origin: str | None  # None in a new layer


def _entries(growth: Growth, names: Set[str], path: Path) -> Iterator[_Entry]:
    prefixes = {"weight": "model"}
    for name in names:
        if match := re.match(r"optimizer\.(\w+)\.", name):
            prefixes[match[1]] = f"optimizer.{match[1]}"
    for key in key_table(growth.after):
        if growth.after.shared_stacks and key.name.startswith("H_module."):
            continue  # a second name of L_module in such a model
        alike = growth.alike(key.name)
        if f"model.{alike}" not in names:
            raise ValueError(f"{path}: the tensor 'model.{alike}' of its model_config is missing")
        for slot, prefix in prefixes.items():
            if f"{prefix}.{alike}" in names:
                origin = None if growth.source(key.name) is None else f"{prefix}.{alike}"
                yield _Entry(f"{prefix}.{key.name}", key.name, slot, () if slot == "step" else key.shape, origin)
