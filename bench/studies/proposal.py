"""Does the run that `hrmcore init` proposes keep up with one whose learning rate was swept on the same budget?

Three task sets of reasoning-gym, as `init` gets them: a file of records each. The proposed run file is trained at its
own rate and at a quarter, half, twice and four times of it, with everything else as proposed (`hrmcore sweep`). The
score is the share of the 400 held-out questions that the exported model answers with the exact response.

The rule, fixed before the first run: on a set the proposal holds when its score is at least that of the best of the
five rates minus 3 points. Where it fails on a set, the rate of `hrmcore/train/proposal.py` is multiplied by the factor
whose mean score over the sets is the best, and the study is repeated. A share of 400 questions has a standard deviation
of up to 2.5 points, and the best of five is drawn high by it: a difference of 3 points alone shows nothing.

The size and the number of steps follow from a machine's speed. So that they do not depend on what else this one does,
`--flops` supposes a machine of that many FLOP/s in float32; without it the speed is measured.

    python -m bench.studies.proposal OUT --hours 0.05 --flops 6e10

A killed study goes on with the same command. `--runs 4` stops after four runs more. `--seeds 3` repeats, once a set is
complete, its proposal and the best of its other rates with two seeds more: the best of five was drawn high, their
difference with new seeds was not.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from bench.evidence.intervals import of_difference
from hrmcore.config import HRMConfig
from hrmcore.data.puzzles import SEED, problems
from hrmcore.data.records import Corpus
from hrmcore.data.split import split_records
from hrmcore.data.store import open_store
from hrmcore.durable import replacing
from hrmcore.train import proposal
from hrmcore.train.run_file import TrainConfig, read_config
from hrmcore.train.sweep import Sweep

SETS = {
    "words": ("spell_backward", "letter_counting"),
    "numbers": ("chain_sum", "gcd"),
    "grids": ("rotate_matrix", "spiral_matrix", "binary_matrix"),
}
FACTORS = (1, 2, 0.5, 4, 0.25)  # the proposal first
RECORDS = 9000  # of a set; init holds 400 questions out
MARGIN = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, default=0.05, help="the budget that init is given (0.05)")
    parser.add_argument("--flops", type=float, help="FLOP/s of the supposed machine (default: this one is measured)")
    parser.add_argument("--sets", default=",".join(SETS), help=f"({','.join(SETS)})")
    parser.add_argument("--runs", type=int, default=1000, help="stop after so many more runs (1000)")
    parser.add_argument("--seeds", type=int, default=1, help="of the proposal and of the best other rate (1)")
    parser.add_argument("--nice", type=int, default=15, help="lowers this process's priority (15)")
    arguments = parser.parse_args()
    os.nice(arguments.nice)
    if arguments.flops:
        proposal.measured = supposed(arguments.flops)
    names = arguments.sets.split(",")
    study = Study(arguments.out, arguments.hours, arguments.runs)
    for factor in FACTORS:  # every set's proposal first, so that a study cut short says something of each
        for name in names:
            study.train(name, factor, seed=0)
    for seed in range(1, arguments.seeds):
        for name in names:
            best = best_other(study.scores(name, 0))
            for factor in (1.0, best) if best else ():
                study.train(name, factor, seed)
    found = report(study, names, arguments.flops, arguments.seeds)
    (arguments.out / "proposal.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines_of(found)))


class Study:
    """The runs of a study in their folder. `left` is how many more may be trained."""

    def __init__(self, out: Path, hours: float, left: int) -> None:
        self.out, self.hours, self.left = out, hours, left

    def train(self, name: str, factor: float, seed: int) -> None:
        """Train a set's proposal at `factor` times its rate, if it has not been and runs are left."""
        sweep = self._sweep(name, factor, seed)
        if self.left > 0 and not sweep.checkpoint(sweep.cells[0]).is_dir():
            sweep.run(lambda line: print(f"{name}: {line}", flush=True))
            self.left -= 1

    def config(self, name: str) -> TrainConfig:
        """The run that `hrmcore init` proposes for a set."""
        return read_config(provided(self.out, name, self.hours))

    def scores(self, name: str, seed: int) -> dict[str, float]:
        """The share of right answers by factor, of the runs that have ended."""
        record = self._folder(name, seed) / "sweep.json"
        runs = json.loads(record.read_text())["runs"] if record.is_file() else {}
        found = {f"{factor:g}": runs.get(f"learning_rate={self._rate(name, factor):g}") for factor in sorted(FACTORS)}
        return {factor: result.get("heldout_exact", 0.0) for factor, result in found.items() if result is not None}

    def _sweep(self, name: str, factor: float, seed: int) -> Sweep:
        changes = [f"seed={seed}"] if seed else []
        run_file = provided(self.out, name, self.hours)
        return Sweep(run_file, [f"learning_rate={self._rate(name, factor):g}"], changes, self._folder(name, seed))

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / (f"{name}-sweep-seed{seed}" if seed else f"{name}-sweep")

    def _rate(self, name: str, factor: float) -> float:
        return two_digits(factor * self.config(name).learning_rate)


