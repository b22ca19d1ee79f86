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
from typing import Any

from tqdm import tqdm

import hrmcore

BATCH = 64
SAMPLES_PER_TASK = 2


def answer_all(engine: Any, records: list[dict[str, str]]) -> list[str]:
    """The engine's greedy answers, in order."""
    answers: list[str] = []
    for start in tqdm(range(0, len(records), BATCH), desc="answering"):
        answers += engine.generate([r["instruction"] for r in records[start : start + BATCH]], max_new_tokens=64)
    return answers


def card(parameters: int, scores: dict[str, list[bool]]) -> str:
    """The model card: what it is, how it was made, how well it does on prompts it never saw."""
    rows = "\n".join(
        f"| {task} | {100 * sum(right) / len(right):.1f}% | {len(right)} |" for task, right in sorted(scores.items())
    )
    return f"""# The embedded model

A hierarchical recurrent language model of {parameters / 1e6:.2f} M parameters, trained from scratch by
`runs/tiny.sh` (seed and settings in `runs/tiny.toml`, problems and difficulties in `runs/tiny_data.py`) on problems
that the `reasoning-gym` package generates. It knows these tasks in the wording of that package and nothing else.

Exact match on held-out problems, none of which occurs in the training data; greedy decoding:

| task | exact match | n |
|---|---|---|
{rows}

Measured by `python runs/tiny_card.py`. A mini sudoku counts as right only if it equals the generator's solution; the
puzzles are new to the model, but there are only 288 complete 4x4 grids and it has met them all.
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
