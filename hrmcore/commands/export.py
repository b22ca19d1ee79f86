"""`hrmcore export`: a training state of a run as a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  hrmcore export run/                    the newest state, as run/checkpoint-1500
  hrmcore export run/ --step 500         then: hrmcore eval --model run/checkpoint-500 --tasks iq
  hrmcore export run/ --step 500 --out early/ --dtype float32

It writes the averaged weights where the run keeps them. A run keeps its newest states (`keep` in the run file), those
at multiples of `keep_every`, and with `patience` the best. To train on from one of them, in a folder of its own:
  hrmcore train run.toml --from-step 500 --set out=run2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore export`."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `hrmcore train`")
    parser.add_argument("--step", type=int, metavar="N", help="the state after this step (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/checkpoint-N)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights (bfloat16)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's own")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and say how to use it."""
    import torch

    from hrmcore.checkpoint.hrm_text import save_model
    from hrmcore.checkpoint.training_state import state_of
    from hrmcore.train.resume import model_of_state, tokenizer_of_run

    step, path = state_of(args.run, args.step)
    out = args.out or args.run / f"checkpoint-{step}"
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it or name another --out")
    tokenizer = args.tokenizer or tokenizer_of_run(args.run)
    save_model(model_of_state(path), out, dtype=getattr(torch, args.dtype), tokenizer_folder=tokenizer, allow_xpos=True)
    print(f"{out}: the model after step {step}, for hrmcore repl, generate, eval, inspect, convert and grow")
    return 0
