"""`hrmcore convert`: a checkpoint packed for the CPU engine, or as a GGUF file for llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  hrmcore convert checkpoint/ packed/ --dtype int8
  hrmcore generate "Spell this word backward (example: sun -> nus): lantern" --model packed/
  hrmcore convert checkpoint/ model.gguf --to gguf --dtype int8      for llama.cpp: float32, bfloat16, Q8_0, Q4_0

the embedded model as the checkpoint:
  hrmcore convert $(python -c "import hrmcore.engine; print(hrmcore.engine.EMBEDDED_MODEL)") packed/

llama.cpp reads prompts causally. A model that was trained to see them both ways answers otherwise there; the command
says so.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore convert`."""
    parser.epilog = EXAMPLE
    parser.add_argument("checkpoint", help="checkpoint folder or cached hub id")
    parser.add_argument("out", help="folder to write, made where it does not exist; with --to gguf, a new .gguf file")
    parser.add_argument("--to", choices=("packed", "gguf"), default="packed", help="for whom (packed: our CPU engine)")
    parser.add_argument("--dtype", default="int8", help="weights in float32, bfloat16, int8 or int4 (int8)")


def run(args: argparse.Namespace) -> int:
    """Pack a checkpoint into a file that loads at once, or write it for llama.cpp."""
    from hrmcore.checkpoint.gguf_file import convert_to_gguf
    from hrmcore.engine.cpu_runner import convert

    if args.to == "gguf":
        notes = convert_to_gguf(args.checkpoint, args.out, args.dtype)
        print("\n".join([_size(Path(args.out)), *(f"note: {note}" for note in notes)]))
        return 0
    print(_size(convert(args.checkpoint, args.out, args.dtype)))
    return 0


def _size(path: Path) -> str:
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB"
