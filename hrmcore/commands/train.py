"""`hrmcore train`: the command around `hrmcore.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  hrmcore train run.toml          start, or resume from the newest state in the run folder
  hrmcore train run.toml --set learning_rate=1e-3 --set out=run2    with other values than the file's
  hrmcore train run.toml --from-step 500 --set out=run2 --set learning_rate=1e-4    go on from a kept state, elsewhere
  hrmcore train --explain         every key of a run file
  torchrun --nproc-per-node 2 -m hrmcore train run.toml    two processes, which share the batches of the run; with
                                  parallel = "sharded" in the run file, also the model and the optimizer's state

a run file that trains on the store of `hrmcore prepare --help` in a minute:
  train_files = ["store/"]        # it brings its tokenizer; or files of records, with tokenizer = "folder"
  out = "run/"                    # metrics.jsonl, states/ and checkpoint/
  steps = 20
  batch_tokens = 1024
  [model]
  hidden_size = 64
  intermediate_size = 192
  num_layers_per_stack = 1
  num_attention_heads = 2
  head_dim = 32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore train`."""
    parser.epilog = EXAMPLE
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", type=Path, help="the run file (TOML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the run file with another value, as learning_rate=1e-3 or model.head_dim=64; may be repeated",
    )
    parser.add_argument(
        "--from-step",
        type=int,
        metavar="N",
        help="begin where the run file's run stood after step N, in another folder: --set out=FOLDER",
    )
    what.add_argument("--explain", action="store_true", help="print every key of a run file and leave")


def run(args: argparse.Namespace) -> int:
    """Train as the run file says; an interrupted run finishes its step and saves its state first."""
    from hrmcore.train.explanation import explain
    from hrmcore.train.run_file import read_config

    if args.explain:
        print(explain())
        return 0
    from hrmcore.train.trainer import Trainer

    config = read_config(args.config, args.set)
    Trainer(config, None if args.from_step is None else _start(args, config.out)).run()
    return 0


def _start(args: argparse.Namespace, out: str) -> Path:
    """The state to begin with, in the folder that the run file itself names."""
    from hrmcore.checkpoint.training_state import state_of
    from hrmcore.train.run_file import read_config

    own = Path(read_config(args.config).out)
    if own.resolve() == Path(out).resolve():
        raise ValueError(f"--from-step goes on in another folder, so that {own} stays as it is; add --set out=FOLDER")
    return state_of(own, args.from_step)[1]