def best_other(scores: dict[str, float]) -> float | None:
    """The best factor beside the proposal's own; None where the set is not complete."""
    others = {factor: score for factor, score in scores.items() if factor != "1"}
    return float(max(others, key=others.__getitem__)) if len(scores) == len(FACTORS) else None


def supposed(flops: float) -> Any:
    """A machine of so many FLOP/s in float32, half of it in bfloat16, in place of `proposal.measured`."""

    def measured(
        model: HRMConfig, corpus: Corpus, batch_tokens: int, precision: str, device: str, seconds: float
    ) -> proposal.Speed:
        rate = flops / (1 if precision == "float32" else 2) / proposal.flops_a_token(model, corpus)
        return proposal.Speed(rate, batch_tokens / rate, batch_tokens)

    return measured


def provided(out: Path, name: str, hours: float) -> Path:
    """The run file of a set as `hrmcore init` proposes it; only its last step is validated, on all that is held out."""
    run_file = out / f"{name}.toml"
    if run_file.is_file():
        return run_file
    out.mkdir(parents=True, exist_ok=True)
    records = out / f"{name}.jsonl"
    with records.open("w", encoding="utf-8") as file:
        for number, task in enumerate(SETS[name]):
            for record in problems(task, RECORDS // len(SETS[name]), SEED + 100 + number):
                record.pop("task")
                file.write(json.dumps(record) + "\n")
    split = split_records([str(records)], {}, out / f"{name}-data", 4096)
    found = proposal.propose(open_store(out / f"{name}-data/train").corpus, split.vocab_size, hours, print)
    text = proposal.run_file(
        found, split.train, out / f"{name}-data/train", out / f"{name}-data/heldout", out / f"{name}-run"
    )
    lines = [line for line in text.splitlines() if not line.startswith(("eval_every", "save_every"))]
    at = lines.index("[model]")
    more = [f"eval_every = {found.steps}", "save_every = 200", f"check_records = {split.heldout}", ""]
    with replacing(run_file) as [temporary]:
        temporary.write_text("\n".join([*lines[:at], *more, *lines[at:]]) + "\n", encoding="utf-8")
    return run_file


def two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")


def report(study: Study, names: list[str], flops: float | None, seeds: int = 1) -> dict[str, Any]:
    """The scores by factor of every set so far, and what the rule says of the sets that are complete."""
    sets = {}
    for name in names:
        config, scores = study.config(name), study.scores(name, 0)
        holds = scores["1"] >= max(scores.values()) - MARGIN if len(scores) == len(FACTORS) else None
        size = {"width": config.model.hidden_size, "layers": config.model.num_layers_per_stack, "steps": config.steps}
        proposed = {"batch_tokens": config.batch_tokens, "rate": config.learning_rate}
        sets[name] = {**size, **proposed, "scores": scores, "holds": holds, "seeds": pairs(study, name, seeds)}
    return {"hours": study.hours, "flops": flops, "margin": MARGIN, "sets": sets}


def pairs(study: Study, name: str, seeds: int) -> dict[str, Any] | None:
    """The proposal beside the best other rate with the seeds after the first; None before there is such a pair."""
    best = best_other(study.scores(name, 0))
    scores = [study.scores(name, seed) for seed in range(1, seeds)]
    both = [(line["1"], line[f"{best:g}"]) for line in scores if best and {"1", f"{best:g}"} <= line.keys()]
    if not both:
        return None
    ours, theirs = map(list, zip(*both, strict=True))
    return {"factor": best, "proposal": ours, "other": theirs, "difference": of_difference(ours, theirs)}


def lines_of(found: dict[str, Any]) -> list[str]:
    lines = [f"{'set':<9}{'width':>6}{'steps':>7}{'rate':>9}  " + "".join(f"{f'×{f:g}':>8}" for f in sorted(FACTORS))]
    for name, line in found["sets"].items():
        cells = [line["scores"].get(f"{factor:g}") for factor in sorted(FACTORS)]
        text = "".join(f"{'-' if cell is None else f'{cell:.1%}':>8}" for cell in cells)
        verdict = {True: "holds", False: "does not hold", None: "not complete"}[line["holds"]]
        lines.append(f"{name:<9}{line['width']:>6}{line['steps']:>7}{line['rate']:>9g}  {text}  {verdict}")
    for name, line in found["sets"].items():
        if line["seeds"]:
            texts = [", ".join(f"{score:.1%}" for score in line["seeds"][side]) for side in ("proposal", "other")]
            lines.append(f"{name}, other seeds: ×1 {texts[0]}; ×{line['seeds']['factor']:g} {texts[1]}")
    return lines


if __name__ == "__main__":
    main()
