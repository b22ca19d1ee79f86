"""Where a run's figures go: metrics.jsonl, one object a step, and on request tensorboard and wandb."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SINKS = ("tensorboard", "wandb")


class Metrics:
    """The figures of a run folder. Those of steps after `step`, which a killed run left, are dropped: they come again.

    `sinks` are some of SINKS; `settings` is what wandb shows as the run's configuration. Raises ValueError, naming what
    to install, when the package of a sink is missing.
    """

    def __init__(
        self, folder: Path, step: int, sinks: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self._file, self._samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        for file in (self._file, self._samples):
            _forget_after(file, step)
        self._sinks = [
            _tensorboard(folder, step) if sink == "tensorboard" else _wandb(folder, settings or {}) for sink in sinks
        ]

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add the figures of one step, its number among them as `step`."""
        _append(self._file, [metrics])
        for log, _ in self._sinks:
            log({name: value for name, value in metrics.items() if name != "step"}, int(metrics["step"]))

    def record_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add answers of one validation to samples.jsonl, the number of the step among them as `step`."""
        _append(self._samples, samples)

    def close(self) -> None:
        """Flush what the sinks still hold."""
        for _, close in self._sinks:
            close()
        self._sinks = []


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{file}: cannot be written ({reason}); the states are intact") from None


def _forget_after(file: Path, step: int) -> None:
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(file)


def shown(metrics: Mapping[str, float]) -> str:
    """The figures of a step that a progress bar has room for."""
    parts = [f"loss={metrics['loss']:.4f}", f"tok/s={metrics['tokens_per_second']:.0f}", f"K={metrics['horizon']}"]
    if (clipped := metrics.get("clipped_fraction")) is not None:
        parts.append(f"clipped={clipped:.2f}")
    if skipped := metrics.get("skipped"):
        parts.append(f"skipped={skipped}")
    return ", ".join(parts)


_Sink = tuple[Callable[[Mapping[str, float], int], None], Callable[[], Any]]  # log the figures of a step; close


def _tensorboard(folder: Path, step: int) -> _Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> _Sink:
    """Offline, so that no network is needed: `wandb sync` sends it later. WANDB_MODE=online asks for more."""
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    name = str(folder.resolve())
    run = wandb.init(
        project="hrmcore",
        name=folder.name,
        id=hashlib.sha256(name.encode()).hexdigest()[:16],  # a resumed run goes on where it was
        resume="allow",
        dir=name,
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=dict(settings),
    )
    return lambda metrics, step: run.log(dict(metrics), step=step), run.finish


def _missing(package: str) -> ValueError:
    return ValueError(f"{package} is not installed; `pip install hrmcore[log]` brings it, or take it out of log")
