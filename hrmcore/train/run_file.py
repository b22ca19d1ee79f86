"""The run file of `hrmcore train`: its keys, their checks, and what each of them means."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrmcore.checkpoint.hrm_text import read_config as read_checkpoint_config
from hrmcore.checkpoint.hrm_text import resolve
from hrmcore.checkpoint.training_state import is_state, read_metadata
from hrmcore.config import HRMConfig
from hrmcore.data.store import MANIFEST, TOKENIZER
from hrmcore.growth.stages import GrowStage, growths_of, read_stages
from hrmcore.tokenizer import TOKENIZER_FILES, Tokenizer
from hrmcore.train.metrics import SINKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a run file leaves out, for each optimizer: hrmcore/optim.py says where the numbers come from. A key that an
# optimizer does not list has no meaning for it.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamatan2": {"learning_rate": 1e-3, "betas": (0.9, 0.95)},
    "adamw": {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8},
    "sophia-g": {"learning_rate": 2e-4, "betas": (0.965, 0.99), "eps": 1e-12, "rho": 0.04, "curvature_every": 10},
    "sophia-h": {"learning_rate": 2e-4, "betas": (0.965, 0.99), "eps": 1e-12, "rho": 0.04, "curvature_every": 10},
}


def _key(explanation: str, default: Any = dataclasses.MISSING) -> Any:
    metadata = {"explain": explanation}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the fields' explanations are what `hrmcore train --explain` prints.

    Fields that follow the optimizer get its default when they are None, and stay None where it has no use for them.
    """

    model: HRMConfig
    train_files: tuple[str, ...] = _key("JSON-lines or .parquet files to train on, or a folder from `hrmcore prepare`")
    tokenizer: str = _key("folder with tokenizer.model or tokenizer.json; init_from and a store bring theirs")
    out: str = _key("run folder: metrics.jsonl, states/ and checkpoint/ are written here")
    steps: int = _key("optimizer steps")
    heldout_files: tuple[str, ...] = _key("the same for the loss that is reported; never trained on", ())
    init_from: str | None = _key(
        "start from these weights: an hrm_text checkpoint (its config.json is the [model])", None
    )
    batch_tokens: int = _key("input tokens of a packed batch, at most", 8192)
    objective: str = _key(
        "tokens with loss: 'response', or 'all' after the first, for a model with prefix_lm = false", "response"
    )
    accumulate: int = _key("packed batches whose gradients make one step", 1)
    optimizer: str = _key(f"one of {', '.join(OPTIMIZERS)}", "adamatan2")
    learning_rate: float = _key("peak learning rate", None)
    betas: tuple[float, float] = _key(
        "decay of the first and of the second moment; Sophia: of the curvature; try 0.8 first if the loss stays flat",
        None,
    )
    eps: float | None = _key("what the divisor is held above (Sophia) or has added (AdamW)", None)
    rho: float | None = _key("Sophia: a step is clipped where |m| > rho·B·h; aim at 0.5 to 0.9 clipped", None)
    curvature_every: int | None = _key("Sophia: steps between two samples of the curvature", None)
    weight_decay: float = _key("decoupled weight decay", 0.1)
    ema: float = _key("decay of the averaged weights that are evaluated and exported; 0 keeps none", 0.9999)
    warmup_steps: int = _key("steps over which the learning rate rises linearly from 0", 100)
    schedule: str = _key("what follows the warm-up: 'constant', or 'cosine' to 0 at the last step", "cosine")
    grad_clip: float = _key("gradient norm above which gradients are scaled down", 1.0)
    horizon_first: int = _key("gradient horizon K at the start (docs/model.md)", 2)
    horizon_last: int = _key("gradient horizon K after its warm-up", 5)
    horizon_fraction: float = _key("share of the steps over which K rises", 0.2)
    device: str = _key("'cpu' or 'cuda'; of several processes on one machine each takes a GPU of its own", "cpu")
    parallel: str = _key(
        "several processes: 'data', each holds the whole model, or 'sharded', each its part of it (FSDP2)", "data"
    )
    precision: str = _key("arithmetic of the matrix products and activations: 'float32' or 'bfloat16'", "float32")
    on_nonfinite: str = _key("what a NaN or a spike does: 'stop', or 'skip' the step and count it", "stop")
    spike_factor: float = _key("a loss above so many times its running mean is a spike; 0: none is", 0.0)
    seed: int = _key("seed of the initial weights, of the data order and of the curvature samples", 0)
    eval_every: int = _key("steps between held-out losses", 500)
    check_records: int = _key("held-out records whose answers are checked as well; 0: none", 64)
    save_every: int = _key("steps between training states", 500)
    keep: int = _key("how many of the newest training states stay", 2)
    keep_every: int = _key("training states at multiples of so many steps stay for good; 0: none", 0)
    log: tuple[str, ...] = _key(f"besides metrics.jsonl, into the run folder: {' and '.join(SINKS)} (offline)", ())
    grow: tuple[GrowStage, ...] = _key("stages, each a table under [[grow]]: see below", ())

    def __post_init__(self) -> None:
        self._choose("optimizer", tuple(OPTIMIZERS))
        self._follow_optimizer()
        for name in ("steps", "batch_tokens", "accumulate", "eval_every", "save_every", "keep"):
            self._hold(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "keep_every", "check_records"):
            self._hold(name, getattr(self, name) >= 0, "at least 0")
        if self.curvature_every is not None:
            self._hold("curvature_every", self.curvature_every >= 1, "at least 1")
        for name in ("learning_rate", "grad_clip"):
            self._hold(name, 0 < getattr(self, name) < math.inf, "above 0")
        self._hold("spike_factor", self.spike_factor == 0 or 1 < self.spike_factor < math.inf, "0 or above 1")
        self._hold("ema", 0 <= self.ema < 1, "at least 0 and below 1")
        self._choose("objective", ("response", "all"))
        if self.objective == "all" and self.model.prefix_lm:
            raise ValueError(
                "train config: with objective 'all' the instruction's tokens are predicted, but this model sees them "
                "ahead; set prefix_lm = false in [model]"
            )
        self._choose("schedule", ("constant", "cosine"))
        self._choose("precision", ("float32", "bfloat16"))
        self._choose("device", ("cpu", "cuda"))
        self._choose("parallel", ("data", "sharded"))
        if self.parallel == "sharded" and (self.grow or self.optimizer == "sophia-h"):
            who = "[[grow]]" if self.grow else "sophia-h"
            raise ValueError(f"train config: {who} works on whole parameters; set parallel = 'data'")
        self._choose("on_nonfinite", ("stop", "skip"))
        self._hold("log", set(self.log) <= set(SINKS) and len(set(self.log)) == len(self.log), f"some of {SINKS}")
        if not 2 <= self.horizon_first <= self.horizon_last:
            raise ValueError(
                "train config: horizons must satisfy 2 <= horizon_first <= horizon_last, "
                f"got {self.horizon_first} and {self.horizon_last}"
            )
        self._hold("horizon_fraction", 0 <= self.horizon_fraction <= 1, "in [0, 1]")
        if not self.train_files:
            raise ValueError("train config: train_files is empty")
        growths_of(self.grow, self.model, self.seed)  # each of them must be possible

    def _follow_optimizer(self) -> None:
        defaults = OPTIMIZERS[self.optimizer]
        for name in ("learning_rate", "betas", "eps", "rho", "curvature_every"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                raise ValueError(f"train config: {name} means nothing to {self.optimizer}; remove it")

    def _hold(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"train config: {name} must be {expected}, got {getattr(self, name)}")

    def _choose(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"train config: {name} must be one of {choices}, got {getattr(self, name)!r}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def horizon(config: TrainConfig, step: int) -> int:
    """The gradient horizon K of a step: linear from first to last over the first share of the steps."""
    ramp = config.horizon_fraction * config.steps
    progress = 1.0 if step >= ramp else step / ramp
    return config.horizon_first + int(progress * (config.horizon_last - config.horizon_first))


def ema_decay(config: TrainConfig, step: int) -> float | None:
    """The decay of the averaged weights at a step; None when there are none.

    It rises with the steps, so that a short run's average is not mostly its first weights.
    """
    return min(config.ema, (1 + step) / (10 + step)) if config.ema else None


def read_config(path: str | Path) -> TrainConfig:
    """Read and validate a TOML run file with a [model] table and the keys of TrainConfig at the top level.

    The model's vocabulary is the tokenizer's. With `init_from`, that checkpoint brings the model and the tokenizer; a
    store brings its tokenizer. Raises ValueError naming the file and the key.
    """
    path = Path(path)
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    try:
        return _config_from(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_from(values: Mapping[str, Any]) -> TrainConfig:
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(fields))}")
    checked = {
        name: _typed(name, str(fields[name].type), value)
        for name, value in values.items()
        if name not in ("model", "grow")
    }
    checked["grow"] = read_stages(values.get("grow", []))
    if found := _found_tokenizer(checked):
        checked.setdefault("tokenizer", found)
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING} - {"model"}
    if missing := sorted(required - set(checked)):
        raise ValueError(f"missing key {missing[0]!r}")
    tokenizer = Tokenizer.load(checked["tokenizer"])
    return TrainConfig(model=_model_config(values.get("model"), checked.get("init_from"), tokenizer), **checked)


