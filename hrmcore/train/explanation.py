"""What `hrmcore train --explain` prints: every key of a run file, its type, its default and its meaning."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from hrmcore.config import HRMConfig, LoraConfig
from hrmcore.growth.stages import GrowStage
from hrmcore.train.run_file import OPTIMIZERS, TrainConfig

# The headings of `hrmcore train --explain`, in their order; each key names its own.
GROUPS = (
    "required",
    "data",
    "model",
    "schedule",
    "optimizer",
    "precision and devices",
    "checkpoints and states",
    "growth",
    "validation and logging",
)


def explain() -> str:
    """Every key of a run file by heading, with its type, default and meaning."""
    fields = [f for f in dataclasses.fields(TrainConfig) if f.name != "model"]
    lines = ["A run file is TOML: these keys, then the tables [model], [lora], and any number of [[grow]]."]
    lines.append("Each line has a key, its type, its default ('-': none) and its meaning.")
    for group in GROUPS:
        lines += ["", group]
        lines += _described([f for f in fields if f.metadata["group"] == group])
    lines += ["", "defaults that follow the optimizer ('-': it has no such key)", *_optimizer_defaults()]
    filled_in = ("vocab_size", "eos_token_id", "pad_token_id")
    lines += ["", f"[model]  required without init_from; {', '.join(filled_in)} follow the tokenizer"]
    lines += _described([f for f in dataclasses.fields(HRMConfig) if f.name not in filled_in])
    lines += ["", "[[grow]]  the model grows at at_tokens; sizes that are left out stay as they are"]
    lines += _described(dataclasses.fields(GrowStage))
    lines += ["", "[lora]  the weights of init_from stay, and small matrices beside them are trained"]
    lines += _described(dataclasses.fields(LoraConfig))
    return "\n".join(lines)


_COLUMNS = (26, 18, 13)  # characters of name, type and default


def _described(fields: Sequence[dataclasses.Field[Any]]) -> list[str]:
    lines = []
    for f in fields:
        cells = zip((f"  {f.name}", _type(f), _default(f)), _COLUMNS, strict=True)
        head = "".join(f"{cell:<{width}}" for cell, width in cells)
        meaning = textwrap.wrap(f.metadata["explain"], _WIDTH - sum(_COLUMNS), break_on_hyphens=False)
        lines += [head + meaning[0], *(" " * sum(_COLUMNS) + line for line in meaning[1:])]
    return lines


_WIDTH = 120  # characters of a line
_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "true or false"}


def _type(f: dataclasses.Field[Any]) -> str:
    """The type of a key in the words of TOML."""
    annotation = str(f.type).removesuffix(" | None")
    if annotation.startswith("tuple[GrowStage"):
        return "tables"
    if annotation == "LoraConfig":
        return "table"
    if annotation.startswith("tuple[float"):
        return "[number, number]"
    if annotation.startswith("tuple[str"):
        return "[string, ...]"
    return _TYPES[annotation]


def _default(f: dataclasses.Field[Any]) -> str:
    """The default of a key as TOML; "-" where leaving it out is something else than any value."""
    if f.default is dataclasses.MISSING:
        return "required"
    if any(f.name in own for own in OPTIMIZERS.values()):
        return "see below"
    return "-" if f.default is None else _toml(f.default)


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _optimizer_defaults() -> list[str]:
    widths = (_COLUMNS[0], *(16 for _ in OPTIMIZERS))
    names = [f.name for f in dataclasses.fields(TrainConfig) if any(f.name in own for own in OPTIMIZERS.values())]
    rows = [["", *OPTIMIZERS]]
    for name in names:
        rows.append([f"  {name}", *(_toml(own[name]) if name in own else "-" for own in OPTIMIZERS.values())])
    return ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
