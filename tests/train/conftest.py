"""A small run for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import WORDS, repetitions, write_run

from hrmcore.tokenizer import train_tokenizer
from hrmcore.train.run_file import (
    read_config,
)
from hrmcore.train.trainer import Trainer


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of 12 steps of about 256 tokens."""
    records = repetitions(WORDS)
    train_tokenizer((record["instruction"] for record in records), tmp_path / "tokenizer", vocab_size=330)
    return write_run(
        tmp_path,
        records,
        tmp_path / "tokenizer",
        heldout_files=[f"{tmp_path}/train.jsonl"],
        steps=12,
        batch_tokens=256,
        learning_rate=0.003,
        warmup_steps=2,
        eval_every=6,
        save_every=4,
        seed=7,
    )


@pytest.fixture
def trainer(run_file: Path) -> Iterator[Trainer]:
    """A trainer before its first step."""
    trainer = Trainer(read_config(run_file))
    yield trainer
    trainer.close()