def _found_tokenizer(values: Mapping[str, Any]) -> str | None:
    """The tokenizer that `init_from` brings, else the one of the store."""
    if (source := values.get("init_from")) and not is_state(source):
        folder = resolve(source)
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return str(folder)
    for file in values.get("train_files", ()):
        if (Path(file) / MANIFEST).is_file():
            return str(Path(file) / TOKENIZER)
    return None


def _model_config(table: Any, init_from: str | None, tokenizer: Tokenizer) -> HRMConfig:
    if init_from is None:
        if table is None:
            raise ValueError("missing key 'model'")
        if not isinstance(table, dict):
            raise ValueError("model must be a table")
        own = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eoa, "pad_token_id": 0}
        return HRMConfig.from_dict({**own, **table})
    if table is not None:
        raise ValueError(f"{init_from} brings the model's shape; remove [model]")
    if is_state(init_from):
        config = HRMConfig.from_dict(json.loads(read_metadata(init_from)["model_config"]))
    else:
        config = read_checkpoint_config(resolve(init_from))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer.source} has {tokenizer.vocab_size} tokens, the model of {init_from} only {config.vocab_size}"
        )
    return config


def _typed(name: str, annotation: str, value: Any) -> Any:
    expected = annotation.removesuffix(" | None")
    if expected.startswith("tuple[") and isinstance(value, list):
        kinds: tuple[type, ...] = (str,) if "str" in expected else (int, float)
        pair = expected.endswith("...]") or len(value) == 2
        if pair and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value):
            return tuple(value)
    elif expected == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value).__name__ == expected:
        return value
    raise ValueError(f"{name} must be of type {expected}, got {value!r}")


