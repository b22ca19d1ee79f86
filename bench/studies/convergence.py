"""How many steps Sophia needs beside AdamW and AdamAtan2: about a million parameters on the reasoning-gym mix of
bench/mix.py, through hrmcore's own trainer.

    python -m bench.studies.convergence runs/out/convergence

Every optimizer's learning rate is swept over the same number of values, each twice the one before, in shorter runs with
seed 0; the best goes on with the seeds. The learning rate is constant after its warm-up, so that a curve's step t is
what a run of t steps would have reached; the held-out loss is that of the averaged weights. Each run's curve is kept as
OUT/curves/NAME.json and not run again; an interrupted run resumes. More curvature for Sophia-G: --curvature-batches
takes every sample over so many batches.

Needs the extras `demo` and `bench`. The last line printed is the JSON; OUT/convergence.png is the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import mix
from hrmcore import optim, plots
from hrmcore.config import HRMConfig
from hrmcore.data.packing import BatchStream, PackedBatch, epoch_batches
from hrmcore.tokenizer import Tokenizer
from hrmcore.train.run_file import TrainConfig
from hrmcore.train.trainer import Trainer

LOWEST_RATES = {"adamw": 5e-4, "adamatan2": 5e-4, "sophia-g": 1.25e-4, "sophia-h": 1.25e-4}
REFERENCE = "adamw"
SETTINGS = ("batch_tokens", "width", "rho", "curvature_every", "curvature_batches")


@dataclass(frozen=True)
class Run:
    """One training run; its name says all that it depends on but the data and the depth."""

    optimizer: str
    rate: float
    seed: int
    steps: int
    batch_tokens: int
    width: int = 128
    rho: float = 0.04
    curvature_every: int = 10
    curvature_batches: int = 1
    betas: tuple[float, float] | None = None  # None: the optimizer's own

    @property
    def name(self) -> str:
        sophia = ""
        if self.optimizer.startswith("sophia"):
            sophia = f"-rho{self.rho:g}-k{self.curvature_every}-c{self.curvature_batches}"
        size = f"{self.batch_tokens}x{self.width}"
        betas = "" if self.betas is None else "-betas{:g},{:g}".format(*self.betas)
        return f"{self.optimizer}-lr{self.rate:g}{sophia}{betas}-{size}-{self.steps}steps-seed{self.seed}"


class Study(Trainer):
    """The trainer, with curvature samples over as many batches as are asked for."""

    curvature_batches = 1

    def _sample_curvature(self, sophia: optim.Sophia, batches: Sequence[PackedBatch], k: int) -> None:
        more = self.curvature_batches - len(batches)
        super()._sample_curvature(sophia, [*batches, *self._others(more)], k)

    def _others(self, count: int) -> list[PackedBatch]:
        """Batches of another order than the training's, a function of the step alone."""
        capacity, seed = self.config.batch_tokens, self.config.seed + 1_000_003
        an_epoch = max(1, sum(1 for _ in epoch_batches(self.corpus.lengths, capacity, seed, 0)) - 1)
        first = self.step * count
        where = [divmod(first + index, an_epoch) for index in range(count)]
        return [next(BatchStream(self.corpus, capacity, seed, position)) for position in where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimizers", default="adamw,adamatan2,sophia-g", help="(adamw,adamatan2,sophia-g)")
    parser.add_argument("--steps", type=int, default=1000, help="of each seed's run (1000)")
    parser.add_argument("--sweep-steps", type=int, default=250, help="of each run of the sweep (250)")
    parser.add_argument("--rates", type=int, default=4, help="learning rates in each sweep (4)")
    parser.add_argument("--seeds", type=int, default=3, help="(3)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a step (4096)")
    parser.add_argument("--width", type=int, default=128, help="hidden size; 128 makes about a million parameters")
    parser.add_argument("--records", type=int, default=40_000, help="to train on (40000)")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between held-out losses (25)")
    parser.add_argument("--rho", type=float, default=0.04, help="Sophia's (0.04)")
    parser.add_argument("--betas", type=float, nargs=2, help="Sophia's (0.965 0.99)")
    parser.add_argument("--curvature-every", type=int, default=10, help="Sophia's k, steps (10)")
    parser.add_argument("--curvature-batches", type=int, default=1, help="of a sample of Sophia's curvature (1)")
    parser.add_argument("--nice", type=int, default=10, help="lowers this process's priority (10)")
    arguments = parser.parse_args()
    if unknown := set(arguments.optimizers.split(",")) - set(LOWEST_RATES):
        parser.error(f"--optimizers: no {', '.join(sorted(unknown))}; choose from {', '.join(LOWEST_RATES)}")
    os.nice(arguments.nice)
    provide_data(arguments.out, arguments.records)
    report = study(arguments)
    print(table(report))
    (arguments.out / "convergence.json").write_text(json.dumps(report, indent=1) + "\n")
    plots.convergence(report, arguments.out / "convergence.png")
    print(json.dumps(report))


def provide_data(out: Path, records: int) -> None:
    if not (out / "data" / "tokenizer").is_dir():
        print(mix.write(out / "data", records, heldout=200), flush=True)


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {key: getattr(arguments, key) for key in SETTINGS}

    def curve(optimizer: str, rate: float, seed: int, steps: int) -> dict[str, list[float]]:
        betas = arguments.betas if optimizer.startswith("sophia") else None
        return curve_of(Run(optimizer, rate, seed, steps, betas=betas, **settings), arguments.out, arguments.eval_every)

    lines = []
    for optimizer in arguments.optimizers.split(","):
        rates = [LOWEST_RATES[optimizer] * 2**index for index in range(arguments.rates)]
        sweep = {rate: curve(optimizer, rate, 0, arguments.sweep_steps) for rate in rates}
        best = min(rates, key=lambda rate: final(sweep[rate]))
        curves = [curve(optimizer, best, seed, arguments.steps) for seed in range(arguments.seeds)]
        lines.append(
            {
                "optimizer": optimizer,
                "sweep": {f"{rate:g}": final(curve) for rate, curve in sweep.items()},
                "learning_rate": best,
                "at_the_edge_of_the_sweep": best in (rates[0], rates[-1]),
                "final": [final(curve) for curve in curves],
                "curves": curves,
            }
        )
    named = {line["optimizer"]: line for line in lines}
    for line in lines:
        for other in named:
            goal = statistics.mean(named[other]["final"])
            line[f"reaches_{other}"] = [reached(curve, goal) for curve in line["curves"]]
    return {"steps": arguments.steps, "betas": arguments.betas, **settings, "lines": lines}


def curve_of(run: Run, out: Path, eval_every: int) -> dict[str, list[float]]:
    """Held-out loss and seconds of training by step; from the file where the run has been before."""
    kept = out / "curves" / f"{run.name}.json"
    if not kept.is_file():
        work = out / "work" / run.name
        trainer = Study(config_of(run, out / "data", work, eval_every))
        trainer.curvature_batches = run.curvature_batches
        trainer.run()
        rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".tmp")
        unfinished.write_text(json.dumps(curve_from(rows)))
        unfinished.rename(kept)
        shutil.rmtree(work)
        print(f"{run.name}: {final(curve_from(rows)):.4f}", flush=True)
    curve: dict[str, list[float]] = json.loads(kept.read_text())
    return curve


