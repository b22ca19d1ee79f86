"""What to train on this machine within a time budget: a model's size, a batch, a rate and the number of steps.

The size follows from speed that is measured here: a few training steps on the records themselves. The largest model of
SIZES is taken that sees TOKENS_PER_WEIGHT tokens a weight within the budget.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from hrmcore import machine, optim, planner
from hrmcore.config import HRMConfig
from hrmcore.data.packing import BatchStream
from hrmcore.data.records import Corpus
from hrmcore.model import HRM
from hrmcore.train.throughput import tokens_of

SIZES = ((64, 1), (96, 1), (128, 1), (128, 2), (192, 2), (256, 2), (320, 3), (384, 3), (512, 4), (640, 5), (768, 6))
TOKENS_PER_WEIGHT = 9  # the embedded model's run: 18.4 M tokens for 2.06 M parameters
HORIZON = 5  # the gradient horizon of most of a run
MOST_EPOCHS = 40
_SHARE = 0.8  # of the budget that the steps take: validation, states and a busy machine have the rest
_LEAST_STEPS, _USUAL_STEPS = 20, 2000


@dataclass(frozen=True)
class Speed:
    """What was measured: real tokens a second, and of the steps the seconds (median) and tokens (mean)."""

    tokens_per_second: float
    seconds_per_step: float
    tokens_per_step: float


@dataclass(frozen=True)
class Proposal:
    """A run's figures; `epochs`: how often it sees each record, `hours`: what steps and validations should take."""

    model: HRMConfig
    batch_tokens: int
    steps: int
    learning_rate: float
    warmup_steps: int
    ema: float
    precision: str
    device: str
    speed: Speed
    epochs: float
    hours: float


def shape(width: int, layers: int, vocab_size: int, context: int) -> HRMConfig:
    """The model of one of SIZES: heads of 64 channels (32 below width 128), an FFN of 8/3 of the width."""
    head_dim = 64 if width >= 128 else 32
    return HRMConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_layers_per_stack=layers,
        num_attention_heads=width // head_dim,
        head_dim=head_dim,
        max_position_embeddings=context,
    )


def propose(
    corpus: Corpus, vocab_size: int, hours: float, say: Callable[[str], None], seconds: float = 2.0
) -> Proposal:
    """A run of about `hours` on these records. Each measurement takes about `seconds`.

    Raises ValueError when the budget is too short for the smallest model.
    """
    longest = int(corpus.lengths.max())
    context = max(256, 1 << (2 * longest - 1).bit_length())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [shape(width, layers, vocab_size, context) for width, layers in SIZES]
    middle = models[len(models) // 3]
    say("measuring this machine's speed on these records")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 1.5 * cores:
        say(f"it is busy (load {load:.0f} on {cores} cores): the proposal will be small; better wait until it is free")
    batch = _multiple(max(2048, longest))
    speeds = {kind: measured(middle, corpus, batch, kind, device, seconds) for kind in ("float32", "bfloat16")}
    precision = max(speeds, key=lambda kind: speeds[kind].tokens_per_second * (1.1 if kind == "float32" else 1.0))
    rate = speeds[precision].tokens_per_second * flops_a_token(middle, corpus)
    budget = 3600 * hours * _SHARE
    chosen = _largest(models, corpus, budget * rate, precision, device)
    while True:  # a smaller model reaches less of the machine's speed than the one that was measured
        model = models[chosen]
        guess = budget * rate / flops_a_token(model, corpus)
        batch = _multiple(max(longest, min(max(1024, guess / _USUAL_STEPS), 8192 if device == "cpu" else 65536)))
        speed = measured(model, corpus, batch, precision, device, seconds)
        if chosen == 0 or budget * speed.tokens_per_second >= 0.8 * TOKENS_PER_WEIGHT * planner.parameters(model):
            break
        chosen -= 1
    steps = int(budget / speed.seconds_per_step)
    if steps < _LEAST_STEPS:
        least = _LEAST_STEPS * speed.seconds_per_step / _SHARE / 3600
        raise ValueError(f"{hours:g} hours are {steps} steps of the smallest model; give at least --hours {least:.2g}")
    most = math.ceil(MOST_EPOCHS * int(corpus.lengths.sum()) / speed.tokens_per_step)
    steps = _rounded(min(steps, max(most, _LEAST_STEPS)))
    return Proposal(
        model=model,
        batch_tokens=batch,
        steps=steps,
        learning_rate=_two_digits(min(4e-3, 2e-3 * math.sqrt(192 / model.hidden_size))),
        warmup_steps=max(10, steps // 25),
        ema=_average(steps),
        precision=precision,
        device=device,
        speed=speed,
        epochs=steps * speed.tokens_per_step / int(corpus.lengths.sum()),
        hours=steps * speed.seconds_per_step / _SHARE / 3600,
    )


def flops_a_token(model: HRMConfig, corpus: Corpus) -> float:
    """Training FLOPs of a token of these records at the horizon of most of a run."""
    prompt, length = float(corpus.prefix.mean()), float(corpus.lengths.mean())
    record = planner.Record(prompt, max(0.0, length - prompt))
    return planner.training_flops(model, HORIZON, 1.0, record.supervised, record.pairs).total


def measured(model: HRMConfig, corpus: Corpus, batch_tokens: int, precision: str, device: str, seconds: float) -> Speed:
    """The speed of training steps of this model on these records; the first two steps do not count."""
    torch.manual_seed(0)
    hrm = HRM(model).to(device)
    optimizer = optim.AdamW(hrm.parameters(), ema=0.999)
    stream = BatchStream(corpus, batch_tokens, seed=0)
    times: list[float] = []
    tokens: list[int] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 100):
        started = time.perf_counter()
        batch = next(stream)
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False, enabled=precision == "bfloat16"):
            loss = hrm.loss(batch.to(torch.device(device)), horizon=HORIZON) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - started)
        tokens.append(tokens_of([batch]))
    step, mean = median(times[2:]), sum(tokens) / len(tokens)
    return Speed(mean / step, step, mean)


