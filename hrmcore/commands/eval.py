"""`hrmcore eval`: ask a model the questions of one or several tasks and print how many it answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hrmcore import plots
from hrmcore.evals import iq, reasoning_gym
from hrmcore.evals.harness import Task, evaluate, records_task, report, table
from hrmcore.evals.scorers import SCORERS

EXAMPLE = f"""\
examples:
  hrmcore eval --tasks iq --n 10
  hrmcore eval --tasks reasoning_gym:chain_sum,reasoning_gym:gcd --n 100
  hrmcore eval --model checkpoint/ --tasks iq --n 1000 --seed 7 --out iq.json --plot iq.png
  hrmcore eval --model checkpoint/ --tasks key_retrieval --noise 0,8,32,128 --plot curve.png
  hrmcore eval --model gpt2 --transformers --tasks pattern_mining
  hrmcore eval --model name --endpoint http://localhost:8000/v1 --tasks validation.jsonl

tasks:
  iq                     every family below
  {", ".join(iq.FAMILIES)}: one family
  {", ".join(iq.TASKS)}: one task
  reasoning_gym:NAME     a task of the reasoning-gym package (pip install hrmcore[demo]), which scores the answers
  FILE.jsonl             records ({{"instruction", "response"[, "condition"]}}, one a line); scored as exact

scorers (--scorer; each task names its default, which the JSON of --out says):
  exact                  the whole answer, white space around it aside
  first_line             the first line of the answer, as the IQ tasks are scored
  answer                 what \\boxed{{}} holds, or follows "####" or "answer is"; else the answer without brackets and
                         punctuation around it (B. and (B) are B); numbers by value (1,234 is 1234); Unicode's form C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore eval`."""
    parser.epilog = EXAMPLE
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="what to ask, separated by commas; see below")
    parser.add_argument("--n", type=int, default=100, metavar="N", help="questions of each task, at most (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed asks the same questions (0)")
    noise = f"irrelevant facts in an anti_interference question ({','.join(map(str, iq.NOISE))})"
    parser.add_argument("--noise", default=",".join(map(str, iq.NOISE)), metavar="A,B,…", help=noise)
    parser.add_argument("--scorer", choices=SCORERS, help="what counts as right (default: as each task names it)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the results: accuracy with intervals, score over noise"
    )
    model = parser.add_argument_group("the model")
    named = "checkpoint folder or cached hub id, or the name that the endpoint knows (default: the embedded model)"
    model.add_argument("--model", help=named)
    how = model.add_mutually_exclusive_group()
    how.add_argument("--transformers", action="store_true", help="run the model with the transformers library")
    how.add_argument("--endpoint", metavar="URL", help="ask an OpenAI-compatible endpoint instead of running a model")
    model.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, int8 or int4; our engine only")
    model.add_argument("--threads", type=int, metavar="N", help="threads to compute with; our engine only")


def run(args: argparse.Namespace) -> int:
    """Ask, score, print."""
    from hrmcore.evals.runners import make_runner

    if args.n < 1:
        raise ValueError(f"--n must be at least 1, got {args.n}")
    chosen = choose(args.tasks, args.n, args.seed, _noise(args.noise))
    if args.scorer is not None:
        chosen = [task.scored_by(args.scorer) for task in chosen]
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: no such folder")
    if args.plot is not None:
        plots.check(args.plot)
    runner = make_runner(
        args.model, args.transformers, args.endpoint, args.dtype, args.threads, args.max_new_tokens, args.seed
    )
    scores = [evaluate(task, runner) for task in chosen]
    print(f"{runner.name}, seed {args.seed}\n{table(scores)}")
    result = report(runner, scores, args.seed)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.plot is not None:
        plots.evals(result, args.plot)
    return 0


def choose(names: str, n: int, seed: int, noise: list[int]) -> list[Task]:
    """The tasks that a list of names stands for. Raises ValueError on one that is unknown, before anything runs."""
    chosen: list[Task] = []
    for name in (name.strip() for name in names.split(",")):
        if name.endswith(".jsonl"):
            chosen.append(records_task(name, n, seed))
        elif name.startswith("reasoning_gym:"):
            chosen.append(reasoning_gym.task(name.partition(":")[2], n, seed))
        elif found := [task for task in iq.TASKS if name in ("iq", iq.TASKS[task].family, task)]:
            for task in found:
                chosen += iq.tasks(task, n, seed, noise)
        else:
            known = ", ".join(["iq", *iq.FAMILIES, *iq.TASKS, "reasoning_gym:NAME", "FILE.jsonl"])
            raise ValueError(f"unknown task {name!r}; there are: {known}")
    return chosen


def _noise(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = [-1]
    if not all(0 <= level <= 3000 for level in levels):
        raise ValueError(f"--noise must be whole numbers from 0 to 3000, separated by commas, got {text!r}")
    return levels
