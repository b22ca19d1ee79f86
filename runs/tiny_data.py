"""Write the training and held-out records of the embedded model, reasoning-gym problems, and its tokenizer.

    python runs/tiny_data.py OUT --scale 1.0

Writes OUT/train.jsonl and OUT/heldout.jsonl ({"instruction", "response", "condition", "task"}) and OUT/tokenizer/.
No held-out instruction occurs in the training file. Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tqdm import tqdm

from hrmcore.data.puzzles import SEED, TASKS, problems, puzzle_tokenizer

HELDOUT_PER_TASK = 300

REPEATED = {"chain_sum": 2, "gcd": 2}  # tasks with few different problems of few tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training records of every task")
    args = parser.parse_args()

    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for index, (task, (count, _)) in enumerate(TASKS.items()):
        records = list(tqdm(problems(task, int(count * args.scale) + HELDOUT_PER_TASK, SEED + index), desc=task))
        random.Random(SEED + index).shuffle(records)
        heldout += records[:HELDOUT_PER_TASK]
        train += records[HELDOUT_PER_TASK:] * REPEATED.get(task, 1)
    random.Random(SEED).shuffle(train)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("heldout", heldout)):
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    tokenizer = puzzle_tokenizer(train, args.out / "tokenizer")
    print(f"{tokenizer.vocab_size} tokens -> {tokenizer.source}")
    print(f"{len(train)} training and {len(heldout)} held-out records -> {args.out}")


if __name__ == "__main__":
    main()
