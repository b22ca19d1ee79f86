"""Where figures go. tensorboard and wandb are stood in for: what is tested is what they are asked to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hrmcore.train.metrics import Metrics

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the two packages are called with."""
    calls: Calls = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append(("close",))

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda metrics, step: calls.append((metrics, step)), finish=lambda: calls.append(("finish",))
        )

    for name, attribute in (("torch.utils.tensorboard", SummaryWriter), ("wandb", init)):
        module = ModuleType(name)
        setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tensorboard_gets_every_figure_and_forgets_what_comes_again(tmp_path: Path, calls: Calls) -> None:
    metrics = Metrics(tmp_path, 4, ["tensorboard"])
    metrics.record({"step": 5, "loss": 1.5, "horizon": 2})
    metrics.close()
    opened = ("open", str(tmp_path / "tensorboard"), 5)
    assert calls == [opened, ("loss", 1.5, 5), ("horizon", 2, 5), ("close",)]
    metrics.close()
    assert calls[-2:] == [("horizon", 2, 5), ("close",)]  # once


def test_wandb_is_offline_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for step in (0, 5):
        metrics = Metrics(tmp_path, step, ["wandb"], {"seed": 7})
        metrics.record({"step": step + 1, "loss": 1.5})
        metrics.close()
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first == second
    assert (first["mode"], first["resume"], first["config"], first["dir"]) == (
        *("offline", "allow", {"seed": 7}, str(tmp_path)),
    )
    assert [call for call in calls if call[0] != "init"] == [
        *(({"loss": 1.5}, 1), ("finish",), ({"loss": 1.5}, 6), ("finish",)),
    ]
    monkeypatch.setenv("WANDB_MODE", "online")
    Metrics(tmp_path / "other", 0, ["wandb"])
    assert calls[-1][1]["mode"] == "online"
    assert calls[-1][1]["id"] != first["id"]


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{sink} is not installed; `pip install hrmcore\[log\]` brings it"):
        Metrics(tmp_path, 0, [sink])


def test_lines_beyond_the_state_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6')
    metrics = Metrics(tmp_path, 3)
    metrics.record({"step": 4, "loss": 0.5})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        *({"step": step} for step in (1, 2, 3)),
        {"step": 4, "loss": 0.5},
    ]
