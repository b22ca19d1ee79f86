"""Write the training and held-out records of the embedded model, reasoning-gym problems, and its tokenizer.

    python runs/tiny_data.py OUT --scale 1.0

Writes OUT/train.jsonl and OUT/heldout.jsonl ({"instruction", "response", "condition", "task"}) and OUT/tokenizer/.
No held-out instruction occurs in the training file. Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import reasoning_gym
from tqdm import tqdm

from hrmcore.tokenizer import train_tokenizer

SEED = 20261121
HELDOUT_PER_TASK = 300

# task: (problems drawn at scale 1, parameters of the generator)
TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "mini_sudoku": (160_000, {"min_empty": 8, "max_empty": 12}),
    "spell_backward": (100_000, {"min_word_len": 3, "max_word_len": 10}),
    "letter_counting": (70_000, {"min_words": 2, "max_words": 6}),
    "chain_sum": (120_000, {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    "gcd": (80_000, {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 200}),
    "spiral_matrix": (60_000, {"min_n": 2, "max_n": 4}),
    "rotate_matrix": (70_000, {"min_n": 2, "max_n": 4, "max_rotations": 3}),
    "binary_matrix": (50_000, {"min_n": 3, "max_n": 4}),
}
REPEATED = {"chain_sum": 2, "gcd": 2}  # tasks with few different problems of few tokens


def problems(task: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` problems of one task as records, each instruction once."""
    parameters = TASKS[task][1]
    dataset = reasoning_gym.create_dataset(task, size=count, seed=seed, **parameters)
    seen = set()
    for item in dataset:
        instruction = item["question"].strip()
        if instruction not in seen:
            seen.add(instruction)
            yield {"instruction": instruction, "response": item["answer"], "condition": "direct", "task": task}


def fixed_wording(instructions: list[str], shortest: int = 5) -> list[str]:
    """The passages that all these instructions of one task have in common, in order."""
    passages = [instructions[0]]
    for other in instructions[1:]:
        kept = []
        for passage in passages:
            blocks = SequenceMatcher(None, passage, other, autojunk=False).get_matching_blocks()
            kept += [passage[b.a : b.a + b.size] for b in blocks if b.size >= shortest]
        passages = kept
    return passages


def write_tokenizer(records: list[dict[str, str]], folder: Path) -> None:
    """A vocabulary of single characters, in which each passage of a task's fixed wording is one token.

    So prompts stay short and letters stay letters. A digit or blank after a space is one token too: a row of a puzzle
    then has one token a cell.
    """
    phrases = dict.fromkeys(f" {cell}" for cell in "0123456789_")
    for task in TASKS:
        sample = [r["instruction"] for r in records if r["task"] == task][:60]
        phrases.update(dict.fromkeys(fixed_wording(sample)))
    texts = [f"{r['instruction']}\n{r['response']}" for r in records[:20_000]]
    characters = set("".join(texts))
    specials, byte_pieces = 10, 256
    size = specials + byte_pieces + len(phrases) + len(characters)
    tokenizer = train_tokenizer(iter(texts), folder, vocab_size=size, phrases=list(phrases))
    print(f"{tokenizer.vocab_size} tokens, {len(phrases)} of them passages or cells -> {folder}")


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
    write_tokenizer(train, args.out / "tokenizer")
    print(f"{len(train)} training and {len(heldout)} held-out records -> {args.out}")


if __name__ == "__main__":
    main()
