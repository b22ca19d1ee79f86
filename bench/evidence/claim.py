"""A claim and how it is run: `python -m bench.evidence.NAME OUT --hours 8 --device cpu`, again and again.

OUT holds the data, a folder for each run and report-DATA.json; the same command goes on where the last one stood,
however that ended, and prints the table of what there is. `--table` prints it and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.evidence import data as sets
from bench.evidence import table
from bench.evidence.cell import STEPS, CellTrainer, Cost, Curve, curve_of, folder_of, no_cost, train
from bench.evidence.intervals import MOST_SEEDS
from bench.evidence.queue import Cell, Known, Rule
from hrmcore.config import HRMConfig
from hrmcore.durable import replacing
from hrmcore.tokenizer import Tokenizer
from hrmcore.train.run_file import TrainConfig

Candidate = Mapping[str, Any]

# Of the claims that sweep nothing else; the rule says how they are tried.
RATES: tuple[Candidate, ...] = ({"rate": 4e-3}, {"rate": 2e-3}, {"rate": 8e-3})


@dataclass(frozen=True)
class Scale:
    """How large a claim is run: on a CPU, on a GPU, or as a toy. `rungs` are spends, in steps or FLOPs."""

    data: tuple[str, ...]
    records: int
    heldout: int
    width: int
    layers: int
    batch_tokens: int
    rungs: tuple[float, ...]
    seeds: int = 3
    warmup: int = 50
    eval_every: int = 50
    checked: int = 200  # held-out answers of each validation
    head_dim: int = 32
    device: str = "cpu"
    precision: str = "float32"

    def model(self, vocabulary: Tokenizer, **changes: Any) -> HRMConfig:
        """HRM's, with two cycles of H and three of L, if nothing else is said."""
        width = changes.pop("hidden_size", self.width)
        shape: dict[str, Any] = {
            "vocab_size": vocabulary.vocab_size,
            "eos_token_id": vocabulary.eoa,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_layers_per_stack": self.layers,
            "num_attention_heads": width // self.head_dim,
            "head_dim": self.head_dim,
            "max_position_embeddings": sets.CONTEXT,
        }
        return HRMConfig(**shape | changes)


@dataclass(frozen=True)
class Setting:
    """What a cell's run file follows from."""

    scale: Scale
    arm: str
    candidate: Candidate
    seed: int
    target: float  # spend of its rung; only growth's schedule may follow from it
    data: Path
    vocabulary: Tokenizer

    def config(self, model: HRMConfig, **changes: Any) -> TrainConfig:
        """The run file of every cell, with the changes of this one."""
        scale = self.scale
        options: dict[str, Any] = {
            "train_files": (str(self.data / "train"),),
            "heldout_files": (str(self.data / "heldout"),),
            "tokenizer": str(self.data / "train" / "tokenizer"),
            "out": "",
            "steps": STEPS,
            "batch_tokens": scale.batch_tokens,
            "seed": self.seed,
            "warmup_steps": scale.warmup,
            "schedule": "constant",
            "horizon_first": 5,
            "horizon_last": 5,
            "eval_every": scale.eval_every,
            "check_records": scale.checked,
            "sample_answers": 0,
            "save_every": 4 * scale.eval_every,
            "keep": 1,
            "device": scale.device,
            "precision": scale.precision,
        }
        return TrainConfig(model=model, **options | changes)


@dataclass(frozen=True)
class Claim:
    """What is compared, and with what. `axis` is what rungs are measured in: "step" or "flops"."""

    name: str
    asks: str
    reference: str
    axis: str
    scales: Mapping[str, Scale]
    arms: Mapping[str, tuple[Candidate, ...]]
    config: Callable[[Setting], TrainConfig]
    cost: Cost = no_cost
    trainer: type[CellTrainer] = CellTrainer
    after: Callable[[Study], None] | None = None  # what else is read from the finished cells and printed

    def rule(self, scale: Scale) -> Rule:
        """Raises ValueError where arms have more candidates than others."""
        counts = {len(candidates) for candidates in self.arms.values()}
        if len(counts) != 1:
            raise ValueError(f"{self.name}: every arm has as many candidates, got {sorted(counts)}")
        return Rule(tuple(self.arms), counts.pop(), len(scale.rungs), scale.seeds)


