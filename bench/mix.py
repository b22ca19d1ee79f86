"""The reasoning-gym mix of the training benchmarks: five tasks of unequal length, in the generators' own settings.

    python -m bench.mix OUT --records 20000

Writes OUT/train.jsonl, OUT/heldout.jsonl and OUT/tokenizer/ (a BPE of 512). No held-out instruction occurs in the
training file. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import reasoning_gym

from hrmcore.tokenizer import train_tokenizer

TASKS = ("mini_sudoku", "spell_backward", "letter_counting", "chain_sum", "gcd")
SEED, VOCABULARY = 20261122, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=20_000, help="to train on, of all tasks together (20000)")
    parser.add_argument("--heldout", type=int, default=500, help="of all tasks together (500)")
    args = parser.parse_args()
    print(write(args.out, args.records, args.heldout))


def write(folder: Path, records: int, heldout: int) -> str:
    """Write the files; returns what they hold, in a line."""
    every = problems(records + heldout)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", every[:heldout]), ("train", every[heldout:])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
    texts = (f"{record['instruction']}\n{record['response']}" for record in every[heldout:][:5000])
    train_tokenizer(texts, folder / "tokenizer", vocab_size=VOCABULARY)
    return f"{len(every) - heldout} training and {heldout} held-out records -> {folder}"


def problems(count: int) -> list[dict[str, str]]:
    """At most `count` problems, as many of each task, shuffled, each instruction once."""
    found: dict[str, dict[str, str]] = {}
    for index, task in enumerate(TASKS):
        for item in reasoning_gym.create_dataset(task, size=-(-count // len(TASKS)), seed=SEED + index):
            instruction = item["question"].strip()
            found[instruction] = {"instruction": instruction, "response": item["answer"], "task": task}
    records = list(found.values())
    random.Random(SEED).shuffle(records)
    return records[:count]


if __name__ == "__main__":
    main()
