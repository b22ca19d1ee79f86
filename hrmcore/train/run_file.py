"""The run file of `hrmcore train`: its keys, their checks, and what each of them means."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrmcore.checkpoint.hrm_text import read_config as read_checkpoint_config
from hrmcore.checkpoint.hrm_text import resolve
from hrmcore.checkpoint.sharded_state import shard_files
from hrmcore.checkpoint.training_state import is_state, read_metadata
from hrmcore.config import RECOMPUTE, HRMConfig, LoraConfig, Range
from hrmcore.data.store import MANIFEST, TOKENIZER, tokenizer_of
from hrmcore.growth.stages import GrowStage, growths_of, read_stages
from hrmcore.limits import read_bounded
from hrmcore.tokenizer import Tokenizer, tokenizer_files
from hrmcore.train.metrics import SINKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The defaults that follow the optimizer: hrmcore/optim.py says where the numbers come from. A key that an optimizer
# does not list has no meaning for it.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamatan2": {"learning_rate": 1e-3, "betas": (0.9, 0.95)},
    "adamatan2-paper": {"learning_rate": 1e-3, "betas": (0.9, 0.95)},
    "adamw": {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8},
    "sophia-g": {"learning_rate": 2e-4, "betas": (0.965, 0.99), "eps": 1e-12, "rho": 0.04, "curvature_every": 10},
    "sophia-h": {"learning_rate": 2e-4, "betas": (0.965, 0.99), "eps": 1e-12, "rho": 0.04, "curvature_every": 10},
}


_MOST_BYTES = 1 << 17  # of a run file: Python's reader of TOML takes a thousand bytes for a key
_STEPS = 1 << 40
_COUNTED = "no run comes so far"
_FLOAT = "steps are taken in float32"
_INT32 = "places in a batch are int32"

# What each number of a run file may be; [model] has its own in hrmcore/config.py. Some may not be their least value:
# see TrainConfig. A pair is checked number by number.
RANGES: dict[str, Range] = {
    "steps": Range(1, _STEPS, _COUNTED),
    "batch_tokens": Range(1, (1 << 31) - 65, _INT32),
    "accumulate": Range(1, 1 << 20, "a step holds its batches together"),
    "seed": Range(0, (1 << 63) - 1, "the generators take 63 bits"),
    "warmup_steps": Range(0, _STEPS, _COUNTED),
    "horizon_first": Range(2, 1 << 32, "no model has as many visits"),
    "horizon_last": Range(2, 1 << 32, "no model has as many visits"),
    "horizon_fraction": Range(0, 1, "it is a share of the steps"),
    "learning_rate": Range(0, 1e6, _FLOAT),
    "betas": Range(0, 1 - 2**-24, "1 in float32 would forget nothing"),
    "eps": Range(0, 1, _FLOAT),
    "rho": Range(0, 1e6, _FLOAT),
    "curvature_every": Range(1, _STEPS, _COUNTED),
    "weight_decay": Range(0, 1e6, _FLOAT),
    "grad_clip": Range(0, 1e30, _FLOAT),
    "ema": Range(0, 1 - 2**-24, "1 in float32 would average nothing"),
    "spike_factor": Range(0, 1e30, _FLOAT),
    "save_every": Range(1, _STEPS, _COUNTED),
    "keep": Range(1, _STEPS, _COUNTED),
    "keep_every": Range(0, _STEPS, _COUNTED),
    "eval_every": Range(1, _STEPS, _COUNTED),
    "patience": Range(0, _STEPS, _COUNTED),
    "check_records": Range(0, (1 << 31) - 1, "no file has as many"),
    "sample_answers": Range(0, (1 << 31) - 1, "no file has as many"),
}


def _key(group: str, explanation: str, default: Any = dataclasses.MISSING) -> Any:
    metadata = {"explain": explanation, "group": group}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; hrmcore/train/explanation.py prints the fields' explanations.

    A field whose default follows the optimizer is None until then, and stays None where the optimizer does not use it.
    """

    model: HRMConfig
    train_files: tuple[str, ...] = _key(
        "required", "JSON-lines or .parquet files to train on, or one folder that `hrmcore prepare` wrote"
    )
    tokenizer: str = _key(
        "required",
        "folder with tokenizer.model or tokenizer.json, or a prepared folder for its own; may be left out with "
        "init_from, or where train_files is a prepared folder",
    )
    out: str = _key("required", "run folder: metrics.jsonl, states/ and checkpoint/ are written here")
    steps: int = _key("required", "optimizer steps of the whole run")
    heldout_files: tuple[str, ...] = _key("data", "validation files, of the same kinds; never trained on", ())
    batch_tokens: int = _key("data", "most input tokens of a packed batch", 8192)
    accumulate: int = _key("data", "packed batches whose gradients make one step", 1)
    objective: str = _key(
        "data",
        "which tokens carry loss: 'response', or 'all' but the first; 'all' needs a model with prefix_lm = false",
        "response",
    )
    seed: int = _key("data", "seed of the initial weights, of the data's order and of the curvature samples", 0)
    init_from: str | None = _key(
        "model", "begin with these weights: an hrm_text checkpoint or a training state, which brings the [model]", None
    )
    lora: LoraConfig | None = _key(  # noqa: RUF009
        "model", "a [lora] table: train adapters over the frozen weights of init_from, see below", None
    )
    warmup_steps: int = _key("schedule", "steps over which the learning rate rises linearly from 0", 100)
    schedule: str = _key(
        "schedule", "learning rate after the warm-up: 'constant', or 'cosine' to 0 at the end", "cosine"
    )
    horizon_first: int = _key(
        "schedule",
        "gradient horizon K at the start: how many of a forward pass's last visits carry gradient",
        2,
    )
    horizon_last: int = _key("schedule", "gradient horizon K once it has risen", 5)
    horizon_fraction: float = _key("schedule", "fraction of the steps over which K rises", 0.2)
    optimizer: str = _key(
        "optimizer",
        f"one of {', '.join(OPTIMIZERS)}; adamatan2 steps as HRM-Text's own trainer does, adamatan2-paper as its paper "
        "writes it",
        "adamatan2",
    )
    learning_rate: float = _key("optimizer", "peak learning rate", None)
    betas: tuple[float, float] = _key(
        "optimizer",
        "decay of the first moment, and of the second (Sophia: of the curvature); if Sophia's loss stays flat, "
        "try 0.8 for the first",
        None,
    )
    eps: float | None = _key("optimizer", "added to the divisor (AdamW), or its least value (Sophia)", None)
    rho: float | None = _key(
        "optimizer", "Sophia: an update is clipped where |m| > rho·B·h; aim at a clipped_fraction of 0.5 to 0.9", None
    )
    curvature_every: int | None = _key("optimizer", "Sophia: steps between two samples of the curvature", None)
    weight_decay: float = _key("optimizer", "decoupled weight decay", 0.1)
    grad_clip: float = _key("optimizer", "norm above which the gradients are scaled down to it", 1.0)
    ema: float = _key(
        "optimizer", "decay of the averaged weights that are validated and exported; 0: no average", 0.9999
    )
    ema_dtype: str = _key(
        "optimizer",
        "the averaged weights are kept in 'float32' or, at half the memory and rounded at random, in 'bfloat16'",
        "float32",
    )
    on_nonfinite: str = _key(
        "optimizer",
        "what a NaN, or a spike of the loss, does: 'stop' the run, or 'skip' the step or curvature sample and count it",
        "stop",
    )
    spike_factor: float = _key(
        "optimizer", "a loss above this many times its running mean is a spike; 0: none is (experimental)", 0.0
    )
    precision: str = _key(
        "precision and devices", "of matrix products and activations: 'float32' or 'bfloat16'", "float32"
    )
    device: str = _key(
        "precision and devices", "'cpu', 'cuda' or 'cuda:N'; under torchrun each process takes one GPU", "cpu"
    )
    parallel: str = _key(
        "precision and devices",
        "under torchrun: 'data', every process holds the whole model, or 'sharded', each a shard of it (FSDP2)",
        "data",
    )
    recompute: str = _key(
        "precision and devices",
        "what backward computes again, for memory: 'none', 'sublayer' (norms and SwiGLU), or 'visit' (every visit but "
        "the last, as well); the result is the same",
        "sublayer",
    )
    cuda_graphs: bool = _key(
        "precision and devices",
        "capture a small model's steps, which are launches above all, as CUDA graphs; needs device 'cuda', parallel "
        "'data' (experimental: no GPU has run it)",
        False,
    )
    save_every: int = _key("checkpoints and states", "steps between training states", 500)
    keep: int = _key("checkpoints and states", "how many of the newest training states are kept", 2)
    keep_every: int = _key(
        "checkpoints and states", "training states at multiples of this many steps are kept for good; 0: none is", 0
    )
    grow: tuple[GrowStage, ...] = _key(
        "growth", "stages at which the model grows, each a [[grow]] table: see below", ()
    )
    eval_every: int = _key("validation and logging", "steps between validations on heldout_files", 500)
    patience: int = _key(
        "validation and logging",
        "validations without a better heldout_loss after which the run ends; the state of the best one is kept and "
        "exported; 0: the run takes all its steps, and the last is exported",
        0,
    )
    check_records: int = _key(
        "validation and logging", "validation records of which greedy answers are checked as well; 0: none", 64
    )
    sample_answers: int = _key(
        "validation and logging",
        "validation records whose greedy answers are shown and kept in samples.jsonl at each validation; 0: none",
        2,
    )
    log: tuple[str, ...] = _key(
        "validation and logging", f"where figures go besides metrics.jsonl: {' and '.join(SINKS)} (offline)", ()
    )

    def __post_init__(self) -> None:
        self._choose("optimizer", tuple(OPTIMIZERS))
        self._follow_optimizer()
        for name in ("learning_rate", "grad_clip", "rho"):
            self._hold(name, getattr(self, name) is None or not getattr(self, name) <= 0, "above 0")
        self._hold("spike_factor", self.spike_factor == 0 or not self.spike_factor <= 1, "0 or above 1")
        self._hold("ema", not (self.ema < 0 or self.ema >= 1), "at least 0 and below 1")
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                allowed.check(f"train config: {name}", number)
        self._choose("objective", ("response", "all"))
        if self.objective == "all" and self.model.prefix_lm:
            raise ValueError(
                "train config: with objective 'all' the instruction's tokens are predicted, but this model sees them "
                "ahead; set prefix_lm = false in [model]"
            )
        self._choose("schedule", ("constant", "cosine"))
        if self.precision == "float8":
            raise ValueError(
                "train config: precision 'float8' is not offered: no GPU has measured what it gains; "
                "set precision = 'bfloat16'"
            )
        self._choose("precision", ("float32", "bfloat16"))
        self._choose("ema_dtype", ("float32", "bfloat16"))
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", str(self.device)):
            raise ValueError(f"train config: device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        self._choose("parallel", ("data", "sharded"))
        self._choose("recompute", RECOMPUTE)
        if self.cuda_graphs and (self.device == "cpu" or self.parallel != "data"):
            raise ValueError("train config: cuda_graphs needs device = 'cuda' and parallel = 'data'")
        if self.parallel == "sharded" and (self.grow or self.optimizer == "sophia-h"):
            who = "[[grow]]" if self.grow else "sophia-h"
            raise ValueError(f"train config: {who} works on whole parameters; set parallel = 'data'")
        if self.parallel == "sharded" and self.ema_dtype != "float32":
            raise ValueError("train config: sharded averages are kept in float32; set ema_dtype = 'float32'")
        self._choose("on_nonfinite", ("stop", "skip"))
        self._hold("log", set(self.log) <= set(SINKS) and len(set(self.log)) == len(self.log), f"some of {SINKS}")
        if self.horizon_first > self.horizon_last:
            raise ValueError(
                "train config: horizons must satisfy horizon_first <= horizon_last, "
                f"got {self.horizon_first} and {self.horizon_last}"
            )
        if self.patience and not self.heldout_files:
            raise ValueError("train config: patience waits for a better validation; name heldout_files")
        if not self.train_files:
            raise ValueError("train config: train_files is empty")
        growths_of(self.grow, self.model, self.seed)  # each of them must be possible
        if self.lora is not None:
            self._check_lora()
        if self.parallel == "sharded":
            shard_files()  # what older releases of torch lack is said now, not at the first state

    def _check_lora(self) -> None:
        if self.init_from is None:
            raise ValueError("train config: [lora] needs init_from: the checkpoint whose weights are frozen")
        if is_state(self.init_from):
            raise ValueError(f"train config: [lora] needs a checkpoint as init_from; {self.init_from} is a state")
        if self.grow or self.parallel == "sharded":
            who = "[[grow]] tables" if self.grow else "parallel = 'sharded'"
            raise ValueError(f"train config: [lora] leaves the weights as they are; remove {who}")
        if self.recompute != "sublayer" or self.cuda_graphs:
            who = "cuda_graphs" if self.recompute == "sublayer" else f"recompute = {self.recompute!r}"
            raise ValueError(f"train config: [lora] computes and launches as a run does by default; remove {who}")
        if (Path(self.out) / "checkpoint").resolve() == Path(self.init_from).resolve():
            raise ValueError(
                f"train config: the merged model would replace init_from, {self.init_from}; name another out"
            )

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
    """The decay of the averaged weights at a step; None when no average is kept.

    It rises with the steps. Without that the average of a short run would consist mostly of the first weights.
    """
    return min(config.ema, (1 + step) / (10 + step)) if config.ema else None


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read and validate a TOML run file with a [model] table and the keys of TrainConfig at the top level.

    The model's vocabulary is the tokenizer's. With `init_from`, that checkpoint brings the model and the tokenizer; a
    store brings its tokenizer. `changes` are KEY=VALUE texts that stand for what the file says; the value is TOML, or
    plain text, a key of [model] is model.KEY. Raises ValueError naming the file and the key.
    """
    path = Path(path)
    try:
        values: dict[str, Any] = tomllib.loads(read_bounded(path, _MOST_BYTES).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    for change in changes:
        _change(values, change)
    try:
        return _config_from(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


_TABLES = ("model", "lora", "grow")  # keys of TrainConfig that a run file writes as tables


def _change(values: dict[str, Any], change: str) -> None:
    """Put a KEY=VALUE text into the values of a run file."""
    key, equals, text = change.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"--set must be KEY=VALUE, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table, name = values, key
    for prefix in ("model", "lora"):
        if key.startswith(f"{prefix}."):
            table, name = values.setdefault(prefix, {}), key.removeprefix(f"{prefix}.")
    if not isinstance(table, dict) or name in _TABLES:
        raise ValueError(f"--set {key}: name one key, as learning_rate or model.head_dim")
    table[name] = value


def _config_from(values: Mapping[str, Any]) -> TrainConfig:
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(fields))}")
    checked = {
        name: _typed(name, str(fields[name].type), value) for name, value in values.items() if name not in _TABLES
    }
    checked["grow"] = read_stages(values.get("grow", []))
    if (lora := values.get("lora")) is not None:
        if not isinstance(lora, dict):
            raise ValueError("lora must be a table")
        checked["lora"] = LoraConfig.from_dict(lora)
    if found := _found_tokenizer(checked):
        checked.setdefault("tokenizer", found)
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING} - {"model"}
    if missing := sorted(required - set(checked)):
        raise ValueError(f"missing key {missing[0]!r}")
    checked["tokenizer"] = str(tokenizer_of(checked["tokenizer"]))
    tokenizer = Tokenizer.load(checked["tokenizer"])
    return TrainConfig(model=_model_config(values.get("model"), checked.get("init_from"), tokenizer), **checked)


def _found_tokenizer(values: Mapping[str, Any]) -> str | None:
    """The tokenizer that `init_from` brings, else the one of the store."""
    if (source := values.get("init_from")) and not is_state(source):
        folder = resolve(source)
        if tokenizer_files(folder):
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
        config = HRMConfig.from_dict({**own, **table})
        if config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model: vocab_size is {config.vocab_size}, but {tokenizer.source} has {tokenizer.vocab_size} tokens; "
                "leave it out, or take at least as many"
            )
        return config
    if table is not None:
        raise ValueError(f"{init_from} brings the model's shape; remove [model]")
    if is_state(init_from):
        metadata = read_metadata(init_from)
        if "lora" in metadata:
            raise ValueError(f"{init_from}: holds adapters alone; name the checkpoint/ that its run wrote")
        try:
            config = HRMConfig.from_dict(json.loads(metadata["model_config"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{init_from}: its metadata has no model_config ({error})") from None
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
        huge = isinstance(value, int) and abs(value) > sys.float_info.max  # no float holds it, and no range allows it
        return float(value) if not huge else math.inf if value > 0 else -math.inf
    elif type(value).__name__ == expected:
        return value
    raise ValueError(f"{name} must be of type {expected}, got {value!r}")
