"""The puzzles of the evidence runs, made once and memory-mapped: bare questions and answers, a token a character.

A set is a folder with two stores, train/ and heldout/, of one vocabulary. No held-out question is trained on, and
no held-out solution of a sudoku either: what is held out is chosen by the solution's checksum, at 9 x 9 by the puzzle
that it is a look-alike of. Everything follows from the names and numbers here; reasoning-gym (the extra `demo`) draws.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrmcore.data.prepare import prepare
from hrmcore.evals import iq
from hrmcore.tokenizer import train_tokenizer

CONTEXT = 1024
HELD_OUT = 10  # of a hundred solutions
DRAWS = 50_000
BASES = 500
FRAMING = 10  # tokens of every vocabulary beside bytes and characters

Pair = tuple[str, str, str]  # question, answer, and what must not be in both parts


def _drawn(task: str, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """A task's entries as they are asked for. Entry i follows from seed + i: one seed gives them all."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(task, size=1 << 30, seed=seed, **options)
    for index in itertools.count():
        with contextlib.suppress(RuntimeError):  # of the mazes, which give up now and then
            yield entries[index]


def _grid(rows: list[list[int]]) -> str:
    return "\n".join("".join(str(cell or "_") for cell in row) for row in rows)


def _sudokus9() -> Iterator[Pair]:
    """Of BASES puzzles of reasoning-gym, which takes 40 ms for one, look-alikes at random; apart by their base."""
    made = itertools.islice(_drawn("sudoku", 0), BASES)
    bases = [np.array([entry["metadata"][name] for name in ("puzzle", "solution")]) for entry in made]
    random = np.random.default_rng(0)
    while True:
        base = int(random.integers(len(bases)))
        puzzle, solution = look_alike(bases[base], random)
        yield _grid(puzzle.tolist()), _grid(solution.tolist()), f"sudoku {base}"


def look_alike(grids: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Sudokus (N, 9, 9) under one random symmetry: digits renamed, bands, rows, stacks and columns moved, mirrored.

    It keeps what is right, and that there is one solution. 0, an empty cell, stays.
    """
    names = np.concatenate([[0], 1 + random.permutation(9)])
    rows, columns = (
        np.concatenate([3 * band + random.permutation(3) for band in random.permutation(3)]) for _ in range(2)
    )
    moved = names[grids][:, rows][:, :, columns]
    return moved.swapaxes(1, 2) if random.integers(2) else moved


def _sudokus4() -> Iterator[Pair]:
    """Of 4 x 4, 8 to 12 cells empty, with one solution; reasoning-gym's generator takes minutes for as many."""
    grids, random = solved4(), np.random.default_rng(0)
    while True:
        solution, empty = grids[random.integers(len(grids))], int(random.integers(8, 13))
        given = np.sort(random.permutation(16)[empty:])
        if (grids[:, given] == solution[given]).all(1).sum() == 1:
            shown = np.zeros_like(solution)
            shown[given] = solution[given]
            answer = _grid(solution.reshape(4, 4).tolist())
            yield _grid(shown.reshape(4, 4).tolist()), answer, answer


def solved4() -> NDArray[np.int64]:
    """All solved sudokus of 4 x 4, (288, 16): two halves whose boxes are right, where the columns are."""
    rows = list(itertools.permutations(range(1, 5)))
    halves = [(a, b) for a, b in itertools.product(rows, rows) if len({*a[:2], *b[:2]}) == len({*a[2:], *b[2:]}) == 4]
    grids = np.array([(*top, *bottom) for top, bottom in itertools.product(halves, halves)])
    return grids[(np.sort(grids, 1) == np.arange(1, 5)[:, None]).all((1, 2))].reshape(-1, 16)


def _sums() -> Iterator[Pair]:
    """Chains of two to four numbers below 100, such as 31+4-17."""
    for entry in _drawn("chain_sum", 10_000, min_terms=2, max_terms=4, min_digits=1, max_digits=2):
        question = entry["metadata"]["expression"].replace(" ", "")
        yield question, entry["answer"], question


def _mazes() -> Iterator[Pair]:
    """The fewest steps from S to G, walls being #."""
    for entry in _drawn("maze", 20_000, min_grid_size=5, max_grid_size=7, min_dist=3, max_dist=9):
        meta = entry["metadata"]
        names = {meta["start"]: "S", meta["goal"]: "G", meta["wall"]: "#", meta["path"]: "."}
        question = "\n".join("".join(names[cell] for cell in row) for row in meta["grid"])
        yield question, entry["answer"], question


def _questions() -> Iterator[Pair]:
    """All tasks of the IQ suite in turn, four irrelevant facts in those that take them."""
    for seed in itertools.count():
        made = [iq.questions(name, 500, seed, 4 if task.noisy else 0) for name, task in iq.TASKS.items()]
        for question in itertools.chain(*zip(*made, strict=True)):
            yield question.prompt, question.answer, question.prompt


SETS: dict[str, Callable[[], Iterator[Pair]]] = {
    "sudoku4": _sudokus4,
    "sudoku9": _sudokus9,
    "sums": _sums,
    "mazes": _mazes,
    "iq": _questions,
}


def provide(name: str, out: Path, records: int, heldout: int) -> Path:
    """The folder of a set with so many records in its two stores; made if it is not there."""
    folder = out / f"{name}-{records}-{heldout}"
    if folder.exists():
        return folder
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return write(SETS[name](), draft, records, heldout).rename(folder)


def write(pairs: Iterator[Pair], folder: Path, records: int, heldout: int) -> Path:
    """Fill a folder with both stores of so many different questions."""
    parts = split(pairs, records, heldout)
    characters = set("".join(text for part in parts for pair in part.items() for text in pair)) | {" "}
    for part, name in zip(parts, ("train", "heldout"), strict=True):
        lines = (json.dumps({"instruction": asked, "response": answer}) + "\n" for asked, answer in part.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    vocabulary = FRAMING + 256 + len(characters - {"\n"})
    train_tokenizer(("".join(pair) for pair in itertools.islice(parts[0].items(), 5000)), folder / "words", vocabulary)
    for name in ("train", "heldout"):
        prepare([folder / f"{name}.jsonl"], folder / name, tokenizer=folder / "words", context=CONTEXT, workers=1)
        (folder / f"{name}.jsonl").unlink()
    return folder


def split(pairs: Iterator[Pair], records: int, heldout: int) -> tuple[dict[str, str], dict[str, str]]:
    """Questions with answers to train on and to hold out, as many as are asked for; each question once.

    Raises ValueError when there are not so many, as far as DRAWS more draws can tell.
    """
    train: dict[str, str] = {}
    kept: dict[str, str] = {}
    since = 0
    for question, answer, apart in pairs:
        part, most = (kept, heldout) if held_out(apart) else (train, records)
        since += 1
        if len(part) < most and question not in part:
            part[question], since = answer, 0
        if len(train) == records and len(kept) == heldout:
            return train, kept
        if since == DRAWS:
            break
    raise ValueError(f"{len(train)} different questions to train on and {len(kept)} held out, not {records}, {heldout}")


def held_out(text: str) -> bool:
    """Whether what has this text, a solution or a question, is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < HELD_OUT
