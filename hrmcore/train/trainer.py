"""Training: a run file in, a run folder out (metrics, training states, hrm_text checkpoint)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from hrmcore import optim
from hrmcore.checkpoint.host_copies import CudaSide, Side
from hrmcore.checkpoint.training_state import StateWriter, find_newest, lock, read_metadata, verify
from hrmcore.data.packing import Ahead, BatchStream, Bookmark, PackedBatch, epoch_batches, pack, share
from hrmcore.data.records import Corpus
from hrmcore.data.store import load_corpus
from hrmcore.distributed import fsdp
from hrmcore.distributed.world import World
from hrmcore.engine.runner import Runner
from hrmcore.growth.stages import GrowthSchedule
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer
from hrmcore.train import curvature, export, fault, resume, validation
from hrmcore.train.captured import CapturedSteps
from hrmcore.train.early_stopping import EarlyStopping
from hrmcore.train.heartbeat import Heartbeat
from hrmcore.train.interruption import Interruption, StepAbandoned
from hrmcore.train.metrics import Metrics, shown
from hrmcore.train.optimizers import make_optimizer
from hrmcore.train.resume import Progress
from hrmcore.train.run_file import TrainConfig, ema_decay, horizon, learning_rate
from hrmcore.train.throughput import Throughput, growth_flops, memory_needed, supervised_of, tokens_of


class Trainer:
    """One run: model, optimizer, data position. `run()` trains to the end and exports the checkpoint.

    It holds the run folder's lock until `run` or `close` ends. A run without a state of its own begins where the state
    at the path `start` stands, if one is given. Raises BlockingIOError when another run holds the lock. Under torchrun
    each process makes a Trainer: together they compute what one alone would, and only rank 0 writes.
    """

    def __init__(self, config: TrainConfig, start: Path | None = None) -> None:
        self.config = config
        self._start = start
        self.out = Path(config.out)
        self.world = World(config.device)
        self._held = contextlib.ExitStack()
        self._held.callback(self.world.close)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.world.is_main:
                self._held.enter_context(lock(self.out))
            self._heart = self._held.enter_context(Heartbeat(self._say))
            self._prepare()
        except BaseException:
            self._held.close()
            raise

    def _prepare(self) -> None:
        config = self.config
        self._sharded = config.parallel == "sharded" and self.world.ranks > 1
        self._interruption = Interruption()
        self._captured: CapturedSteps | None = None
        self._step_seconds = math.inf  # of the last step; what is not known may be long
        self._heart.at("reading the data")
        self._load_data()
        self.growing = GrowthSchedule(config.grow, config.model, config.seed)
        self._growth_flops = self._cost_of_growing() if config.grow else {}
        self._say(memory_needed(config, self.growing.largest, self.corpus, self.world))
        self._heart.at("making the model")
        self.model = resume.first_model(config).to(self.world.device)
        if self._sharded:
            fsdp.shard(self.model, self.world, config.precision)
        self.optimizer = self._new_optimizer(config)
        self._throughput = Throughput(self.world, config.precision, config.lora)
        self._begin_at(Progress(step=0, tokens=0, skipped=0, typical_loss=None, position=(0, 0)))
        self._saved = -1  # the step of the newest state
        self._stopping = EarlyStopping(config.patience)
        sharded = config.parallel == "sharded"  # of one process, too: the state is a folder with one shard
        group = self.world.group() if sharded else None
        self._writer = StateWriter(self.out, config.keep, config.keep_every, sharded, group, self._side())
        with self.world.main_first():  # it compares checksums and sets damaged states aside
            newest = find_newest(self.out, self._say, contents=self.world.is_main)
        if newest is None and self._start is not None:
            newest = self._start, (verify(self._start)[1] if self.world.is_main else read_metadata(self._start))
        if newest:
            self._resume(*newest)
        self.world.assert_same_on_all_ranks(repr(config) + json.dumps(self._metadata()))
        self._metrics: Metrics | None = None
        if self.world.is_main:
            resume.keep_tokenizer(config.tokenizer, self.out)
            self._metrics = Metrics(self.out, self.step, config.log, dataclasses.asdict(config))
            self._held.callback(self._metrics.close)
        self._heart.rest()

    def _side(self) -> Side | None:
        """What copies states beside the steps; the CPU has nothing beside them."""
        return CudaSide(self.world.device) if self.world.device.type == "cuda" else None

    def _new_optimizer(self, config: TrainConfig) -> Any:
        """The run file's, over the model as it is now. A study of others has them from here."""
        return make_optimizer(config, self.model)

    def _load_data(self) -> None:
        config, context = self.config, self.config.model.max_position_embeddings
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self.corpus, checksum = load_corpus(config.train_files, self.tokenizer, context, self._say)
        if config.objective == "all":
            self.corpus = self.corpus.with_loss_on_all()
        self._fingerprint = resume.fingerprint_of(config, self.corpus, checksum)
        self.validation: Corpus | None = None
        if config.heldout_files:
            self.validation, _ = load_corpus(config.heldout_files, self.tokenizer, context, self._say)

    def _begin_at(self, progress: Progress) -> None:
        """Stand where a run stood; the stream of batches goes on from there."""
        self.step, self.tokens, self.skipped = progress.step, progress.tokens, progress.skipped
        self.typical_loss = progress.typical_loss  # a running mean
        self._stream = self._stream_at(progress.position, progress.bookmark)

    def _stream_at(self, position: tuple[int, int], bookmark: Bookmark) -> BatchStream | Ahead:
        """Beside a GPU the next batch is packed while it computes."""
        if isinstance(before := getattr(self, "_stream", None), Ahead):
            before.close()
        stream = BatchStream(self.corpus, self.config.batch_tokens, self.config.seed, position, bookmark)
        return Ahead(stream) if self.world.device.type == "cuda" else stream

    def run(self) -> None:
        """Train until `steps`, then write checkpoint/ in the hrm_text format.

        Ctrl-C or SIGTERM ends the run after the current step, with a state; a step of more than a second is abandoned
        at once, and the state is the one before it. A second one ends it at once, without.
        """
        try:
            with self._interruption.heard():
                self._train()
                self._heart.at("writing a state")
                self.save()
                self._writer.finish()
                if self.step < self.config.steps and not self._stopping.exhausted:
                    raise KeyboardInterrupt
                self._heart.at("writing the checkpoint")
                self.export()
        finally:
            self.close()

    def _train(self) -> None:
        config = self.config
        is_main, asked, stopping = self.world.is_main, self._interruption.asked, self._stopping
        with tqdm(total=config.steps, initial=self.step, unit="step", disable=None if is_main else True) as bar:
            while self.step < config.steps and not stopping.exhausted and not self.world.sum(asked.is_set()):
                self._heart.at(f"step {self.step + 1} of {config.steps}")
                try:
                    metrics = self._train_step()
                except StepAbandoned:
                    if self.step == 0:
                        self._saved = 0  # nothing was done that a state could keep
                    break
                due = self.step % config.eval_every == 0 or self.step == config.steps
                if due and (is_main or self._sharded):
                    self._heart.at(f"validation after step {self.step}")
                    metrics |= self.evaluate()
                    self._show_answers()
                better = due and config.patience > 0 and self._judge(metrics)
                if self._metrics is not None:
                    self._metrics.record(metrics)
                bar.update()
                bar.set_postfix_str(shown(metrics))
                self._writer.check()
                kept = config.keep_every and self.step % config.keep_every == 0
                if better or kept or self.step % config.save_every == 0:
                    self.save()
        if stopping.exhausted:
            self._say(f"no better validation in {stopping.waited}: the best was that after step {stopping.step}")

    def _judge(self, metrics: Mapping[str, float]) -> bool:
        """Whether this validation is the best so far; every rank hears the main one's loss."""
        return self._stopping.judge(self.step, self.world.sum(metrics["heldout_loss"] if self.world.is_main else 0.0))

    def close(self) -> None:
        """Wait for the state under way and give the run folder back."""
        try:
            self._writer.finish()
        finally:
            if isinstance(self._stream, Ahead):
                self._stream.close()
            self._held.close()

    def export(self) -> None:
        """Write the averaged weights as an hrm_text checkpoint, with [lora] adapter/ as well; rank 0 does.

        With `patience` they are those of the best validation.
        """
        folder, best = self.out / "checkpoint", self._stopping.best
        if best is not None and not export.has_state(self.out, best):
            self._say(f"{self.out}: the state after step {best}, the best, is gone; the last is exported")
            best = None
        if best is None or best == self.step:
            with self._averaged():
                model = fsdp.gathered(self.model, self.world, torch.bfloat16) if self._sharded else self.model
                if self.world.is_main and model is not None:
                    export.write_checkpoint(self.config, model, self.out)
        elif self.world.is_main:
            model = export.model_after(self.config, self.out, best, self.model)
            export.write_checkpoint(self.config, model, self.out)
            self._say(f"{folder}: of step {best}, the best validation")
        if self.config.lora:
            self._say(f"{self.out / 'adapter'}: the adapter, for peft; it is merged into the model")
        self._say(f"{folder}: the model, for hrmcore generate, eval, inspect and grow")
        self._say(f"next: hrmcore repl {folder}")

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and share of right answers, of the averaged weights; empty without held-out records."""
        if self.validation is None:
            return {}
        checked, batch_tokens = self.config.check_records, self.config.batch_tokens
        with self._precision(), self._averaged():
            found = {"heldout_loss": validation.mean_loss(self.model, self.validation, batch_tokens)}
            if checked:
                right = validation.exact_matches(self.model, self.validation, checked, batch_tokens)
                found["heldout_exact"] = right
        return found

    def _show_answers(self) -> None:
        """A few held-out answers of the averaged weights, on the terminal and in samples.jsonl."""
        count = self.config.sample_answers
        if self.validation is None or not count:
            return
        with self._precision(), self._averaged():
            answers = validation.sample_answers(self.model, self.validation, count, self.tokenizer, self._decoder())
        samples: list[dict[str, Any]] = [{"step": self.step, **answer} for answer in answers]
        for answer in answers:
            keys = ("answer", "expected", "instruction")
            said, expected, asked = (validation.shortened(answer[key]) for key in keys)
            self._say(f"step {self.step}: {asked} -> {said}" + ("" if said == expected else f" (expected {expected})"))
        if self._metrics is not None:
            self._metrics.record_samples(samples)

    def _decoder(self) -> Runner | None:
        """What decodes them on a GPU, in the precision of the run; None: whole passes of the model do."""
        config = self.config
        fits = config.precision == "bfloat16" and not self._sharded and config.lora is None
        return validation.decoder_of(self.model) if fits and self.world.device.type == "cuda" else None

    # One step

    def _train_step(self) -> dict[str, float]:
        """Growth where it is due, gradients, then the update, or none if a figure is faulty; returns the metrics."""
        grown = self._grow() if self.growing.due(self.tokens) else {}
        started, position, bookmark = time.perf_counter(), self._stream.position, self._stream.bookmark
        batches = [next(self._stream) for _ in range(self.config.accumulate)]
        rate, k = self._follow_schedules()
        try:
            # The ranks must agree on what they compute together: one alone may not leave.
            with self._interruption.abandonable(self._step_seconds if self.world.ranks == 1 else 0.0):
                loss, norm, scale = self._backward(batches, k)
        except StepAbandoned:
            self.optimizer.zero_grad(set_to_none=True)
            self._stream = self._stream_at(position, bookmark)
            raise
        self._writer.hold()  # until here a step only reads what a state holds
        if wrong := fault.wrong(loss, norm, self.config.spike_factor, self.typical_loss):
            self._skip_or_stop(batches, wrong)
        else:
            self._update(batches, k, scale)
            self.typical_loss = loss if self.typical_loss is None else 0.98 * self.typical_loss + 0.02 * loss
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens_of(batches)
        self.growing.advance(self.model, self.step)
        metrics = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "horizon": k,
            "grad_norm": norm,
            "tokens": tokens_of(batches),
            "supervised_tokens": supervised_of(batches),
            "tokens_seen": self.tokens,
            **self._skipped_and_clipped(),
        }
        self._step_seconds = seconds = time.perf_counter() - started
        return metrics | self._throughput.of(self.model.config, k, batches, seconds) | grown

    def _follow_schedules(self) -> tuple[float, int]:
        """Give the optimizer what the schedules say of this step; returns the learning rate and the horizon."""
        config = self.config
        rate = learning_rate(config, self.step) * self.growing.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"], group["ema"] = rate, ema_decay(config, self.step)
        return rate, horizon(config, self.step)

    def _skipped_and_clipped(self) -> dict[str, float]:
        """Figures that a run has only with on_nonfinite = "skip", or with Sophia."""
        figures: dict[str, float] = {}
        if self.config.on_nonfinite == "skip":
            figures["skipped"] = self.skipped
        if isinstance(self.optimizer, optim.Sophia):
            clipped, stepped = (self.world.sum(count) for count in self.optimizer.clipped)
            figures["clipped_fraction"] = clipped / stepped if stepped else math.nan
        return figures

    def _grow(self) -> dict[str, float]:
        """Make the model and the optimizer larger, once the state before it is on the disk."""
        self.save()
        self._writer.finish()
        self.model, self.optimizer, report = self.growing.grow(self.model, self.optimizer, self._fixed_loss, self.step)
        return report | self._growth_flops

    def _fixed_loss(self, model: HRM) -> float:
        """The mean loss on the first batch of an order of its own, in float32."""
        records = next(iter(epoch_batches(self.corpus.lengths, self.config.batch_tokens, seed=0, epoch=0)))
        batch = pack(self.corpus, records)
        with torch.no_grad():
            return float(model.loss(batch)) / len(batch.targets)

    def _backward(self, batches: Sequence[PackedBatch], k: int) -> tuple[float, float, Tensor]:
        """Gradients of the mean loss over all supervised tokens of the batches.

        Returns that loss, the gradients' norm, and the factor (1) that would clip them, for the optimizer.
        """
        count = supervised_of(batches)
        losses = [self._add_gradients(batch, k, count) for batch in self._shares(batches)]
        self._sum_gradients()
        if self._sharded:
            norm = torch.full((), fsdp.gradient_norm(self.model.parameters(), self.world), device=self.world.device)
        else:
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0).reshape(1)  # as torch's clip_grad_norm_ has it
        # One read of all figures: on a GPU the host waits for the step's work only here.
        figures = torch.stack([*losses, norm]).tolist()
        return self.world.sum(sum(figures[:-1])), figures[-1], scale

    def _add_gradients(self, batch: PackedBatch, k: int, count: int) -> Tensor:
        """Those of one batch's loss over `count`; returns that loss."""
        config = self.config
        if config.cuda_graphs:
            if self._captured is None or self._captured.model is not self.model:  # it has grown
                self._captured = CapturedSteps(self.model, config.batch_tokens, config.recompute, self._precision)
            return self._captured.backward(batch, k, count)
        with self._precision():
            loss = self.model.loss(batch, horizon=k, recompute=config.recompute) / count
        loss.backward()
        return loss.detach()

    def _sum_gradients(self) -> None:
        """After backward: sum over all ranks; gradients of a sharded model were summed on the way."""
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
                shares.append(fsdp.dummy_batch(self.corpus, batch))
        return shares

    def _update(self, batches: Sequence[PackedBatch], k: int, scale: Tensor) -> None:
        """The optimizer's step, and every so often a sample of the curvature for the steps that follow."""
        if not isinstance(self.optimizer, optim.Sophia):
            self.optimizer.step(grad_scale=scale)
            return
        self.optimizer.step(grad_scale=scale, batch_tokens=1 if self.optimizer.variant == "G" else None)
        if self.step % (self.config.curvature_every or 1) == 0:
            try:
                self._sample_curvature(self.optimizer, batches, k)
            except FloatingPointError as error:  # the step is taken; the estimate stays as it was
                self._skip_or_stop(batches, str(error))

    def _sample_curvature(self, sophia: optim.Sophia, batches: Sequence[PackedBatch], k: int) -> None:
        seed = self.config.seed
        if sophia.variant == "H":  # the ranks would need one direction and the sum of their products: each does it all
            generator = curvature.generator_of(seed, self.step, device=self.world.device)
            curvature.hutchinson(sophia, self.model, batches, k, generator)
            return
        sophia.zero_grad(set_to_none=True)
        labels = supervised_of(batches)
        generator = curvature.generator_of(seed, self.step, self.world.rank, self.world.device)
        with self._precision():
            shares, recompute = self._shares(batches), self.config.recompute
            curvature.gauss_newton_bartlett(self.model, shares, labels, k, generator, recompute)
        self._sum_gradients()
        sophia.update_hessian()

    def _skip_or_stop(self, batches: Sequence[PackedBatch], what: str) -> None:
        """Count a faulty step or curvature sample, or raise FloatingPointError that says where it may come from."""
        if self.config.on_nonfinite == "skip":
            self.skipped += 1
            return
        records = [record for batch in batches for record in batch.records]
        guilty = [record for record in records if not math.isfinite(self._loss_of(record))]
        rate, largest = self.config.learning_rate, fault.largest_weight(self.model, self.world)
        causes = fault.causes(records, guilty, self.corpus.describe, rate, largest)
        raise FloatingPointError(
            f"step {self.step}: {what}; {causes}; {self._first_op(batches, guilty)}the states before are intact"
        )

    def _first_op(self, batches: Sequence[PackedBatch], guilty: Sequence[int]) -> str:
        """Which op first gives what is not finite, on a guilty record or the batch; not for shards, which are parts."""
        if self._sharded:
            return ""
        shares = [pack(self.corpus, guilty[:1])] if guilty else self._shares(batches[:1])
        if not shares:
            return ""
        with self._precision():
            op = fault.first_op(self.model, shares[0], horizon(self.config, self.step))
        return f"{op}; " if op else ""

    def _loss_of(self, record: int) -> float:
        with torch.no_grad(), self._precision():
            return float(self.model.loss(pack(self.corpus, [record])))

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        # Without the cache: torch would keep the bfloat16 copy of a weight from a visit without autograd, and gradients
        # of later visits would end at that copy.
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, cache_enabled=False)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        self._writer.hold()  # weights and averages change places
        with self.optimizer.swap_ema() if self.config.ema else nullcontext():
            yield
            if self._sharded:
                fsdp.reshard(self.model)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line, file=sys.stderr)

    def _cost_of_growing(self) -> dict[str, float]:
        """FLOPs of the run with its growths, and of its last model from scratch; said before the run starts."""
        schedule, from_scratch = growth_flops(self.config, self.growing, self.corpus)
        part = f"{schedule / from_scratch:.0%} of its last model from scratch"
        self._say(f"the schedule with its growths takes {schedule:.3g} FLOPs, {part}")
        return {"growth_flops": schedule, "from_scratch_flops": from_scratch}

    # States

    def save(self) -> None:
        """Begin to write the training state of this step; `run` and `close` wait for its end."""
        if self.step == self._saved:
            return
        self._saved = self.step
        if self.world.is_main or self._sharded:
            self._writer.save(self.step, self._tensors(), self._metadata(), self._stopping.best)

    def _tensors(self) -> dict[str, Tensor]:
        return resume.tensors_of(self.model, self.optimizer)

    def _metadata(self) -> dict[str, str]:
        stream = self._stream
        progress = Progress(self.step, self.tokens, self.skipped, self.typical_loss, stream.position, stream.bookmark)
        more = self.growing.metadata() | self._stopping.metadata()
        return resume.metadata_of(progress, self.config, more, self._fingerprint)

    def _resume(self, path: Path, metadata: Mapping[str, str]) -> None:
        config = resume.as_trained(self.config, metadata)
        resume.check_same_run(path, metadata, config.optimizer, self._fingerprint)
        if config != self.config:
            self.config, self.optimizer = config, self._new_optimizer(config)
            self._say(f"{path}: was trained with the paper's form of AdamAtan2, and the run goes on with it")
        self._catch_up(path, metadata)
        resume.restore_tensors(path, self._tensors())
        self._begin_at(Progress.read(metadata))
        if path != self._start:  # of another folder, where the best state would be, too
            self._stopping, self._saved = EarlyStopping.read(self.config.patience, metadata), self.step
        self._say(f"going on after step {self.step} of {self.config.steps}, where {path} stands")

    def _catch_up(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Give model and optimizer the shape that they had grown to."""
        try:
            self.growing.resume(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if self.growing.config != self.model.config:
            self.model = HRM(self.growing.config).to(self.world.device)
            self.optimizer = self._new_optimizer(self.config)
