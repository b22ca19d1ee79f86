"""What the tests of shapes, texts and conversations prepare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import hrmcore
from support.records import PAIRS, Prepare

from hrmcore.data.store import Store, open_store
from hrmcore.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of PAIRS and of a few words of conversations."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{q} {a} User: Assistant: Hello. Be brief." for q, a in PAIRS], folder, vocab_size=320)
    return folder


@pytest.fixture
def prepared(tokenizer: Path, tmp_path: Path) -> Prepare:
    """`hrmcore prepare` with that tokenizer, the store opened."""

    def run(*arguments: str | Path) -> Store:
        out = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
        given = ["--tokenizer", tokenizer, "--out", out, "--workers", "1"]
        assert hrmcore("prepare", *map(str, [*given, *arguments])) == 0
        return open_store(out)

    return run
