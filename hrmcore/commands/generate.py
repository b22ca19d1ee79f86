"""`hrmcore generate`: one question, one answer. Also the options that every command which generates shares."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hrmcore.engine.engine import TextOptions

EXAMPLE = """\
examples:
  hrmcore generate "What is 17 + 25?"
  hrmcore generate - --model checkpoint/ --temperature 0.7 --seed 1 --json < question.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore generate`."""
    parser.epilog = EXAMPLE
    parser.add_argument("prompt", help="the question; - reads it from standard input")
    parser.add_argument("--model", help="checkpoint folder or cached hub id (default: the embedded model)")
    add_generation_arguments(parser)
    show = argparse.BooleanOptionalAction
    parser.add_argument("--stream", action=show, default=True, help="print the answer as it comes, or when complete")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the answer and why it ended")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """How to load a model, and the options of `Engine.stream`."""
    sampling = parser.add_argument_group("generation")
    sampling.add_argument("--condition", default="direct", metavar="NAMES", help="direct, cot, synth, noisy or several")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold mass P")
    sampling.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (1)")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; may be repeated")
    sampling.add_argument("--seed", type=int, metavar="N", help="draw the same answer every time")
    loading = parser.add_argument_group("loading")
    loading.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, int8 or int4")
    loading.add_argument("--threads", type=int, metavar="N", help="threads to compute with")


def text_options(args: argparse.Namespace) -> TextOptions:
    """The options of `Engine.stream` among the parsed arguments."""
    return {
        "condition": args.condition,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop": args.stop,
        "seed": args.seed,
    }


def run(args: argparse.Namespace) -> int:
    """Answer one prompt on standard output."""
    from hrmcore.engine.engine import load

    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
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


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than newline and tab become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
