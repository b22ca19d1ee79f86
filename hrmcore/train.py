"""`hrmcore train`: a TOML file in, a run folder out (metrics, training state, hrm_text checkpoint)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hrmcore.checkpoint import save_model
from hrmcore.config import HRMConfig
from hrmcore.data import Corpus, PackedBatch, Rejected, epoch_batches, pack, read_records, tokenize
from hrmcore.model import HRM
from hrmcore.store import open_store, sha256_of
from hrmcore.tokenizer import Tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


EXAMPLE = """\
examples:
  hrmcore train run.toml          start, or resume where the run folder's state stands
  hrmcore train --explain         every key of a run file

a run file:
  train_files = ["records.jsonl"]    # {"instruction": …, "response": …} a line
  tokenizer = "tokenizer/"
  out = "run/"
  steps = 1000
  [model]
  hidden_size = 256
  intermediate_size = 768
  num_layers_per_stack = 2
  num_attention_heads = 4
  head_dim = 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore train`."""
    parser.epilog = EXAMPLE
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", type=Path, help="the run file (TOML)")
    what.add_argument("--explain", action="store_true", help="print every key of a run file and leave")


def run(args: argparse.Namespace) -> int:
    """Train as the run file says; an interrupted run saves its state first."""
    if args.explain:
        print(explain())
    else:
        Trainer(read_config(args.config)).run()
    return 0


def _key(explanation: str, default: Any = dataclasses.MISSING) -> Any:
    metadata = {"explain": explanation}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the fields' explanations are what `hrmcore train --explain` prints."""

    model: HRMConfig
    train_files: tuple[str, ...] = _key("JSON-lines files to train on, or one folder that `hrmcore prepare` wrote")
    tokenizer: str = _key("folder with tokenizer.model or tokenizer.json")
    out: str = _key("run folder: metrics.jsonl, state.safetensors and checkpoint/ are written here")
    steps: int = _key("optimizer steps")
    heldout_files: tuple[str, ...] = _key("the same for the loss that is reported; never trained on", ())
    batch_tokens: int = _key("input tokens of a packed batch, at most", 8192)
    learning_rate: float = _key("peak learning rate of AdamW", 1e-3)
    warmup_steps: int = _key("steps over which the learning rate rises linearly from 0", 100)
    schedule: str = _key("what follows the warm-up: 'constant', or 'cosine' to 0 at the last step", "cosine")
    weight_decay: float = _key("AdamW's decoupled weight decay", 0.1)
    beta1: float = _key("AdamW's first moment decay", 0.9)
    beta2: float = _key("AdamW's second moment decay", 0.95)
    grad_clip: float = _key("gradient norm above which gradients are scaled down", 1.0)
    horizon_first: int = _key("gradient horizon K at the start (model.md)", 2)
    horizon_last: int = _key("gradient horizon K after its warm-up", 5)
    horizon_fraction: float = _key("share of the steps over which K rises", 0.2)
    precision: str = _key("arithmetic of the matrix products and activations: 'float32' or 'bfloat16'", "float32")
    seed: int = _key("seed of the initial weights and of the data order", 0)
    eval_every: int = _key("steps between held-out losses", 500)
    save_every: int = _key("steps between training states", 500)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train config: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train config: {name} must be above 0, got {getattr(self, name)}")
        for name, choices in (("schedule", ("constant", "cosine")), ("precision", ("float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"train config: {name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 2 <= self.horizon_first <= self.horizon_last:
            raise ValueError(
                "train config: horizons must satisfy 2 <= horizon_first <= horizon_last, "
                f"got {self.horizon_first} and {self.horizon_last}"
            )
        if not 0 <= self.horizon_fraction <= 1:
            raise ValueError(f"train config: horizon_fraction must be in [0, 1], got {self.horizon_fraction}")
        if not self.train_files:
            raise ValueError("train config: train_files is empty")


def read_config(path: str | Path) -> TrainConfig:
    """Read and validate a TOML run file with a [model] table and the keys of TrainConfig at the top level.

    The model's vocabulary is the tokenizer's. Raises ValueError naming the file and the key.
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
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"missing key {missing[0]!r}")
    checked = {name: _typed(name, str(fields[name].type), value) for name, value in values.items() if name != "model"}
    if not isinstance(values["model"], dict):
        raise ValueError("model must be a table")
    tokenizer = Tokenizer.load(checked["tokenizer"])
    model = {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eoa,
        "pad_token_id": 0,
        **values["model"],
    }
    return TrainConfig(model=HRMConfig.from_dict(model), **checked)


def _typed(name: str, annotation: str, value: Any) -> Any:
    if annotation == "tuple[str, ...]":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value).__name__ == annotation:
        return value
    raise ValueError(f"{name} must be of type {annotation}, got {value!r}")


def explain() -> str:
    """Every key of a run file with its default and meaning, as commented TOML."""
    lines = []
    for f in dataclasses.fields(TrainConfig):
        if f.name != "model":
            default = "(required)" if f.default is dataclasses.MISSING else f"default {f.default!r}"
            lines.append(f"{f.name:<17} {default:<18} {f.metadata['explain']}")
    lines.append("\n[model]  the keys of HRMConfig; vocab_size and eos_token_id are the tokenizer's")
    for f in dataclasses.fields(HRMConfig):
        if f.name not in ("vocab_size", "eos_token_id"):
            default = "(required)" if f.default is dataclasses.MISSING else f"default {f.default!r}"
            lines.append(f"{f.name:<24} {default}")
    return "\n".join(lines)


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


_ROW_MULTIPLE = 64  # tokens of a batch are rounded up to it, see pack()


class Trainer:
    """One run: model, optimizer, data position. `run()` trains to the end and exports the checkpoint."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self.corpus = self._load(config.train_files)
        self.heldout = self._load(config.heldout_files) if config.heldout_files else None
        torch.manual_seed(config.seed)
        self.model = HRM(config.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self._batches = self._batch_stream(skip=0)
        if (state := self.out / "state.safetensors").exists():
            self._resume(state)

    def run(self) -> None:
        """Train until `steps`, then write checkpoint/ in the hrm_text format. Ctrl-C saves the state and ends."""
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None) as bar:
            try:
                while self.step < self.config.steps:
                    metrics = self._train_step()
                    if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                        metrics |= self.evaluate()
                    self._record(metrics)
                    bar.update()
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                    if self.step % self.config.save_every == 0:
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()
        self.export()

    def export(self) -> None:
        """Write the weights (bfloat16) and the tokenizer as an hrm_text checkpoint."""
        folder = self.out / "checkpoint"
        save_model(self.model, folder, dtype=torch.bfloat16, tokenizer_folder=self.config.tokenizer)

    def evaluate(self) -> dict[str, float]:
        """Mean held-out loss a supervised token, in nats; empty without held-out files."""
        if self.heldout is None:
            return {}
        total, count = 0.0, 0
        with torch.no_grad(), self._precision():
            for records in epoch_batches(self.heldout.lengths, self.config.batch_tokens, seed=0, epoch=0):
                batch = pack(self.heldout, records, _ROW_MULTIPLE)
                total += float(self.model.loss(batch))
                count += len(batch.targets)
        return {"heldout_loss": total / count}

    def _train_step(self) -> dict[str, float]:
        started = time.perf_counter()
        batch = next(self._batches)
        lr, k = learning_rate(self.config, self.step), horizon(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, norm = self._backward(batch, k)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = int(batch.offsets[len(batch.records)])
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": lr,
            "horizon": k,
            "grad_norm": norm,
            "tokens": tokens,
            "supervised_tokens": len(batch.targets),
            "tokens_per_second": tokens / seconds,
        }

    def _backward(self, batch: PackedBatch, k: int) -> tuple[float, float]:
        with self._precision():
            loss = self.model.loss(batch, horizon=k) / len(batch.targets)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        if not math.isfinite(norm):
            sources = ", ".join(str(record) for record in batch.records[:20])
            raise FloatingPointError(
                f"step {self.step}: the gradient is not finite; the batch's records are {sources}…"
            )
        return float(loss.detach()), norm

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        # Without the cache: torch would keep the weight copy of a visit that ran without autograd, and the visits
        # that carry gradient would then find a copy that leads nowhere.
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)

    def _load(self, files: tuple[str, ...]) -> Corpus:
        if folders := [file for file in files if Path(file).is_dir()]:
            if len(files) > 1:
                raise ValueError(f"{folders[0]}: a store stands alone; `hrmcore prepare` puts many files into one")
            return self._open_store(folders[0])
        rejected = Rejected()
        records = (record for file in files for record in read_records(file, rejected))
        bar = tqdm(records, desc="tokenising", unit="record", disable=None)
        corpus = tokenize(iter(bar), self.tokenizer, self.config.model.max_position_embeddings, rejected)
        for line in rejected.report():
            tqdm.write(line)
        return corpus

    def _open_store(self, folder: str) -> Corpus:
        store, context = open_store(folder), self.config.model.max_position_embeddings
        if store.manifest["tokenizer_sha256"] != sha256_of(self.tokenizer.source):
            raise ValueError(
                f"{folder}: was not made with {self.tokenizer.source}; set tokenizer to {folder}/tokenizer"
            )
        if (longest := int(store.corpus.lengths.max())) > context:
            raise ValueError(
                f"{folder}: a record has {longest} tokens, the model's max_position_embeddings is {context}; "
                f"prepare with --context {context}"
            )
        return store.corpus

    def _batch_stream(self, skip: int) -> Iterator[PackedBatch]:
        epoch = 0
        while True:
            for records in epoch_batches(self.corpus.lengths, self.config.batch_tokens, self.config.seed, epoch):
                if skip > 0:
                    skip -= 1
                else:
                    yield pack(self.corpus, records, _ROW_MULTIPLE)
            epoch += 1

    def _record(self, metrics: Mapping[str, float]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self) -> None:
        """Write the training state: complete under a temporary name first, then renamed over the last one."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        path = self.out / "state.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(self.step)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.step = int(file.metadata()["step"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a training state ({error})") from None
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path}: the state is of another model: {str(error).splitlines()[-1].strip()}") from None
        for name, parameter in self.model.named_parameters():
            prefix, suffix = "optimizer.", f".{name}"
            moments = {
                key.removeprefix(prefix).removesuffix(suffix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix) and key.endswith(suffix)
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self._batches = self._batch_stream(skip=self.step)
