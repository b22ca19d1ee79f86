"""HRM against its baselines, and the training objectives, at matched training FLOPs on the same data.

    python -m bench.studies.architecture OUT                       about 0.6 M parameters, a million tokens for each HRM
    python -m bench.studies.architecture OUT --width 64 --tokens 300000 --data mini_sudoku

The baselines are configurations of HRM's recurrence: a Transformer that passes each layer once, the same looped, and
TRM (one stack shared by L and H, of as many parameters). `--tokens` are those of HRM with the published objective;
every other cell gets the steps that cost as many FLOPs (hrmcore.planner), so a cheaper one sees more tokens. A cell is
an architecture, an objective and a data set; the held-out loss is that of the responses in every cell. With --sweep
each cell's seed 0 is run at --rate, half and twice of it, and the best by held-out loss goes on with the other seeds.

Every run is hrmcore's own trainer in a folder of OUT: an interrupted one resumes, a finished one is kept as
OUT/runs/NAME.json and not run again. Seeds are the outermost loop, so that a study that is cut short has whole tables.
--plan prints what the study takes and leaves. `--toy` is a minute's check that the bench works.

Needs the extras `demo` and `bench`. Writes OUT/architecture.json and .png; the last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrmcore import machine, plots
from hrmcore.config import HRMConfig
from hrmcore.data.packing import epoch_batches
from hrmcore.data.records import Corpus, Rejected, read_records, tokenize
from hrmcore.evals import iq
from hrmcore.planner import parameters, training_flops
from hrmcore.tokenizer import Tokenizer, train_tokenizer
from hrmcore.train.run_file import TrainConfig
from hrmcore.train.trainer import Trainer

HORIZON = 5
NOISE = 4  # irrelevant facts in the anti-interference questions
CONTEXT = 1024
UTILIZATION = 0.2  # of the machine's measured peak, to say minutes before the first run has been timed

# Layers of a stack and cycles, so that all have HRM's parameters; TRM's one stack is as deep as HRM's two together.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HRM": {"H_cycles": 2, "L_cycles": 3},
    "Transformer": {"H_cycles": 1, "L_cycles": 1},
    "looped": {"H_cycles": 4, "L_cycles": 1},
    "TRM": {"H_cycles": 2, "L_cycles": 3, "shared_stacks": True},
}
# Whether the instruction is read both ways, and which tokens carry loss.
OBJECTIVES = {
    "all tokens, causal": (False, "all"),
    "response only, causal": (False, "response"),
    "response only, PrefixLM": (True, "response"),
}
PUBLISHED = "response only, PrefixLM"
TOY = {"tokens": 3000, "records": 60, "heldout": 20, "seeds": 1, "width": 32, "layers": 1, "batch_tokens": 1024}
SETTINGS = ("tokens", "width", "layers", "batch_tokens", "records", "heldout", "rate", "sweep", "seeds")


@dataclass(frozen=True)
class Cell:
    """What is compared."""

    architecture: str
    objective: str
    data: str

    def config(self, vocabulary: int, width: int, layers: int) -> HRMConfig:
        """Its model; `layers` are those of one of HRM's stacks."""
        chosen = ARCHITECTURES[self.architecture]
        return HRMConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_layers_per_stack=layers * (2 if chosen.get("shared_stacks") else 1),
            num_attention_heads=width // 32,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            prefix_lm=OBJECTIVES[self.objective][0],
            **chosen,
        )


@dataclass(frozen=True)
class Run:
    """One training run; its name says all that it depends on but the records."""

    cell: Cell
    rate: float
    seed: int
    steps: int

    def name(self, args: argparse.Namespace) -> str:
        cell = self.cell
        words = f"{cell.data} {cell.architecture} {cell.objective}".lower().replace(",", "").replace(" ", "-")
        return f"{words}-{args.width}x{args.layers}-{self.steps}x{args.batch_tokens}-lr{self.rate:g}-seed{self.seed}"


