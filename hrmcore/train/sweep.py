"""One run file trained with several values of its keys, a run after the other, each in a folder of its own."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hrmcore.checkpoint.training_state import lock
from hrmcore.durable import replacing
from hrmcore.train.run_file import TrainConfig, read_config
from hrmcore.train.trainer import Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RECORD = "sweep.json"
_MOST = 1000  # runs of a sweep


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its values as the command line had them, and its folder's name."""

    values: dict[str, str]

    @property
    def name(self) -> str:
        """Such as learning_rate=1e-3,seed=2."""
        return re.sub(r"[^\w.=,+\[\]-]", "_", ",".join(self.changes))

    @property
    def changes(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{key}={value}" for key, value in self.values.items()]


def cells_of(vary: Sequence[str]) -> list[Cell]:
    """Every combination of KEY=V1,V2,… texts. Raises ValueError on another form, or a key or value that comes twice."""
    axes: dict[str, list[str]] = {}
    for text in vary:
        key, equals, listed = (part.strip() for part in text.partition("="))
        values = _values(listed)
        if not key or not equals or not values:
            raise ValueError(f"--vary must be KEY=VALUE,VALUE,…, got {text!r}")
        if key in axes:
            raise ValueError(f"--vary {key}: is there twice")
        if key == "out":
            raise ValueError("--vary out: each run has a folder of its own anyway; --out names the one around them")
        if len(set(values)) < len(values):
            raise ValueError(f"--vary {key}: a value is there twice in {listed}")
        axes[key] = values
    if (count := math.prod(map(len, axes.values()))) > _MOST:
        raise ValueError(f"--vary: {count} runs; a sweep has at most {_MOST}")
    return [Cell(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def _values(listed: str) -> list[str]:
    """The texts between commas; with brackets among them, the entries of a TOML array."""
    if "[" not in listed:
        return [text for text in (text.strip() for text in listed.split(",")) if text]
    try:
        return [json.dumps(value) for value in tomllib.loads(f"values = [{listed}]")["values"]]
    except tomllib.TOMLDecodeError:
        raise ValueError(f"--vary: not a list of values: {listed}") from None


class Sweep:
    """The runs of a sweep and what came of them, kept in a folder so that a killed one goes on.

    `changes` are the KEY=VALUE texts that hold for all. Raises ValueError on a run file that a cell cannot be trained
    with, and when the folder holds a sweep of another run file or other changes.
    """

    def __init__(self, run_file: Path, vary: Sequence[str], changes: Sequence[str], out: Path | None) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a sweep trains in one process; start it without torchrun")
        self.cells = cells_of(vary)
        first = read_config(run_file, [*changes, *self.cells[0].changes])
        self.folder = out or Path(f"{first.out.rstrip('/')}-sweep")
        self._configs = {cell.name: self._config(run_file, changes, cell) for cell in self.cells}
        if len(self._configs) < len(self.cells):
            raise ValueError("--vary: two runs would have the same folder")
        text = json.dumps([run_file.read_text(encoding="utf-8"), *changes])
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        self._results: dict[str, dict[str, Any]] = self._read()

    def run(self, say: Callable[[str], None]) -> None:
        """Train what is not trained yet; one that becomes no number is noted, and the next one begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder):
            for number, cell in enumerate(self.cells, start=1):
                if cell.name not in self._results:
                    say(f"run {number} of {len(self.cells)}: {cell.name}")
                    self._results[cell.name] = self._train(cell, say)
                    self._write()

    def trained(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The cells with their results, the best first; those that failed, or whose score is no number, are last."""
        rows = [(cell, self._results[cell.name]) for cell in self.cells]
        scores = {cell.name: float(result.get("score", math.inf)) for cell, result in rows}
        return sorted(rows, key=lambda row: math.inf if math.isnan(scores[row[0].name]) else scores[row[0].name])

    def checkpoint(self, cell: Cell) -> Path:
        """The model that a cell's run exported."""
        return self.folder / cell.name / "checkpoint"

    def _config(self, run_file: Path, changes: Sequence[str], cell: Cell) -> TrainConfig:
        own = [*changes, *cell.changes, f"out={json.dumps(str(self.folder / cell.name))}"]
        try:
            return read_config(run_file, own)
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from None

    def _train(self, cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
        config = self._configs[cell.name]
        try:
            Trainer(config).run()
        except FloatingPointError as error:
            say(f"{cell.name}: {error}")
            return {"failed": str(error)}
        finally:
            gc.collect()  # the model and its optimizer, before the next ones are made
        return result_of(self.folder / cell.name / "metrics.jsonl", best=config.patience > 0)

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / _RECORD
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            digest, results = record["run_file"], dict(record["runs"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not the record of a sweep; name another --out") from None
        if digest != self._digest:
            raise ValueError(f"{self.folder}: a sweep of another run file, or with other --set; name another --out")
        return results

    def _write(self) -> None:
        with replacing(self.folder / _RECORD) as [temporary]:
            record = {"run_file": self._digest, "runs": self._results}
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def result_of(metrics: Path, best: bool) -> dict[str, Any]:
    """The figures of a finished run: of its last validation, or its `best`; the loss of its last twentieth.

    `score` is what sweeps are ordered by, the held-out loss, or without one the loss.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    checked = [row for row in rows if "heldout_loss" in row]
    result = {"steps": len(rows), "loss": fmean(row["loss"] for row in rows[-max(1, len(rows) // 20) :])}
    if checked:
        chosen = min(checked, key=lambda row: row["heldout_loss"]) if best else checked[-1]
        names = ("heldout_loss", "heldout_exact")
        result |= {"step": chosen["step"]} | {name: chosen[name] for name in names if name in chosen}
    return result | {"score": result.get("heldout_loss", result["loss"])}


def table(rows: Sequence[tuple[Cell, Mapping[str, Any]]]) -> list[str]:
    """The results as lines with aligned columns, under a heading."""
    names = ("steps", "loss", "heldout_loss", "heldout_exact")
    shown = [name for name in names if any(name in result for _, result in rows)]
    lines = [[*rows[0][0].values, *shown]]
    for cell, result in rows:
        figures = [_figure(result[name]) if name in result else "-" for name in shown]
        lines.append([*cell.values.values(), *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    failed = ["", *("  became no number" if "failed" in result else "" for _, result in rows)]
    return [line + note for line, note in zip(text, failed, strict=True)]


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
