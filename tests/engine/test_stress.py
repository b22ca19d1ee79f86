"""Short runs of tests/soak/stress.py and crowd.py; `make tsan` and the commands in their heads run longer ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "soak"


@pytest.mark.slow
def test_cancelled_batches_give_no_wrong_token_and_leak_nothing() -> None:
    command = [sys.executable, str(SOAK / "stress.py"), "60", "1"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["tokens"] > 5000
    assert report["cancelled"] > 100
    assert report["grown_kib"] < 1024


def test_threads_a_loop_handlers_and_finalisers_share_one_engine() -> None:
    command = [sys.executable, str(SOAK / "crowd.py"), "1"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr
    assert json.loads(child.stdout)["wrong"] == []
