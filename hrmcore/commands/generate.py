"""`hrmcore generate`: one question, one answer."""

from __future__ import annotations

import argparse
import json
import sys
import time

from hrmcore.commands.options import add_generation_arguments, printable, text_options, typed_text

EXAMPLE = """\
examples:
  hrmcore generate "Spell this word backward (example: sun -> nus): lantern"
  hrmcore generate - --model checkpoint/ --temperature 0.7 --seed 1 --json < question.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore generate`."""
    parser.epilog = EXAMPLE
    parser.add_argument("prompt", help="the question; - reads it from standard input")
    parser.add_argument("--model", help="checkpoint folder or cached hub id (default: the embedded model)")
    add_generation_arguments(parser)
    show = argparse.BooleanOptionalAction
    parser.add_argument(
        "--stream", action=show, default=True, help="print the answer as it comes (default), or when it is complete"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: the answer, why it ended, tokens and seconds"
    )


def run(args: argparse.Namespace) -> int:
    """Answer one prompt on standard output."""
    from hrmcore.engine.engine import load

    prompt = typed_text(sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt)
    answer = load(args.model, dtype=args.dtype, threads=args.threads).stream(prompt, **text_options(args))
    started = time.perf_counter()
    pieces = []
    streaming = args.stream and not args.json
    shown = printable if sys.stdout.isatty() else str
    for piece in answer:
        pieces.append(piece)
        if streaming:
            print(shown(piece), end="", flush=True)
    if args.json:
        result = {
            "instruction": prompt,
            "response": "".join(pieces),
            "condition": args.condition,
            "finish": answer.finish,
            "tokens": answer.token_count,
            "seconds": round(time.perf_counter() - started, 3),
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print("" if streaming else shown("".join(pieces)))
    return 0
