"""`hrmcore train`: the command around `hrmcore.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  hrmcore train run.toml          start, or resume where the run folder's newest state stands
  hrmcore train --explain         every key of a run file
  torchrun --nproc-per-node 2 -m hrmcore train run.toml    the same run in two processes, which share its batches;
                                  with parallel = "sharded" in the run file, the model and its optimizer as well

a run file:
  train_files = ["records.jsonl"]    # {"instruction": …, "response": …} a line
  tokenizer = "tokenizer/"
  out = "run/"
  steps = 1000
  [model]
  hidden_size = 256
  intermediate_size = 768
  num_layers_per_stack = 2
  num_attention_heads = 4
  head_dim = 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore train`."""
    parser.epilog = EXAMPLE
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", type=Path, help="the run file (TOML)")
    what.add_argument("--explain", action="store_true", help="print every key of a run file and leave")


def run(args: argparse.Namespace) -> int:
    """Train as the run file says; an interrupted run finishes its step and saves its state first."""
    from hrmcore.train.run_file import explain, read_config

    if args.explain:
        print(explain())
        return 0
    from hrmcore.train.trainer import Trainer

    Trainer(read_config(args.config)).run()
    return 0
