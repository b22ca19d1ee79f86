"""A small model, and the folder of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIG

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.model import HRM


@pytest.fixture(scope="module")
def model() -> HRM:
    torch.manual_seed(0)
    return HRM(CONFIG)


@pytest.fixture
def folder(model: HRM, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "released")
    return tmp_path / "released"
