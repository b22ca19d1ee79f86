"""`hrmcore convert`: the command around `hrmcore.engine.cpu_runner.convert`."""

from __future__ import annotations

import argparse

EXAMPLE = """\
examples:
  hrmcore convert checkpoint/ packed/ --dtype int8
  hrmcore generate "Spell this word backward (example: sun -> nus): lantern" --model packed/

the embedded model as the checkpoint:
  hrmcore convert $(python -c "import hrmcore.engine; print(hrmcore.engine.EMBEDDED_MODEL)") packed/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore convert`."""
    parser.epilog = EXAMPLE
    parser.add_argument("checkpoint", help="checkpoint folder or cached hub id")
    parser.add_argument("out", help="folder to write; created where it does not exist")
    parser.add_argument("--dtype", default="int8", help="weights in float32, bfloat16, int8 or int4 (int8)")


def run(args: argparse.Namespace) -> int:
    """Pack a checkpoint into a file that loads at once."""
    from hrmcore.engine.cpu_runner import convert

    path = convert(args.checkpoint, args.out, args.dtype)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
