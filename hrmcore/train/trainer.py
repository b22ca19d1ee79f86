"""Training: a run file in, a run folder out (metrics, training states, hrm_text checkpoint)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrmcore import machine, optim, planner
from hrmcore.checkpoint.hrm_text import load_model, resolve, save_model
from hrmcore.checkpoint.training_state import StateWriter, find_newest, is_state, load_state, lock, restore, shapes_of
from hrmcore.data.packing import BatchStream, PackedBatch, epoch_batches, pack, share
from hrmcore.data.store import load_corpus
from hrmcore.distributed import fsdp
from hrmcore.distributed.world import World
from hrmcore.growth.stages import GrowthSchedule
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer
from hrmcore.train import curvature, validation
from hrmcore.train.metrics import Metrics
from hrmcore.train.run_file import TrainConfig, ema_decay, horizon, learning_rate


class Trainer:
    """One run: model, optimizer, data position. `run()` trains to the end and exports the checkpoint.

    It holds the run folder's lock until `run` or `close` ends. Raises BlockingIOError when another run has it. Under
    torchrun each process makes one: together they do what one alone would, and rank 0 alone writes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.world = World(config.device)
        self._held = contextlib.ExitStack()
        self._held.callback(self.world.close)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.world.leads:
                self._held.enter_context(lock(self.out))
            self._prepare()
        except BaseException:
            self._held.close()
            raise

    def _prepare(self) -> None:
        config = self.config
        self.tokenizer = Tokenizer.load(config.tokenizer)
        context, heldout = config.model.max_position_embeddings, config.heldout_files
        self.corpus, self._checksum = load_corpus(config.train_files, self.tokenizer, context, self._say)
        if config.objective == "all":
            self.corpus = self.corpus.with_loss_on_all()
        self.heldout = load_corpus(heldout, self.tokenizer, context, self._say)[0] if heldout else None
        self._sharded = config.parallel == "sharded" and self.world.ranks > 1
        self.growing = GrowthSchedule(config.grow, config.model, config.seed)
        self._growth_flops = self._cost_of_growing()
        self._say(self._needs())
        self.model = self._first_model().to(self.world.device)
        if self._sharded:
            fsdp.shard(self.model, self.world, config.precision)
        self.optimizer = make_optimizer(config, self.model)
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.typical_loss: float | None = None  # a running mean
        self._stream = BatchStream(self.corpus, config.batch_tokens, config.seed)
        parts = config.parallel == "sharded"
        group = self.world.group() if parts else None
        self._writer = StateWriter(self.out, config.keep, config.keep_every, parts, group)
        self._saved = -1  # the step of the newest state
        with self.world.leader_first():  # it compares checksums and sets damaged states aside
            newest = find_newest(self.out, self._say, contents=self.world.leads)
        if newest:
            self._resume(*newest)
        self.world.agree(repr(config) + json.dumps(self._metadata()))
        self._metrics: Metrics | None = None
        if self.world.leads:
            self._metrics = Metrics(self.out, self.step, config.log, dataclasses.asdict(config))
            self._held.callback(self._metrics.close)

    def run(self) -> None:
        """Train until `steps`, then write checkpoint/ in the hrm_text format.

        Ctrl-C (and SIGTERM) ends after the current step with a state; a second one ends at once, without.
        """
        try:
            with _interruption() as asked:
                self._train(asked)
                self.save()
                self._writer.finish()
                if self.step < self.config.steps:
                    raise KeyboardInterrupt
                self.export()
        finally:
            self.close()

    def _train(self, asked: threading.Event) -> None:
        config = self.config
        leads = self.world.leads
        with tqdm(total=config.steps, initial=self.step, unit="step", disable=None if leads else True) as bar:
            while self.step < config.steps and not self.world.sum(asked.is_set()):
                metrics = self._train_step()
                due = self.step % config.eval_every == 0 or self.step == config.steps
                if due and (leads or self._sharded):
                    metrics |= self.evaluate()
                if self._metrics is not None:
                    self._metrics.record(metrics)
                bar.update()
                bar.set_postfix_str(_shown(metrics))
                self._writer.check()
                if self.step % config.save_every == 0 or (config.keep_every and self.step % config.keep_every == 0):
                    self.save()

    def close(self) -> None:
        """Wait for the state under way and give the run folder back."""
        try:
            self._writer.finish()
        finally:
            self._held.close()

    def export(self) -> None:
        """Write the averaged weights (bfloat16) and the tokenizer as an hrm_text checkpoint; rank 0 does."""
        folder, tokenizer, half = self.out / "checkpoint", self.config.tokenizer, torch.bfloat16
        with self._averaged():
            model = fsdp.gathered(self.model, self.world, half) if self._sharded else self.model
            if self.world.leads and model is not None:
                # The run file asked for xPos, if this is xPos; the checkpoint says so, and hrmcore loads it.
                save_model(model, folder, dtype=half, tokenizer_folder=tokenizer, allow_xpos=True)
        self._say(f"{folder}: the model, for hrmcore generate, eval, inspect and grow")

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and share of right answers, of the averaged weights; empty without held-out records."""
        if self.heldout is None:
            return {}
        checked, batch_tokens = self.config.check_records, self.config.batch_tokens
        with self._precision(), self._averaged():
            found = {"heldout_loss": validation.mean_loss(self.model, self.heldout, batch_tokens)}
            if checked:
                right = validation.exact_matches(self.model, self.heldout, checked, batch_tokens)
                found["heldout_exact"] = right
        return found

    # One step

    def _train_step(self) -> dict[str, float]:
        grown = self._grow() if self.growing.due(self.tokens) else {}
        started = time.perf_counter()
        config = self.config
        batches = [next(self._stream) for _ in range(config.accumulate)]
        rate, k = learning_rate(config, self.step) * self.growing.rate(self.step), horizon(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"], group["ema"] = rate, ema_decay(config, self.step)
        loss, norm = self._backward(batches, k)
        if (fault := self._fault(loss, norm)) is None:
            self._update(batches, k)
            self.typical_loss = loss if self.typical_loss is None else 0.98 * self.typical_loss + 0.02 * loss
        elif config.on_nonfinite == "skip":
            self.skipped += 1
        else:
            self._stop_at(batches, fault)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.growing.advance(self.model, self.step)
        tokens = sum(int(batch.offsets[len(batch.records)]) for batch in batches)
        self.tokens += tokens
        metrics = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "horizon": k,
            "grad_norm": norm,
            "tokens": tokens,
            "supervised_tokens": sum(len(batch.targets) for batch in batches),
            "tokens_seen": self.tokens,
        }
        if config.on_nonfinite == "skip":
            metrics["skipped"] = self.skipped
        if isinstance(self.optimizer, optim.Sophia):
            clipped, stepped = (self.world.sum(count) for count in self.optimizer.clipped)
            metrics["clipped_fraction"] = clipped / stepped if stepped else math.nan
        return metrics | self._speed(batches, k, time.perf_counter() - started) | grown

    def _grow(self) -> dict[str, float]:
        """Make the model and the optimizer larger, once the state before it is on the disk."""
        self.save()
        self._writer.finish()
        self.model, self.optimizer, report = self.growing.grow(self.model, self.optimizer, self._fixed_loss, self.step)
        schedule, from_scratch = self._growth_flops
        return report | {"growth_flops": schedule, "from_scratch_flops": from_scratch}

    def _fixed_loss(self, model: HRM) -> float:
        """The mean loss on the first batch of an order of its own, in float32."""
        records = next(iter(epoch_batches(self.corpus.lengths, self.config.batch_tokens, seed=0, epoch=0)))
        batch = pack(self.corpus, records)
        with torch.no_grad():
            return float(model.loss(batch)) / len(batch.targets)

    def _backward(self, batches: Sequence[PackedBatch], k: int) -> tuple[float, float]:
        """Gradients of the mean loss over all supervised tokens of the batches; returns it and the gradients' norm."""
        count = sum(len(batch.targets) for batch in batches)
        total = 0.0
        for batch in self._shares(batches):
            with self._precision():
                loss = self.model.loss(batch, horizon=k) / count
            loss.backward()
            total += float(loss.detach())
        self._sum_gradients()
        parameters, limit = self.model.parameters(), self.config.grad_clip
        if self._sharded:
            norm = fsdp.clip_gradients(parameters, limit, self.world)
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        return self.world.sum(total), norm

    def _sum_gradients(self) -> None:
        """After backward: over all ranks; sharded ones were summed as they came."""
        if self._sharded:
            fsdp.reshard(self.model)
        else:
            self.world.sum_gradients(self.model.parameters())

    def _shares(self, batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """What this rank computes of the step's batches."""
        if self.world.ranks == 1:
            return batches
        lengths, rank, ranks = self.corpus.lengths, self.world.rank, self.world.ranks
        shares = []
        for batch in batches:
            if records := share(lengths, batch.records, rank, ranks):
                shares.append(pack(self.corpus, records, BatchStream.MULTIPLE))
            elif self._sharded:
                shares.append(fsdp.filler(self.corpus, batch))
        return shares

    def _update(self, batches: Sequence[PackedBatch], k: int) -> None:
        """The optimizer's step, and every so often a sample of the curvature for the steps that follow."""
        if not isinstance(self.optimizer, optim.Sophia):
            self.optimizer.step()
            return
        self.optimizer.step(batch_tokens=1 if self.optimizer.variant == "G" else None)
        if self.step % (self.config.curvature_every or 1) == 0:
            self._sample_curvature(self.optimizer, batches, k)

    def _sample_curvature(self, sophia: optim.Sophia, batches: Sequence[PackedBatch], k: int) -> None:
        seed = self.config.seed
        if sophia.variant == "H":  # the ranks would need one direction and the sum of their products: each does it all
            generator = curvature.generator_of(seed, self.step, device=self.world.device)
            curvature.hutchinson(sophia, self.model, batches, k, generator)
            return
        sophia.zero_grad(set_to_none=True)
        labels = sum(len(batch.targets) for batch in batches)
        generator = curvature.generator_of(seed, self.step, self.world.rank, self.world.device)
        with self._precision():
            curvature.gauss_newton_bartlett(self.model, self._shares(batches), labels, k, generator)
        self._sum_gradients()
        sophia.update_hessian()

    def _fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step's figures; None when nothing is."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        limit, typical = self.config.spike_factor, self.typical_loss
        if limit and typical is not None and loss > limit * typical:
            return f"the loss {loss:.4g} is more than {limit:g} times the usual {typical:.4g}"
        return None

    def _stop_at(self, batches: Sequence[PackedBatch], fault: str) -> NoReturn:
        records = [record for batch in batches for record in batch.records]
        guilty = [record for record in records if not math.isfinite(self._loss_of(record))] or records
        shown = ", ".join(self.corpus.describe(record) for record in guilty[:20]) + ("…" if len(guilty) > 20 else "")
        raise FloatingPointError(
            f"step {self.step}: {fault}; it comes from the records {shown}; "
            "mend or remove them, or set on_nonfinite = 'skip'; the states before are intact"
        )

    def _loss_of(self, record: int) -> float:
        with torch.no_grad(), self._precision():
            return float(self.model.loss(pack(self.corpus, [record])))

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        # Without the cache: torch would keep the weight copy of a visit that ran without autograd, and the visits
        # that carry gradient would then find a copy that leads nowhere.
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, cache_enabled=False)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        with self.optimizer.swap_ema() if self.config.ema else nullcontext():
            yield
            if self._sharded:
                fsdp.reshard(self.model)

    # Figures of a step

    def _speed(self, batches: Sequence[PackedBatch], k: int, seconds: float) -> dict[str, float]:
        tokens = sum(int(batch.offsets[len(batch.records)]) for batch in batches)
        supervised = sum(len(batch.targets) for batch in batches)
        flops = planner.training_flops(
            self.model.config, k, tokens, supervised, sum(self._visible_pairs(batch) for batch in batches)
        )
        return {
            "tokens_per_second": tokens / seconds,
            "flops": flops.total,
            "mfu": flops.total / seconds / (self.world.ranks * self._peak),
            "memory": machine.peak_memory(self.world.device),
        }

    def _visible_pairs(self, batch: PackedBatch) -> float:
        """(query, key) pairs that attention sees in a batch: key j is visible to query i iff j < max(prefix, i + 1)."""
        count = len(batch.records)
        lengths = np.diff(batch.offsets[: count + 1].numpy()).astype(np.float64)
        prefix = batch.prefix[:count].numpy().astype(np.float64) * self.config.model.prefix_lm
        response = lengths - prefix
        return float((prefix**2 + response * prefix + response * (response + 1) / 2).sum())

    @functools.cached_property
    def _peak(self) -> float:
        return machine.peak_flops(self.config.precision, device=str(self.world.device))

    def _say(self, line: str) -> None:
        if self.world.leads:
            tqdm.write(line, file=sys.stderr)

    # Start and resume

    def _first_model(self) -> HRM:
        torch.manual_seed(self.config.seed)
        source = self.config.init_from
        if source is None:
            return HRM(self.config.model)
        if not is_state(source):
            return load_model(resolve(source))
        tensors, _ = load_state(source)
        model = HRM(self.config.model)
        weights = {name: tensors[f"model.{name}"] for name in model.state_dict()}
        averaged = {name: tensors.get(f"optimizer.ema.{name}", tensor) for name, tensor in weights.items()}
        model.load_state_dict(averaged)
        return model

    def _needs(self) -> str:
        """One line that states the memory of a step before anything large is allocated."""
        config, lengths, model = self.config, self.corpus.lengths, self.growing.largest
        supervised = float((lengths - self.corpus.prefix + 1).sum() / lengths.sum())
        tokens = -(-config.batch_tokens // self.world.ranks)
        holders = self.world.ranks if self._sharded else 1
        need = planner.memory(model, config.horizon_last, tokens, supervised, holders, config.precision)
        average = need.weights if config.ema else 0.0
        state = need.weights + need.optimizer + average
        more = "more" if self.world.device.type == "cpu" else "of main memory"
        return (
            f"{planner.parameters(model) / 1e6:.2f} M parameters; about {(need.peak + average) / 1e9:.2f} GB at "
            f"a step's peak, torch and the data aside, and {state / 1e9:.2f} GB {more} while a state is written; "
            f"{machine.available_memory(self.world.device) / 1e9:.2f} GB are free"
        )

    def _cost_of_growing(self) -> tuple[float, float]:
        """FLOPs of the run with its growths, and of its last model from scratch; said before the run starts."""
        config = self.config
        if not config.grow:
            return 0.0, 0.0
        prompt = float(self.corpus.prefix.mean())
        record = planner.Record(prompt, float(self.corpus.lengths.mean()) - prompt)
        course = planner.Horizon(config.horizon_first, config.horizon_last, config.horizon_fraction)
        tokens = config.steps * config.accumulate * config.batch_tokens
        schedule, from_scratch = self.growing.flops(tokens, record, course)
        part = f"{schedule / from_scratch:.0%} of its last model from scratch"
        self._say(f"the schedule with its growths takes {schedule:.3g} FLOPs, {part}")
        return schedule, from_scratch

    def save(self) -> None:
        """Begin to write the training state of this step; `run` and `close` wait for its end."""
        if self.step == self._saved:
            return
        self._saved = self.step
        if self.world.leads or self._sharded:
            self._writer.save(self.step, self._tensors(), self._metadata())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _metadata(self) -> dict[str, str]:
        return {
            "step": str(self.step),
            "tokens": str(self.tokens),
            "skipped": str(self.skipped),
            "typical_loss": json.dumps(self.typical_loss),
            "optimizer": self.config.optimizer,
            **self.growing.metadata(),
            "data_fingerprint": json.dumps(self._fingerprint()),
            "data_position": json.dumps(self._stream.position),
            "rng": json.dumps({"seed": self.config.seed}),  # every draw is a function of seed, epoch and step
        }

    def _fingerprint(self) -> dict[str, Any]:
        """What the order and contents of the batches depend on."""
        config = self.config
        return {
            "records": len(self.corpus),
            "tokens": int(self.corpus.offsets[-1]),
            "sha256": self._checksum,
            "seed": config.seed,
            "batch_tokens": config.batch_tokens,
            "accumulate": config.accumulate,
            "objective": config.objective,
        }

    def _resume(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata["optimizer"] != self.config.optimizer:
            raise ValueError(f"{path}: was trained with {metadata['optimizer']}, not with {self.config.optimizer}")
        known = {"objective": "response"} | json.loads(metadata["data_fingerprint"])  # older states name none
        for name, ours in self._fingerprint().items():
            theirs = known.get(name)
            if theirs != ours:
                what = "the training data" if name in ("records", "tokens", "sha256") else name
                raise ValueError(
                    f"{path}: {what} changed since (its {name} is {theirs}, now {ours}), so the run cannot go on "
                    "where it stood; name another out, and this state as init_from to keep its weights"
                )
        self._catch_up(path, metadata)
        self._restore(path)
        self.step, self.tokens, self.skipped = (int(metadata[key]) for key in ("step", "tokens", "skipped"))
        self._saved = self.step
        self.typical_loss = json.loads(metadata.get("typical_loss", "null"))
        self._say(f"going on after step {self.step} of {self.config.steps}, where {path} stands")
        epoch, batch = json.loads(metadata["data_position"])
        self._stream = BatchStream(self.corpus, self.config.batch_tokens, self.config.seed, (epoch, batch))

    def _catch_up(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Give model and optimizer the shape that they had grown to."""
        try:
            self.growing.resume(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if self.growing.config != self.model.config:
            self.model = HRM(self.growing.config).to(self.world.device)
            self.optimizer = make_optimizer(self.config, self.model)

    def _restore(self, path: Path) -> None:
        ours, theirs = self._tensors(), shapes_of(path)
        wrong = sorted(set(ours) ^ set(theirs)) or sorted(n for n in ours if tuple(ours[n].shape) != theirs[n])
        if wrong:
            raise ValueError(
                f"{path}: the state is of another model or optimizer: {wrong[0]} does not fit the run file"
            )
        restore(path, ours)


def make_optimizer(config: TrainConfig, model: HRM) -> optim.Sophia | optim.AdamAtan2 | optim.AdamW:
    """The optimizer that the run file names, over all parameters."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "ema": config.ema or None,
    }
    parameters = model.parameters()
    if config.optimizer == "adamatan2":
        return optim.AdamAtan2(parameters, **options)
    options["eps"] = config.eps
    if config.optimizer == "adamw":
        return optim.AdamW(parameters, **options)
    options["rho"] = config.rho
    return optim.Sophia(parameters, variant=config.optimizer[-1].upper(), **options)


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, once: after that they do what they usually do."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(*_: object) -> None:
        asked.set()
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _shown(metrics: Mapping[str, float]) -> str:
    parts = [f"loss={metrics['loss']:.4f}", f"tok/s={metrics['tokens_per_second']:.0f}", f"K={metrics['horizon']}"]
    if (clipped := metrics.get("clipped_fraction")) is not None:
        parts.append(f"clipped={clipped:.2f}")
    if skipped := metrics.get("skipped"):
        parts.append(f"skipped={skipped}")
    return ", ".join(parts)
