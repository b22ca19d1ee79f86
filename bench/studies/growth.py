"""Does growing pay? A run that begins small and grows twice, against the last size from scratch on the same tokens.

    python -m bench.studies.growth DATA OUT --tokens 1000000

DATA holds train.jsonl, heldout.jsonl and tokenizer/, as bench/mix.py or runs/tiny_data.py write them. Both arms get
the same learning rates to choose from, tried with the first seed; the best one, by the last held-out loss, is then run
with the other seeds. Every run is an ordinary `hrmcore train` in a folder of OUT: what is finished is not run again,
and what was stopped goes on. FLOPs are the planner's, seconds those of the steps, other jobs' share included.
`--factor` adds an arm that multiplies each tensor's learning rate by what growing multiplied the tensor by, which
Adam's step would otherwise not see. `--toy` is a minute's check that the bench works; it needs no DATA.

Writes OUT/growth.json and OUT/growth.png (extra `bench`); the last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hrmcore import plots
from hrmcore.data.packing import PackedBatch
from hrmcore.growth.operators import kind_of
from hrmcore.tokenizer import train_tokenizer
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

# width : ffn : layers of a stack : heads of 64. With 512 words 0.27, 0.95 and 5.2 M parameters.
SIZES = "64:160:2:1,128:320:2:2,256:640:3:4"
KEYS = ("hidden_size", "intermediate_size", "num_layers_per_stack", "num_attention_heads")


class FactorTrainer(Trainer):
    """Each tensor's learning rate is multiplied by what all growths so far have multiplied its old entries by."""

    def _update(self, batches: Sequence[PackedBatch], k: int, scale: Tensor) -> None:
        groups = self.optimizer.param_groups
        if len(groups) == 1:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            alone = groups.pop()
            for power in (-1, 0, 1):
                params = [p for p in alone["params"] if kind_of(names[p]).power == power]
                groups.append({**alone, "params": params, "power": power})
        s = math.sqrt(self.model.config.hidden_size / self.config.model.hidden_size)
        for group in groups:
            group["lr"] *= s ** group["power"]
        super()._update(batches, k, scale)


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens."""

    name: str
    grows: bool
    trainer: type[Trainer]


ARMS = [Arm("scratch", False, Trainer), Arm("grown", True, Trainer)]
FACTOR = Arm("grown, lr factor", True, FactorTrainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DATA OUT", help="with --toy OUT alone")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of every run, about (1000000)")
    parser.add_argument("--sizes", default=SIZES, help=f"width:ffn:layers:heads of each stage ({SIZES})")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--fractions", default="0.3,0.6", help="of the tokens, where it grows (0.3,0.6)")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3", help="learning rates to choose from (1e-3,2e-3,4e-3)")
    parser.add_argument("--optimizer", default="adamatan2")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16 (float32)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--evaluations", type=int, default=40, help="held-out losses of a run (40)")
    parser.add_argument("--warmup", type=int, default=50, help="warm-up steps, at the start and after a growth (50)")
    parser.add_argument("--factor", action="store_true", help="add the arm with a learning rate factor")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if len(args.folders) != (1 if args.toy else 2):
        parser.error("give DATA and OUT, or --toy and OUT")
    out = args.folders[-1]
    out.mkdir(parents=True, exist_ok=True)
    if args.toy:
        make_toy(args, out / "data")
    report = measure(args, args.folders[0] / "data" if args.toy else args.folders[0], out)
    (out / "growth.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    plots.growth(report, out / "growth.png")
    print(table(report))
    print(json.dumps(report))


def measure(args: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    """Run what is not finished; everything that the table and the picture show."""
    rates = [float(rate) for rate in args.rates.split(",")]
    arms = []
    for arm in [*ARMS, FACTOR] if args.factor else ARMS:
        tried = {rate: curve_of(arm, args, data, out, rate, seed=0) for rate in rates}
        best = min(tried, key=lambda rate: tried[rate]["losses"][-1])
        others = [curve_of(arm, args, data, out, best, seed) for seed in range(1, args.seeds)]
        swept = {f"{rate:g}": curve["losses"][-1] for rate, curve in tried.items()}
        arms.append({"name": arm.name, "rate": best, "swept": swept, "curves": [tried[best], *others]})
    scratch = arms[0]
    for arm in arms:
        pairs = list(zip(arm["curves"], scratch["curves"], strict=True))
        arm["final_losses"] = [curve["losses"][-1] for curve in arm["curves"]]
        arm["flops_share"] = [mine["flops"][-1] / theirs["flops"][-1] for mine, theirs in pairs]
        arm["flops_to_scratch_loss"] = [reached(mine, theirs, "flops") for mine, theirs in pairs]
        arm["seconds_to_scratch_loss"] = [reached(mine, theirs, "seconds") for mine, theirs in pairs]
    keys = ("tokens", "sizes", "fractions", "rates", "optimizer", "precision", "seeds", "batch_tokens", "warmup")
    return {"settings": {key: getattr(args, key) for key in keys}, "arms": arms}


def reached(curve: dict[str, Any], scratch: dict[str, Any], of: str) -> float | None:
    """Where a run first is at the last loss of the one from scratch, as a share of what that took; None: nowhere."""
    for spent, loss in zip(curve[of], curve["losses"], strict=True):
        if loss <= scratch["losses"][-1]:
            return spent / scratch[of][-1]
    return None


def curve_of(arm: Arm, args: argparse.Namespace, data: Path, out: Path, rate: float, seed: int) -> dict[str, Any]:
    """The held-out losses of a run with what had been spent by then; the run is made if it is not there."""
    name = f"{arm.name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    path = out / f"{name}.toml"
    path.write_text(run_file(arm, args, data, out / name, rate, seed), encoding="utf-8")
    config = read_config(path)
    metrics = out / name / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if not (rows and rows[-1]["step"] == config.steps and (out / name / "checkpoint" / "config.json").exists()):
        trainer = arm.trainer(config)
        trainer.run()
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return curve_from(rows)


def curve_from(rows: list[dict[str, float]]) -> dict[str, Any]:
    curve: dict[str, Any] = {"flops": [], "seconds": [], "tokens": [], "losses": []}
    flops = seconds = 0.0
    for row in rows:
        flops, seconds = flops + row["flops"], seconds + row["tokens"] / row["tokens_per_second"]
        if "heldout_loss" in row:
            for key, value in (("flops", flops), ("seconds", seconds), ("tokens", row["tokens_seen"])):
                curve[key].append(value)
            curve["losses"].append(row["heldout_loss"])
    return curve


def run_file(arm: Arm, args: argparse.Namespace, data: Path, folder: Path, rate: float, seed: int) -> str:
    """The run of one arm, one rate and one seed, as TOML."""
    shapes = [dict(zip(KEYS, map(int, size.split(":")), strict=True)) for size in args.sizes.split(",")]
    steps = max(1, args.tokens // args.batch_tokens)
    lines = [
        f"train_files = [{json.dumps(str(data / 'train.jsonl'))}]",
        f"heldout_files = [{json.dumps(str(data / 'heldout.jsonl'))}]",
        f"tokenizer = {json.dumps(str(data / 'tokenizer'))}",
        f"out = {json.dumps(str(folder))}",
        f"steps = {steps}\nbatch_tokens = {args.batch_tokens}\nlearning_rate = {rate}\nwarmup_steps = {args.warmup}",
        f"optimizer = {json.dumps(args.optimizer)}\nprecision = {json.dumps(args.precision)}",
        f"seed = {seed}\ncheck_records = 0",
        f"eval_every = {max(1, steps // args.evaluations)}\nsave_every = {max(1, steps // 10)}",
        f"[model]\nhead_dim = {args.head_dim}",
        *(f"{key} = {size}" for key, size in shapes[0 if arm.grows else -1].items()),
    ]
    for fraction, shape in zip(args.fractions.split(","), shapes[1:], strict=True) if arm.grows else ():
        lines.append(f"[[grow]]\nat_tokens = {int(float(fraction) * args.tokens)}\nwarmup_steps = {args.warmup}")
        lines += [f"{key} = {size}" for key, size in shape.items()]
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> str:
    rows = [f"{'':<18}{'rate':>7}{'held-out loss':>20}{'FLOPs':>8}{'FLOPs to scratch':>18}{'seconds to scratch':>20}"]
    for arm in report["arms"]:
        losses = arm["final_losses"]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows.append(
            f"{arm['name']:<18}{arm['rate']:>7g}{statistics.mean(losses):>12.4f} ± {spread:.4f}"
            f"{statistics.mean(arm['flops_share']):>8.0%}{shown(arm['flops_to_scratch_loss']):>18}"
            f"{shown(arm['seconds_to_scratch_loss']):>20}"
        )
    return "\n".join(
        [*rows, "shares are of the run from scratch with the same seed; goal: its loss at 60% of its FLOPs"]
    )


def shown(shares: list[float | None]) -> str:
    """Mean over the seeds that got there, and how many did."""
    there = [share for share in shares if share is not None]
    if not there:
        return f"never (of {len(shares)})"
    return f"{statistics.mean(there):.0%} ({len(there)} of {len(shares)})"


def make_toy(args: argparse.Namespace, data: Path) -> None:
    """Data and settings that take seconds."""
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
    records = [{"instruction": f"repeat {a} {b}", "response": f"{a} {b}"} for a in words for b in words]
    data.mkdir(exist_ok=True)
    for name in ("train", "heldout"):
        lines = [json.dumps(record) + "\n" for record in records]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    if not (data / "tokenizer").exists():
        train_tokenizer((record["instruction"] for record in records), data / "tokenizer", vocab_size=330)
    args.sizes, args.head_dim, args.tokens, args.batch_tokens = "16:16:1:1,32:32:1:2,48:48:2:2", 16, 2048, 256
    args.rates, args.seeds, args.evaluations, args.warmup, args.factor = "1e-3,3e-3", 2, 6, 2, True


if __name__ == "__main__":
    main()
