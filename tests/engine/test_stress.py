"""A short run of tests/soak/stress.py; `make tsan` and the command in its head run longer ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_cancelled_batches_give_no_wrong_token_and_leak_nothing() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "soak" / "stress.py"), "60", "1"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["tokens"] > 5000
    assert report["cancelled"] > 100
    assert report["grown_kib"] < 1024
