"""What several commands share: the options of an answer, and text that is safe to show at a terminal."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hrmcore.engine.engine import TextOptions


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of an answer (`Engine.stream`), and how to load the model."""
    sampling = parser.add_argument_group("generation")
    sampling.add_argument(
        "--condition",
        default="direct",
        metavar="NAMES",
        help="how to answer: direct, cot, synth, noisy, or several with commas (direct)",
    )
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="above 0, tokens are drawn at random; 0 always takes the most probable one (0)",
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probabilities reach P"
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens less probable than P times the most probable one"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens that have occurred become less probable (1)",
    )
    sampling.add_argument(
        "--stop", action="append", type=typed_text, metavar="TEXT", help="end the answer before TEXT; may be repeated"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same answer")
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--dtype", default="auto", help="weights in float32, bfloat16, int8 or int4 (auto: as the checkpoint has them)"
    )
    loading.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")


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


def typed_text(text: str) -> str:
    """A text from the command line or standard input: UTF-8 whatever the locale.

    In a locale that cannot say them, Python makes lone surrogates of the bytes. What is no UTF-8 stays as it is.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than newline and tab become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
