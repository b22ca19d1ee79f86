"""`hrmcore sweep`: a run file trained with several values of its keys; a table and a picture at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

from hrmcore import plots

EXAMPLE = """\
examples:
  hrmcore sweep run.toml --vary learning_rate=1e-4,3e-4,1e-3
  hrmcore sweep run.toml --vary learning_rate=5e-4,1e-3 --vary seed=0,1,2 --set steps=500
  hrmcore sweep run.toml --vary betas=[0.9,0.95],[0.8,0.95] --out betas/

Every combination is a run of its own, one after the other: run-sweep/learning_rate=1e-4/ and so on, each a run folder.
The same command goes on where it was stopped or killed, and runs only what is new when values are added. Runs are
ordered by held-out loss; one that becomes no number is noted, and the next one begins.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore sweep`."""
    parser.epilog = EXAMPLE
    parser.add_argument("config", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=V1,V2,…",
        help="a key of the run file, as `hrmcore train --set` names it, and its values; may be repeated",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same for every run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the runs lie (the run's out, with -sweep)")


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then print the results and draw the runs over one another."""
    from hrmcore.train.sweep import Sweep, table

    sweep = Sweep(args.config, args.vary, args.set, args.out)
    sweep.run(lambda line: print(line, flush=True))
    rows = sweep.trained()
    print("\n".join(table(rows)))
    good = {cell.name: sweep.folder / cell.name / "metrics.jsonl" for cell, result in rows if "failed" not in result}
    if not good:
        raise FloatingPointError("every run became no number; lower the learning rates")
    print(_picture(good, sweep.folder / "sweep.png"))
    print(f"next: hrmcore repl {sweep.checkpoint(rows[0][0])}")
    return 0


def _picture(runs: dict[str, Path], path: Path) -> Path | str:
    """The picture of the runs over one another, or why there is none."""
    from hrmcore.commands.plot import read_metrics

    try:
        plots.check(path)
    except ValueError as error:
        return f"no picture: {error}"
    plots.training({name: read_metrics(metrics) for name, metrics in runs.items()}, path)
    return path