class Study:
    """A claim on one data set, in a folder."""

    def __init__(self, claim: Claim, scale: Scale, data: str, out: Path) -> None:
        self.claim, self.scale, self.name, self.out = claim, scale, data, out
        self.rule = claim.rule(scale)
        self.data = sets.provide(data, out / "data", scale.records, scale.heldout)
        self._vocabulary = Tokenizer.load(self.data / "train" / "tokenizer")
        self._curves: dict[Path, Curve] = {}

    def config(self, cell: Cell) -> TrainConfig:
        """A cell's run file, its folder included."""
        candidate, target = self.claim.arms[cell.arm][cell.candidate], self.scale.rungs[cell.rung]
        setting = Setting(self.scale, cell.arm, candidate, cell.seed, target, self.data, self._vocabulary)
        config = self.claim.config(setting)
        name = f"{self.name}-{cell.arm}-{table.written(candidate)}-seed{cell.seed}"
        return replace(config, out=str(folder_of(self.out, name, config)))

    def curve(self, cell: Cell) -> Curve:
        """What a cell's run has found so far."""
        config = self.config(cell)
        folder = Path(config.out)
        if folder not in self._curves:
            self._curves[folder] = curve_of(folder, config, self.claim.cost)
        return self._curves[folder]

    @property
    def known(self) -> Known:
        """The held-out losses of the cells that are finished."""

        def loss(cell: Cell) -> float | None:
            curve, target = self.curve(cell), self.scale.rungs[cell.rung]
            return curve.at(self.claim.axis, target, "loss") if curve.reaches(self.claim.axis, target) else None

        return loss

    def run(self, deadline: float) -> bool:
        """Train what is not known until the deadline; whether all is known."""
        while (cell := self.rule.next_cell(self.known)) is not None:
            if time.monotonic() >= deadline:
                return False
            config, target = self.config(cell), self.scale.rungs[cell.rung]
            claim = self.claim
            self._curves[Path(config.out)] = train(claim.trainer, config, claim.axis, target, deadline, claim.cost)
            if (loss := self.known(cell)) is not None:
                print(f"{Path(config.out).name}: {loss:.4f} at {target:g}", file=sys.stderr, flush=True)
                self.write()
        self.write()
        return True

    def write(self) -> dict[str, Any]:
        """The report of what there is, also as a file."""
        report = table.report(self)
        with replacing(self.out / f"report-{self.name}.json") as [temporary]:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return report


def main(claim: Claim, arguments: list[str] | None = None) -> None:
    """The command of a claim."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.evidence.{claim.name}",
        description=f"{claim.asks}\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of data, runs and reports; made if it is not there")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long it trains; added to --hours")
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--device", default="cpu", choices=sorted(claim.scales), help="also chooses the size (cpu)")
    parser.add_argument("--data", help="only these sets, separated by commas")
    parser.add_argument("--seeds", type=int, help="of the chosen settings, at the last rung (as many as the rule says)")
    parser.add_argument("--table", action="store_true", help="train nothing; without runs this makes the data alone")
    args = parser.parse_args(arguments)
    scale = claim.scales[args.device]
    if args.seeds is not None:
        if not scale.seeds <= args.seeds <= MOST_SEEDS:
            parser.error(
                f"--seeds: the rule has {scale.seeds}, intervals are of {MOST_SEEDS} at most; got {args.seeds}"
            )
        scale = replace(scale, seeds=args.seeds)
    names = args.data.split(",") if args.data else scale.data
    if unknown := sorted(set(names) - set(sets.SETS)):
        parser.error(f"--data: no {', '.join(unknown)}; choose from {', '.join(sets.SETS)}")
    if not args.table and args.minutes + args.hours <= 0:
        parser.error("say how long it may train: --minutes 10, or --hours 8")
    deadline = time.monotonic() + 60 * args.minutes + 3600 * args.hours
    if scale.device == "cpu" and not args.table:
        os.nice(19 - os.nice(0))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        study = Study(claim, scale, name, args.out)
        if not args.table:
            study.run(deadline)
        print(table.text(study.write()), flush=True)
        if claim.after is not None:
            claim.after(study)