def cells(data: Sequence[str]) -> list[Cell]:
    """Every architecture with the published objective, then every objective with HRM; each once."""
    pairs = [(name, PUBLISHED) for name in ARCHITECTURES] + [("HRM", name) for name in OBJECTIVES]
    return [Cell(*pair, one) for one, pair in itertools.product(data, dict.fromkeys(pairs))]


# Data


def sudoku(count: int) -> list[tuple[str, str]]:
    """Mini sudokus of reasoning-gym, as bare grids."""
    import reasoning_gym

    def grid(rows: list[list[int]]) -> str:
        return "\n".join(" ".join(str(cell or "_") for cell in row) for row in rows)

    made = (entry["metadata"] for entry in reasoning_gym.create_dataset("mini_sudoku", size=count, seed=0))
    return [(grid(entry["puzzle"]), grid(entry["solution"])) for entry in made]


def iq_questions(count: int) -> list[tuple[str, str]]:
    """All tasks of the IQ suite in turn."""
    each = -(-count // len(iq.TASKS))
    made = [iq.questions(name, each, 0, NOISE if task.noisy else 0) for name, task in iq.TASKS.items()]
    return [(q.prompt, q.answer) for q in itertools.chain(*zip(*made, strict=True))][:count]


# How to make them, and the vocabulary's words beyond bytes and characters: a grid's cells stay tokens of their own.
DATA: dict[str, tuple[Callable[[int], list[tuple[str, str]]], int]] = {
    "mini_sudoku": (sudoku, 0),
    "iq": (iq_questions, 200),
}


def write_data(name: str, args: argparse.Namespace) -> Path:
    """The folder of a data set: train.jsonl, heldout.jsonl and tokenizer/. No held-out instruction is trained on."""
    folder: Path = args.out / "data" / f"{name}-{args.records}-{args.heldout}"
    if folder.exists():
        return folder
    make, words = DATA[name]
    records = dict(make(args.records + args.heldout))
    lines = [json.dumps({"instruction": asked, "response": answer}) + "\n" for asked, answer in records.items()]
    texts = [f"{asked}\n{answer}" for asked, answer in itertools.islice(records.items(), 5000)]
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "heldout.jsonl").write_text("".join(lines[: args.heldout]), encoding="utf-8")
    (unfinished / "train.jsonl").write_text("".join(lines[args.heldout :]), encoding="utf-8")
    framing, characters = 10, len(set("".join(texts)))
    train_tokenizer(texts, unfinished / "tokenizer", vocab_size=framing + 256 + characters + words)
    unfinished.rename(folder)
    return folder


# What a run costs


class Budget:
    """The FLOPs that every run of a data set may take, and the steps that each cell gets for them."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.args = args
        self.vocabulary = Tokenizer.load(folder / "tokenizer").vocab_size
        records = read_records(folder / "train.jsonl", Rejected(), strict=True)
        corpus = tokenize(records, Tokenizer.load(folder / "tokenizer"), CONTEXT, Rejected())
        batches = sum(1 for _ in epoch_batches(corpus.lengths, args.batch_tokens, seed=0, epoch=0))
        self._corpus, self._batch = corpus, float(corpus.lengths.sum()) / batches  # tokens of a mean batch
        published = Cell("HRM", PUBLISHED, "")
        self.flops = args.tokens * self._flops_per_token(published)

    def steps(self, cell: Cell) -> int:
        """Steps of this cell that cost the budget."""
        return max(1, round(self.flops / (self._batch * self._flops_per_token(cell))))

    def _flops_per_token(self, cell: Cell) -> float:
        """Training FLOPs of a mean token, head and attention included."""
        both_ways, objective = OBJECTIVES[cell.objective]
        corpus: Corpus = self._corpus
        lengths, prompts = corpus.lengths.astype(np.float64), corpus.prefix.astype(np.float64)
        prefix = prompts if both_ways else 0 * prompts
        pairs = float((prefix * lengths + (lengths - prefix) * (lengths - prefix + 1) / 2).sum())
        tokens = float(lengths.sum())
        supervised = tokens if objective == "all" else float((lengths - prompts + 1).sum())
        config = cell.config(self.vocabulary, self.args.width, self.args.layers)
        return training_flops(config, HORIZON, tokens, supervised, pairs).total / tokens


class Clock:
    """How long what is left will take, by the FLOPs and the speed so far; before that, by the machine's peak."""

    def __init__(self, runs: int, flops: float) -> None:
        self._runs, self._flops = runs, flops
        self._done = self._seconds = 0.0
        self._guess = UTILIZATION * machine.peak_flops("float32")

    def passed(self, result: dict[str, Any], fresh: bool) -> None:
        """Count a run, and its speed if it ran just now."""
        self._runs, self._flops = self._runs - 1, self._flops - result["flops"]
        if fresh:
            self._done, self._seconds = self._done + result["flops"], self._seconds + result["seconds"]

    def __str__(self) -> str:
        speed = self._done / self._seconds if self._seconds else self._guess
        left = max(0.0, self._flops)
        return (
            f"{self._runs} runs and {left:.3g} FLOPs left, about {left / speed / 60:.0f} minutes at {speed:.2g} FLOP/s"
        )