def explain() -> str:
    """Every key of a run file with its default and meaning, as commented TOML."""
    lines = []
    for f in dataclasses.fields(TrainConfig):
        if f.name != "model":
            lines.append(_line(f, 17))
    lines.append("\nwhere the default follows the optimizer ('-': it has no such key)")
    names = [f.name for f in dataclasses.fields(TrainConfig) if any(f.name in own for own in OPTIMIZERS.values())]
    lines.append(f"{'':<17} " + " ".join(f"{name:<15}" for name in OPTIMIZERS))
    for name in names:
        values = (str(list(v) if isinstance(v := own.get(name, "-"), tuple) else v) for own in OPTIMIZERS.values())
        lines.append(f"{name:<17} " + " ".join(f"{value:<15}" for value in values).rstrip())
    filled_in = ("vocab_size", "eos_token_id", "pad_token_id")
    lines.append(f"\n[model]  the keys of HRMConfig; {', '.join(filled_in)} follow the tokenizer; none with init_from")
    lines += [_line(f, 24) for f in dataclasses.fields(HRMConfig) if f.name not in filled_in]
    lines.append("\n[[grow]]  a larger model from at_tokens on; sizes that are left out stay")
    lines += [_line(f, 24) for f in dataclasses.fields(GrowStage)]
    return "\n".join(lines)


def _line(f: dataclasses.Field[Any], width: int) -> str:
    return f"{f.name:<{width}} {_default(f):<20} {f.metadata['explain']}"


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is dataclasses.MISSING:
        return "(required)"
    if any(f.name in own for own in OPTIMIZERS.values()):
        return "by optimizer"
    return f"default {f.default!r}"