def _largest(models: list[HRMConfig], corpus: Corpus, flops: float, precision: str, device: str) -> int:
    """The number of the largest model that sees enough tokens within the FLOPs and half of the free memory."""
    free = machine.available_memory(torch.device(device)) / 2
    fitting = [
        number
        for number, model in enumerate(models)
        if flops / flops_a_token(model, corpus) >= TOKENS_PER_WEIGHT * planner.parameters(model)
        and planner.memory(model, HORIZON, 8192, 1.0, 1, precision).peak <= free
    ]
    return max(fitting, default=0)


def _multiple(tokens: float) -> int:
    return math.ceil(tokens / 256) * 256


def _rounded(steps: int) -> int:
    return steps if steps < 100 else steps // 10 * 10


def _two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")


def _average(steps: int) -> float:
    """The decay with which the averaged weights go back over about a twentieth of the run."""
    return float(f"{min(0.9999, max(0.9, 1 - 20 / steps)):.3g}")


def run_file(proposal: Proposal, records: int, train: Path, heldout: Path | None, out: Path) -> str:
    """The commented run file. `records` are the training records of the store at `train`."""
    p, model = proposal, proposal.model
    tokens, speed = p.steps * p.speed.tokens_per_step, p.speed
    every = max(1, p.steps // 8)
    shape_keys = ("hidden_size", "intermediate_size", "num_layers_per_stack", "num_attention_heads", "head_dim")
    values = dataclasses.asdict(model)
    lines = [
        "# Written by `hrmcore init`; `hrmcore train --explain` explains every key.",
        f"train_files = [{_text(train)}]  # {records} records; their tokenizer has {model.vocab_size} tokens",
        *([f"heldout_files = [{_text(heldout)}]  # never trained on"] if heldout else []),
        f"out = {_text(out)}",
        "",
        f"# Measured here: {speed.tokens_per_second:,.0f} tokens/s, so {p.steps} steps take about {_span(p.hours)}.",
        f"# They see {tokens:,.0f} tokens, each record {p.epochs:.1f} times.",
        f"steps = {p.steps}",
        f"batch_tokens = {p.batch_tokens}",
        'optimizer = "adamw"',
        f"learning_rate = {p.learning_rate:g}  # by rule, not by search: 2e-3 at width 192, less when wider",
        f"warmup_steps = {p.warmup_steps}",
        f"ema = {p.ema:g}  # the averaged weights are what is checked and exported",
        f'precision = "{p.precision}"  # the faster one here',
        f'device = "{p.device}"',
        f"eval_every = {every}",
        f"save_every = {every}",
        "",
        f"# {planner.parameters(model):,} parameters: {tokens / planner.parameters(model):.2g} tokens for each.",
        "[model]",
        *(f"{key} = {values[key]}" for key in shape_keys),
        f"max_position_embeddings = {model.max_position_embeddings}  # tokens of the longest question with its answer",
    ]
    return "\n".join(lines) + "\n"


def _text(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _span(hours: float) -> str:
    return f"{60 * hours:.2g} minutes" if hours < 1 else f"{hours:.2g} hours"