# Runs


def result_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What the run found; from its file if it has been before."""
    kept: Path = args.out / "runs" / f"{run.name(args)}.json"
    if not kept.is_file():
        work = args.out / "work" / run.name(args)
        trainer = Trainer(config_of(run, work, args))
        trainer.run()
        rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".tmp")
        unfinished.write_text(json.dumps(summary(rows, trainer.model.config)) + "\n", encoding="utf-8")
        unfinished.rename(kept)
        shutil.rmtree(work)
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def summary(rows: list[dict[str, float]], config: HRMConfig) -> dict[str, Any]:
    return {
        "parameters": parameters(config),
        "steps": len(rows),
        "tokens": rows[-1]["tokens_seen"],
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["tokens"] / row["tokens_per_second"] for row in rows),
        "heldout_loss": rows[-1]["heldout_loss"],
        "exact": rows[-1]["heldout_exact"],
        "curve": [[row["tokens_seen"], row["heldout_loss"]] for row in rows if "heldout_loss" in row],
    }


def config_of(run: Run, work: Path, args: argparse.Namespace) -> TrainConfig:
    data = write_data(run.cell.data, args)
    tokenizer = Tokenizer.load(data / "tokenizer")
    return TrainConfig(
        model=run.cell.config(tokenizer.vocab_size, args.width, args.layers),
        train_files=(str(data / "train.jsonl"),),
        heldout_files=(str(data / "heldout.jsonl"),),
        tokenizer=str(data / "tokenizer"),
        out=str(work),
        objective=OBJECTIVES[run.cell.objective][1],
        steps=run.steps,
        batch_tokens=args.batch_tokens,
        learning_rate=run.rate,
        warmup_steps=run.steps // 10,
        horizon_first=HORIZON,
        horizon_last=HORIZON,
        seed=run.seed,
        eval_every=max(1, run.steps // 4),
        check_records=args.heldout,
        save_every=100,
        keep=1,
    )


def study(args: argparse.Namespace, budgets: dict[str, Budget]) -> dict[str, Any]:
    """Run what is not finished; everything that the tables and the picture show."""
    every = cells(args.data.split(","))
    rates = [args.rate / 2, args.rate, 2 * args.rate] if args.sweep else [args.rate]
    each = len(rates) + args.seeds - 1
    clock = Clock(each * len(every), each * sum(budgets[cell.data].flops for cell in every))
    print(f"{clock}, finished ones not taken off yet", flush=True)

    def measure(cell: Cell, rate: float, seed: int) -> dict[str, Any]:
        run = Run(cell, rate, seed, budgets[cell.data].steps(cell))
        fresh = not (args.out / "runs" / f"{run.name(args)}.json").is_file()
        result = result_of(run, args)
        clock.passed(result, fresh)
        if fresh:
            found = f"held-out loss {result['heldout_loss']:.4f}, {result['exact']:.1%} right"
            print(f"{run.name(args)}: {found}; {clock}", flush=True)
        return result

    tried = {cell: {rate: measure(cell, rate, 0) for rate in rates} for cell in every}
    best = {cell: min(rates, key=lambda rate: found[rate]["heldout_loss"]) for cell, found in tried.items()}
    runs = {cell: [tried[cell][best[cell]]] for cell in every}
    for seed, cell in itertools.product(range(1, args.seeds), every):
        runs[cell].append(measure(cell, best[cell], seed))
    lines = [
        {
            "architecture": cell.architecture,
            "objective": cell.objective,
            "data": cell.data,
            "rate": best[cell],
            "swept": {f"{rate:g}": found["heldout_loss"] for rate, found in tried[cell].items()},
            "budget": budgets[cell.data].flops,
            "runs": runs[cell],
        }
        for cell in every
    ]
    return {"settings": {name: getattr(args, name) for name in SETTINGS}, "published": PUBLISHED, "lines": lines}


def tables(report: dict[str, Any]) -> str:
    """Both studies, a table for each data set: a row a name."""
    parts = []
    for data in dict.fromkeys(line["data"] for line in report["lines"]):
        lines = [line for line in report["lines"] if line["data"] == data]
        parts += [f"\n## {data}: architectures, {PUBLISHED}\n"]
        parts += [table([line for line in lines if line["objective"] == PUBLISHED], "architecture")]
        parts += [f"\n## {data}: objectives, HRM\n"]
        parts += [table([line for line in lines if line["architecture"] == "HRM"], "objective")]
    return "\n".join(parts)


def table(lines: list[dict[str, Any]], key: str) -> str:
    """Mean (least to most of the seeds) of right answers and held-out loss."""
    rows = [["", "right answers", "held-out loss", "rate", "parameters", "FLOPs", "tokens"]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        exact, loss = ([run[name] for run in line["runs"]] for name in ("exact", "heldout_loss"))
        means = (f"{statistics.fmean(run[name] for run in line['runs']):.3g}" for name in ("flops", "tokens"))
        rows.append(
            [
                line[key],
                f"{statistics.fmean(exact):.1%} ({min(exact):.1%} to {max(exact):.1%})",
                f"{statistics.fmean(loss):.4f} ({min(loss):.4f} to {max(loss):.4f})",
                f"{line['rate']:g}",
                f"{line['runs'][0]['parameters']:,}",
                *means,
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=1e6, help="of each HRM run (1e6)")
    parser.add_argument("--data", default=",".join(DATA), help=f"({','.join(DATA)})")
    parser.add_argument("--records", type=int, default=20_000, help="of each data set to train on, about (20000)")
    parser.add_argument("--heldout", type=int, default=400, help="records, all of them answered (400)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 32; 64, 96, 128: 0.3, 0.6, 1.0 M (96)")
    parser.add_argument("--layers", type=int, default=2, help="of one of HRM's stacks (2)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (2e-3)")
    parser.add_argument("--sweep", action="store_true", help="choose each cell's rate with seed 0")
    parser.add_argument("--plan", action="store_true", help="print FLOPs and minutes and leave")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(arguments)
    if unknown := set(args.data.split(",")) - set(DATA):
        parser.error(f"--data: no {', '.join(sorted(unknown))}; choose from {', '.join(DATA)}")
    if args.width % 32 or args.width < 32:
        parser.error(f"--width must be a multiple of 32, got {args.width}")
    if args.toy:
        vars(args).update(TOY)
    budgets = {name: Budget(write_data(name, args), args) for name in args.data.split(",")}
    if args.plan:
        print_plan(args, budgets)
        return
    report = study(args, budgets)
    print(tables(report))
    (args.out / "architecture.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots.architecture(report, args.out / "architecture.png")
    print(json.dumps(report))


def print_plan(args: argparse.Namespace, budgets: dict[str, Budget]) -> None:
    every = cells(args.data.split(","))
    for cell in every:
        budget = budgets[cell.data]
        count, steps = parameters(cell.config(budget.vocabulary, args.width, args.layers)), budget.steps(cell)
        print(f"{cell.data}, {cell.architecture}, {cell.objective}: {count:,} parameters, {steps} steps")
    each = args.seeds + 2 * args.sweep
    print(Clock(each * len(every), each * sum(budgets[cell.data].flops for cell in every)))


if __name__ == "__main__":
    main()
