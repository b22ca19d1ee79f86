"""`hrmcore init`: records in, a run file out whose model and steps fit this machine and a time budget."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from hrmcore.commands.prepare import parse_columns
from hrmcore.data.split import split_records
from hrmcore.data.store import open_store

EXAMPLE = """\
examples:
  hrmcore init records.jsonl                     then: hrmcore train run.toml; hrmcore repl run/checkpoint
  hrmcore init 'chats/*.jsonl' --hours 8 --out chat.toml
  hrmcore init --hours 0.5                       the embedded model's eight puzzles, with reasoning-gym

It writes run.toml, and run-data/ with the stores `train` and `heldout`. hrmcore prepare --help lists what records may
look like. The sizes are proposals: edit the run file as you like.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore init`."""
    parser.epilog = EXAMPLE
    parser.add_argument("files", nargs="*", metavar="FILE", help="records, or a glob pattern in quotes (none: puzzles)")
    parser.add_argument("--hours", type=float, default=1.0, metavar="H", help="how long the training may take (1)")
    parser.add_argument("--out", type=Path, default=Path("run.toml"), metavar="FILE", help="the run file (run.toml)")
    parser.add_argument("--columns", metavar="NAME=KEY,...", help="as of hrmcore prepare")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="longest record in tokens (4096)")


def run(args: argparse.Namespace) -> int:
    """Split and tokenise the records, measure, write the run file and say how to start."""
    if not 0 < args.hours < math.inf:
        raise ValueError(f"--hours must be above 0, got {args.hours:g}")
    if args.context < 1:
        raise ValueError(f"--context must be at least 1, got {args.context}")
    if args.out.suffix != ".toml":
        raise ValueError(f"{args.out}: a run file's name must end in .toml")
    folder, data = args.out.with_suffix(""), args.out.with_name(f"{args.out.stem}-data")
    for path in (args.out, folder, data):
        if path.exists():
            raise FileExistsError(f"{path}: exists already; remove it or name another --out")
    split = split_records(args.files, parse_columns(args.columns or ""), data, args.context)
    from hrmcore.train.proposal import propose, run_file

    try:
        proposal = propose(open_store(data / "train").corpus, split.vocab_size, args.hours, print)
    except BaseException:
        shutil.rmtree(data)  # so that the same command works once what is wrong is mended
        raise
    heldout = data / "heldout" if split.heldout else None
    args.out.write_text(run_file(proposal, split.train, data / "train", heldout, folder), encoding="utf-8")
    for note in split.notes:
        print(note)
    print(f"{data}: {split.train} records to train on, {split.heldout} held out, {split.vocab_size} tokens")
    print(args.out.read_text(encoding="utf-8"), end="")
    print(f"next: hrmcore train {args.out}")
    return 0
