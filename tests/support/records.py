"""Records for the tests of preparing them, and what they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hrmcore.data.store import Store
from hrmcore.tokenizer import Tokenizer

Prepare = Callable[..., Store]

PAIRS = [(f"What is {i} + 1?", str(i + 1)) for i in range(20)]
PLAIN = [{"instruction": question, "response": answer} for question, answer in PAIRS]


def sequences(store: Store) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(store.corpus.tokens), store.corpus.offsets[1:-1])]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def expected(tokenizer: Path, pairs: list[tuple[str, str]]) -> list[list[int]]:
    ids = Tokenizer.load(tokenizer)
    return [[*ids.prompt(question), *ids.encode(answer), ids.eoa] for question, answer in pairs]