def curve_from(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    curve: dict[str, list[float]] = {"step": [], "heldout_loss": [], "seconds": [], "clipped_fraction": []}
    seconds = 0.0
    for row in rows:
        seconds += row["tokens"] / row["tokens_per_second"]
        if "heldout_loss" in row:
            for key in ("step", "heldout_loss"):
                curve[key].append(row[key])
            curve["seconds"].append(seconds)
            curve["clipped_fraction"].append(row.get("clipped_fraction", 0.0))
    return curve


def config_of(run: Run, data: Path, work: Path, eval_every: int) -> TrainConfig:
    width = run.width
    tokenizer = Tokenizer.load(data / "tokenizer")
    model = HRMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers_per_stack=2,
        num_attention_heads=max(1, width // 64),
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eoa,
    )
    sophia = {}
    if run.optimizer.startswith("sophia"):
        sophia = {"rho": run.rho, "curvature_every": run.curvature_every}
    return TrainConfig(
        model=model,
        train_files=(str(data / "train.jsonl"),),
        heldout_files=(str(data / "heldout.jsonl"),),
        tokenizer=str(data / "tokenizer"),
        out=str(work),
        steps=run.steps,
        batch_tokens=run.batch_tokens,
        optimizer=run.optimizer,
        learning_rate=run.rate,
        betas=run.betas,
        warmup_steps=min(50, run.steps // 5),
        schedule="constant",
        seed=run.seed,
        eval_every=eval_every,
        check_records=0,
        save_every=100,
        keep=1,
        **sophia,
    )


def final(curve: dict[str, list[float]]) -> float:
    return curve["heldout_loss"][-1]


def reached(curve: dict[str, list[float]], goal: float) -> dict[str, float] | None:
    """The first step at which the held-out loss is `goal` or less, between evaluations by a straight line; or None."""
    loss = curve["heldout_loss"]
    for index, value in enumerate(loss):
        if value <= goal:
            if index == 0:
                return {key: curve[key][0] for key in ("step", "seconds")}
            share = (loss[index - 1] - goal) / (loss[index - 1] - value)
            before, after = index - 1, index
            return {
                key: curve[key][before] + share * (curve[key][after] - curve[key][before])
                for key in ("step", "seconds")
            }
    return None


def table(report: dict[str, Any]) -> str:
    rows = [f"{'':<11}{'rate':>9}  {'final held-out loss':<30}steps (seconds) to {REFERENCE}'s mean final loss"]
    for line in report["lines"]:
        losses = " ".join(f"{loss:.4f}" for loss in line["final"])
        edge = "*" if line["at_the_edge_of_the_sweep"] else " "
        found = line.get(f"reaches_{REFERENCE}", [])
        steps = ", ".join("never" if r is None else f"{r['step']:.0f} ({r['seconds']:.0f})" for r in found)
        rows.append(f"{line['optimizer']:<11}{line['learning_rate']:>9.3g}{edge} {losses:<30}{steps}")
    rows.append("* the best rate is the first or last of the sweep: widen it with --rates")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
