"""Measure a trained checkpoint on the held-out problems and install it as the embedded model, with its card.

    python runs/tiny_card.py CHECKPOINT HELDOUT.jsonl OUT

Writes the checkpoint's files, samples.json (questions for the prompt) and README.md (the card) into OUT.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from tiny_everyday import EVERYDAY, UNKNOWN
from tqdm import tqdm

import hrmcore
from hrmcore.data.puzzles import TASKS

BATCH = 64
SAMPLES_PER_TASK = 1
LONGEST_ANSWER = 128  # tokens; a sentence about itself has up to 110, since most of its tokens are characters


def answer_all(engine: Any, records: list[dict[str, str]]) -> list[str]:
    """The engine's greedy answers, in order."""
    answers: list[str] = []
    for start in tqdm(range(0, len(records), BATCH), desc="answering"):
        asked = [record["instruction"] for record in records[start : start + BATCH]]
        answers += engine.generate(asked, max_new_tokens=LONGEST_ANSWER)
    return answers


def card(parameters: int, scores: dict[str, list[bool]]) -> str:
    """The model card: what it is, how it was made, how well it does on questions it never saw."""
    tables = []
    for tasks in (TASKS, EVERYDAY):
        rows = [f"| {task} | {100 * mean(scores[task]):.1f}% | {len(scores[task])} |" for task in sorted(tasks)]
        tables.append("\n".join(["| task | exact match | n |", "|---|---|---|", *rows]))
    return f"""# The embedded model

A hierarchical recurrent language model of {parameters / 1e6:.2f} M parameters, trained from scratch by
`runs/tiny.sh` in two runs. The first (`runs/tiny.toml`) teaches it eight puzzles of the `reasoning-gym` package in that
package's wording, the second (`runs/tiny_everyday.toml`) what people type at a first meeting in many wordings, beside a
part of the puzzles. Problems, difficulties and wordings stand in `runs/tiny_data.py` and `runs/tiny_everyday.py`, all
made by programs. It knows nothing else; asked for anything else, it should say "{UNKNOWN}".

Exact match on held-out questions, none of which occurs in the training data; greedy decoding. The puzzles:

{tables[0]}

What people type:

{tables[1]}

- **mini_sudoku** counts as right only if it equals the generator's solution; the puzzles are new to the model, but
  there are only 288 complete 4x4 grids and it has met them all.
- **sums** add and subtract two numbers below 100; each held-out pair of numbers occurs in no training sum.
- **tables** go up to 12 times 12; every product occurs in training, the held-out ones in other words.
- **letters** and **backward** are about one word; held-out words occur in no training question of these two.
- **stories** are word problems of one step or two, with names and things that occur in no training story.
- **talk** is about itself, asked in ways that occur in no training question, so it shows what a model of this size does
  not do: understand.
- **unknown** are general questions, sums of larger numbers and other puzzles, of kinds that no training question has.

Measured by `python runs/tiny_card.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    records = [json.loads(line) for line in args.heldout.read_text(encoding="utf-8").splitlines()]
    engine = hrmcore.load(args.checkpoint)
    scores: dict[str, list[bool]] = defaultdict(list)
    samples: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record, answer in zip(records, answer_all(engine, records), strict=True):
        scores[record["task"]].append(answer == record["response"])
        if len(samples[record["task"]]) < SAMPLES_PER_TASK:
            samples[record["task"]].append({k: record[k] for k in ("task", "instruction", "response")})

    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.checkpoint.iterdir():
        shutil.copy(file, args.out)
    chosen = [sample for task in samples.values() for sample in task]
    (args.out / "samples.json").write_text(json.dumps(chosen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    model = hrmcore.HRM.from_pretrained(args.checkpoint)
    text = card(sum(p.numel() for p in model.parameters()), scores)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
