"""Write the training and held-out records of the embedded model, and its tokenizer.

    python runs/tiny_data.py OUT --scale 1.0

Writes OUT/train.jsonl and OUT/heldout.jsonl ({"instruction", "response", "condition", "task"}), reasoning-gym problems,
and OUT/tokenizer/. OUT/everyday/ has the same two files for the second run: what people type, and a part of the
problems. No held-out instruction occurs in a training file. Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tiny_everyday import EVERYDAY
from tiny_everyday import records as records_of
from tqdm import tqdm

from hrmcore.data.puzzles import SEED, TASKS, problems, puzzle_tokenizer

HELDOUT_PER_TASK = 300

REPEATED = {"chain_sum": 2, "gcd": 2}  # tasks with few different problems of few tokens

# Problems of the first run that the second one keeps: most of what it did not learn, enough of the rest.
KEPT = {
    **{"mini_sudoku": 60_000, "spell_backward": 10_000, "letter_counting": 40_000, "chain_sum": 100_000, "gcd": 40_000},
    **{"spiral_matrix": 8_000, "rotate_matrix": 8_000, "binary_matrix": 12_000},
}
SAID_AGAIN = {"talk": 3, "tables": 4}  # few different ones


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

    write(args.out, train, heldout)
    write(args.out / "everyday", *everyday(train, heldout, args.scale))
    tokenizer = puzzle_tokenizer(train, args.out / "tokenizer")
    print(f"{tokenizer.vocab_size} tokens -> {tokenizer.source}")


def everyday(
    train: list[dict[str, str]], heldout: list[dict[str, str]], scale: float
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The second run's training and held-out records, from the first one's, which are in random order."""
    left = {task: int(count * scale) for task, count in KEPT.items()}
    chosen: list[dict[str, str]] = []
    for record in train:
        if left[record["task"]] > 0:
            left[record["task"]] -= 1
            chosen.append(record)
    unseen = list(heldout)
    for task, (count, _) in EVERYDAY.items():
        unseen += records_of(task, HELDOUT_PER_TASK, SEED + 1, heldout=True)
        asked = {record["instruction"] for record in unseen}
        drawn = (r for r in records_of(task, int(count * scale), SEED + 1) if r["instruction"] not in asked)
        chosen += list(drawn) * SAID_AGAIN.get(task, 1)
    random.Random(SEED).shuffle(chosen)
    random.Random(SEED).shuffle(unseen)  # a run checks the first answers alone
    return chosen, unseen


def write(folder: Path, train: list[dict[str, str]], heldout: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("heldout", heldout)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(f"{len(train)} training and {len(heldout)} held-out records -> {folder}")


if __name__ == "__main__":
    main()
