"""The embedded model's eight puzzles as records, and a tokenizer for them. Needs the extra `demo`.

`runs/tiny_data.py` and `hrmcore init` without records both take them from here.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from hrmcore.tokenizer import Tokenizer, train_tokenizer

SEED = 20261121

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


def problems(task: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` problems of one task as records, each instruction once. Raises ValueError without reasoning-gym."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("reasoning_gym is not installed; `pip install hrmcore[demo]` brings it, or name records")
    import reasoning_gym

    parameters = TASKS[task][1]
    dataset = reasoning_gym.create_dataset(task, size=count, seed=seed, **parameters)
    seen = set()
    for item in dataset:
        instruction = item["question"].strip()
        if instruction not in seen:
            seen.add(instruction)
            yield {"instruction": instruction, "response": item["answer"], "condition": "direct", "task": task}


def mixed(scale: float) -> list[dict[str, str]]:
    """Records of all tasks in one random order; `scale` multiplies how many problems are drawn of each."""
    records: list[dict[str, str]] = []
    for index, (task, (count, _)) in enumerate(TASKS.items()):
        records += problems(task, max(100, int(count * scale)), SEED + index)
    random.Random(SEED).shuffle(records)
    return records


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


def puzzle_tokenizer(records: Sequence[dict[str, str]], folder: Path) -> Tokenizer:
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
    return train_tokenizer(iter(texts), folder, vocab_size=size, phrases=list(phrases))
