"""Checkpoints in the released hrm_text format: `config.json` beside safetensors, one file or sharded with an index.

Weights are read through one key table, `key_table`, which also writes them. No pickle is ever loaded. torch is imported
only by what makes or takes its tensors, so that the CPU engine starts without it.
Shapes: D width, A attention width (heads × head_dim), F ffn width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrmcore.checkpoint.folder_writer import file_copies, write_files
from hrmcore.checkpoint.safetensors_reader import (
    DTYPES,
    HOLDERS,
    INDEX_FILE,
    WEIGHTS_FILE,
    Stored,
    map_file,
    read_json,
    stored_tensors,
)
from hrmcore.config import PARTS, HRMConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hrmcore.model import HRM

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Key:
    """One tensor: its name in the module, its shape, and the names of the two forms on disk.

    The split form cuts the rows evenly over its names; where it has a single name, nothing is cut.
    """

    name: str
    shape: tuple[int, ...]
    released: str
    split: tuple[str, ...]


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER_NAMES = {
    # Module name within a layer: the released name, the split names (what transformers keeps in memory).
    "gqkv_proj": ("attn.gqkv_proj", PARTS["gqkv_proj"]),
    "o_proj": ("attn.o_proj", PARTS["o_proj"]),
    "gate_up_proj": ("mlp.gate_up_proj", PARTS["gate_up_proj"]),
    "down_proj": ("mlp.down_proj", PARTS["down_proj"]),
}


def key_table(config: HRMConfig) -> Iterator[Key]:
    """Every tensor of a checkpoint, in the order in which the module holds them."""
    vocabulary, width, attention, ffn = (
        config.vocab_size,
        config.hidden_size,
        config.attention_width,
        config.intermediate_size,
    )
    shapes = {
        "gqkv_proj": (4 * attention, width),
        "o_proj": (width, attention),
        "gate_up_proj": (2 * ffn, width),
        "down_proj": (width, ffn),
    }
    yield Key("embed_tokens.weight", (vocabulary, width), _EMBEDDING, (_EMBEDDING,))
    yield Key("z_L_init", (width,), "model.z_L_init", ("model.z_L_init",))
    for stack, depth in zip(("L_module", "H_module"), config.depths, strict=True):
        for layer in range(depth):
            prefix = f"{stack}.layers.{layer}."
            for name, (released, split) in _LAYER_NAMES.items():
                yield Key(
                    f"{prefix}{name}.weight",
                    shapes[name],
                    f"model.{prefix}{released}.weight",
                    tuple(f"model.{prefix}{part}.weight" for part in split),
                )
    yield Key("lm_head.weight", (vocabulary, width), _HEAD, (_HEAD,))


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or the snapshot of a hub id `owner/name` in the local cache.

    Nothing is downloaded. Raises FileNotFoundError when there is neither, or the folder of a run around its
    checkpoint, ValueError when `source` is a file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        exported = folder / "checkpoint"
        if (exported / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists():
            raise FileNotFoundError(f"{source}: a run folder; its model is {exported}")
        if not (folder / CONFIG_FILE).exists() and any((folder / "states").glob("step-*")):
            raise FileNotFoundError(
                f"{source}: a run folder without a checkpoint; `hrmcore export {source}` writes one"
            )
        return folder
    if folder.exists():
        raise ValueError(f"{source}: a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, this is a file")
    if not (isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)):
        raise FileNotFoundError(f"{source}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{source}: no such folder; to look it up in the local Hugging Face cache, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        raise FileNotFoundError(
            f"{source}: no such folder, and not in the local Hugging Face cache; "
            f"if it is a hub id, fetch it first: hf download {source}"
        ) from None


def read_config(folder: str | Path) -> HRMConfig:
    """The configuration in a released `config.json`; a `generation_config.json` beside it adds to its eos_token_id.

    Keys that do not touch the computation are ignored. Raises FileNotFoundError without the file, ValueError naming
    the key that is missing, impossible, or asks for a computation that hrmcore does not do.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    try:
        _refuse_unsupported(values)
        config = HRMConfig.from_dict(_own_keys(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ends = _generation_ends(path.with_name(GENERATION_FILE))
    if more := [token for token in ends if token not in config.eos_token_ids and token < config.vocab_size]:
        return config.replace(eos_token_id=(*config.eos_token_ids, *more))
    return config


def _generation_ends(path: Path) -> list[int]:
    """The tokens that end an answer by a generation_config.json; none without the file."""
    if not path.is_file():
        return []
    given = read_json(path).get("eos_token_id")
    ends = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(token) is int for token in ends):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {given!r}")
    return [token for token in dict.fromkeys(ends) if token >= 0]  # no model answers with others


_DEFAULTS = {
    # What transformers assumes for a key that a released config.json leaves out.
    "head_dim": 128,
    "H_cycles": 2,
    "L_cycles": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "prefix_lm": True,
    "pad_token_id": None,
    "eos_token_id": None,
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    # Keys that change the computation: the values that mean the one hrmcore does. An absent key means it, too.
    "model_type": ("hrm_text",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, True, None),  # says only which of the two matrices may be missing
    "quantization_config": (None,),
    "position_encoding": ("rope", "xpos", None),
}


_OWN_DEFAULTS = {
    # Our own keys; a config.json has them only where they say something else.
    "position_encoding": "rope",
    "xpos_scale_base": 512,
    "attention_window": 0,
    "H_layers": None,
}
_OWN_ROPE = "hrmcore"  # the rope_type beside such keys: whoever does not know it, transformers too, stops there


def _refuse_unsupported(values: dict[str, Any]) -> None:
    for key, allowed in _SUPPORTED.items():
        value = values.get(key, allowed[0])
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
            raise ValueError(f"{key} is {value!r}; hrmcore supports only {json.dumps(allowed[0])}")
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if not (rope is None or isinstance(rope, dict)):
            raise ValueError(f"{key} must be an object, got {rope!r}")
        kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
        if kind == _OWN_ROPE and any(name in values for name in _OWN_DEFAULTS):
            continue
        if kind != "default":
            raise ValueError(f"{key} has rope_type {kind!r}; hrmcore supports only 'default'")


def _own_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a released config under the names of HRMConfig."""
    depth = "num_layers_per_stack" if values.get("num_layers_per_stack") is not None else "num_hidden_layers"
    layers = _required(values, depth)
    if type(layers) is not int or layers < 1:
        raise ValueError(f"{depth} must be a whole number of at least 1, got {layers!r}")
    own: dict[str, Any] = {"num_layers_per_stack": layers}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        own[key] = _required(values, key)
    own |= {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    own |= {key: values.get(key, default) for key, default in _OWN_DEFAULTS.items()}
    own["position_encoding"] = own["position_encoding"] or "rope"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    own["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    own["embedding_scale"] = values.get("embedding_scale")
    if own["embedding_scale"] is None:
        deviation = values.get("initializer_range", 0.02)
        if isinstance(deviation, bool) or not isinstance(deviation, int | float) or not 0 < deviation <= 1:
            raise ValueError(f"initializer_range must be above 0 and at most 1, got {deviation!r}")
        own["embedding_scale"] = 1 / deviation
    return own


def _required(values: dict[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise ValueError(f"missing key {key!r}")
    return values[key]


def released_config(config: HRMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says about a model: the keys of the released checkpoints, depth as the per-stack count."""
    values = config.to_dict()
    depth = values.pop("num_layers_per_stack")
    del values["shared_stacks"]  # what is written has two stacks, with the same weights
    plain = [key for key, default in _OWN_DEFAULTS.items() if values[key] == default]
    for key in plain:
        del values[key]
    if len(plain) < len(_OWN_DEFAULTS):
        values["rope_parameters"] = {"rope_type": _OWN_ROPE, "rope_theta": config.rope_theta}
    return {
        "model_type": "hrm_text",
        "architectures": ["HrmTextForCausalLM"],
        **values,
        "num_hidden_layers": depth,
        "hidden_act": "silu",
        "initializer_range": config.hidden_size**-0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _of_the_model(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without what some tools store although it follows from the configuration: RoPE's inverse frequencies."""
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}


class Arrays(Mapping[str, NDArray[Any]]):
    """The tensors of a checkpoint by their names in the module, read when asked for, as numpy arrays.

    A tensor of the released form is a view of the memory-mapped file, one of the split form is put together. bfloat16
    comes as its bits, uint16. Names, shapes, dtypes and offsets of all tensors have been checked before the first is
    read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(folder)
        stored = _of_the_model(stored_tensors(self.folder))
        if read_json(self.folder / CONFIG_FILE).get("tie_word_embeddings"):
            for name, other in ((_HEAD, _EMBEDDING), (_EMBEDDING, _HEAD)):
                if other in stored:
                    stored.setdefault(name, stored[other])  # where both are stored, each is what it is
        self._parts: dict[str, list[Stored]] = {}
        used: set[str] = set()
        for key in key_table(self.config):
            parts = _parts_on_disk(key, stored, self.folder)
            self._parts[key.name] = [stored[part] for part in parts]
            used.update(parts)
        if extra := sorted(set(stored) - used):
            path = stored[extra[0]].path
            raise ValueError(f"{path}: extra tensor {extra[0]!r} has no place in this model ({len(extra)} such)")
        self._files = {path: map_file(path) for path in {tensor.path for tensor in stored.values()}}

    def release(self) -> None:
        """Stop counting the pages that were read as resident memory of this process; they are read again if needed."""
        for file in self._files.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as torch names it; float32 when it is put together from parts that differ."""
        kinds = {part.dtype for part in self._parts[name]}
        return DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"

    def __getitem__(self, name: str) -> NDArray[Any]:
        parts = [self._view(part) for part in self._parts[name]]
        if len(parts) == 1:
            return parts[0]
        if len({part.dtype for part in parts}) > 1:
            parts = [widened(part) for part in parts]
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _view(self, part: Stored) -> NDArray[Any]:
        dtype, count = HOLDERS[part.dtype], math.prod(part.shape)
        array = np.frombuffer(self._files[part.path], dtype, count, part.offset).reshape(part.shape)
        # A header of odd length shifts the data off the alignment that kernels rely on.
        return array if array.flags.aligned else array.copy()


def widened(array: NDArray[Any]) -> NDArray[np.float32]:
    """An array of `Arrays` as float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


class Tensors(Mapping[str, "Tensor"]):
    """`Arrays` as torch tensors, in the dtype they are stored in."""

    def __init__(self, folder: str | Path) -> None:
        self._arrays = Arrays(folder)
        self.config = self._arrays.config

    def __getitem__(self, name: str) -> Tensor:
        import torch

        tensor = torch.from_numpy(self._arrays[name])
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        import torch

        found: torch.dtype = getattr(torch, self._arrays.dtype(name))
        return found

    def release(self) -> None:
        """As that of `Arrays`."""
        self._arrays.release()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def read_tensors(folder: str | Path) -> Tensors:
    """Checked, lazy access to a checkpoint's tensors without building a model; keys as in `HRM.state_dict()`.

    Raises FileNotFoundError for a missing file, ValueError naming key and file for anything that does not fit.
    """
    return Tensors(folder)


def load_model(path: str | Path) -> HRM:
    """Build the model of a checkpoint folder or cached hub id, its weights as float32 in memory of their own.

    Raises FileNotFoundError and ValueError as `resolve` and `read_tensors` do, and ValueError naming a tensor that is
    not finite.
    """
    import torch

    tensors = read_tensors(resolve(path))
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    return _model_of(tensors.config, weights, path)


def map_model(path: str | Path, attention_window: int | None = None) -> HRM:
    """The model of a checkpoint, whose weights lie where they are: in its mapped files, in the dtype stored there.

    A checkpoint in the split form is put together in memory. `attention_window` takes the place of its own. Raises
    what `load_model` does.
    """
    tensors = read_tensors(resolve(path))
    windowed = {} if attention_window is None else {"attention_window": attention_window}
    return _model_of(tensors.config.replace(**windowed), dict(tensors), path)


def _model_of(config: HRMConfig, weights: dict[str, Tensor], path: str | Path) -> HRM:
    import torch

    from hrmcore.model import HRM

    with torch.device("meta"):  # no time and no random numbers for weights that are replaced
        model = HRM(config)
    for name, weight in weights.items():
        if not math.isfinite(float(weight.sum())) and not bool(weight.isfinite().all()):  # finite ones may overflow
            raise ValueError(f"{path}: {name!r} has a value that is NaN or infinite")
    model.load_state_dict(weights, assign=True)
    model.reset_positions(config.max_position_embeddings)
    return model


def save_model(
    model: HRM,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    allow_xpos: bool = False,
) -> None:
    """Write `config.json` and `model.safetensors` (and copies of the tokenizer's files) in the released format.

    `dtype` is float32 (None), bfloat16 or float16. Every file appears whole or not at all. Raises ValueError on another
    dtype, a weight that overflows it, or a folder that holds a sharded checkpoint; FileNotFoundError when
    `tokenizer_folder` has no tokenizer.

    A model with xPos, an attention window or stacks of two depths is not what readers of this format would compute:
    ValueError, unless `allow_xpos`; then the config.json says so in a way that they stumble over, and hrmcore loads it.
    """
    import torch
    from safetensors.torch import save_file

    if not allow_xpos:
        _refuse_own_keys(model.config)
    folder, dtype = Path(folder), dtype or torch.float32
    weights = _released_weights(model, dtype)
    config = json.dumps(released_config(model.config, dtype), indent=2) + "\n"
    copies = file_copies(tokenizer_folder)
    if (folder / INDEX_FILE).exists():
        raise ValueError(f"{folder}: holds a sharded checkpoint ({INDEX_FILE}), save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_files(
        folder,
        copies
        | {
            WEIGHTS_FILE: lambda path: save_file(weights, path, metadata={"format": "pt"}),
            CONFIG_FILE: lambda path: path.write_text(config, encoding="utf-8"),
        },
    )


def _refuse_own_keys(config: HRMConfig) -> None:
    for key in ("position_encoding", "attention_window", "H_layers"):
        value = getattr(config, key)
        if value != _OWN_DEFAULTS[key]:
            raise ValueError(
                f"{key} is {value!r}: readers of the hrm_text format would compute another model from these weights; "
                f"allow_xpos=True writes a checkpoint that only hrmcore loads"
            )


def _released_weights(model: HRM, dtype: torch.dtype) -> dict[str, Tensor]:
    if str(dtype) not in {f"torch.{name}" for name in DTYPES.values()}:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    state = model.state_dict()
    if model.config.shared_stacks:  # the format has two stacks: the same weights again, in memory of their own
        state |= {name.replace("L_module", "H_module"): w.clone() for name, w in state.items() if "L_module" in name}
    weights = {}
    for key in key_table(model.config):
        weight = state[key.name]
        weights[key.released] = converted = weight.to("cpu", dtype).contiguous()
        if not converted.isfinite().all() and weight.isfinite().all():
            raise ValueError(f"{key.released} does not fit {dtype}: its largest value is {weight.abs().max():.3g}")
    return weights


def _parts_on_disk(key: Key, stored: Mapping[str, Stored], folder: Path) -> tuple[str, ...]:
    """The names under which one tensor lies on disk, one or several; raises ValueError if they do not fit its shape."""
    parts = (key.released,) if key.released in stored else key.split
    missing = [part for part in parts if part not in stored]
    if missing:
        lacking = key.released if len(missing) == len(parts) else missing[0]
        raise ValueError(f"{folder}: tensor {lacking!r} is missing ({CONFIG_FILE} asks for it)")
    shape = (key.shape[0] // len(parts), *key.shape[1:])
    for part in parts:
        if stored[part].shape != shape:
            raise ValueError(
                f"{stored[part].path}: tensor {part!r} has shape {stored[part].shape}, {CONFIG_FILE} asks for {shape}"
            )
    return parts
