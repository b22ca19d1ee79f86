"""`hrmcore prepare`: records in, a token store out."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from hrmcore.data.prepare import FITTING, prepare
from hrmcore.data.records import KeyCounts, Rejected
from hrmcore.data.show import shown
from hrmcore.data.store import TOKENIZER, Store
from hrmcore.tokenizer import Tokenizer

EXAMPLE = """\
examples:
  hrmcore prepare math.jsonl chat.jsonl --tokenizer tokenizer/ --out store/
  hrmcore prepare 'data/*.jsonl.gz' --new-tokenizer 32768 --cap chat=100000 --weight math=2.5 --out store/
  hrmcore prepare trivia.csv --columns instruction=question,response=answer --new-tokenizer 512 --out store/ --show 3

a file is JSON lines, a JSON array (.json), .csv, .tsv, .txt or .parquet, each perhaps .gz, .bz2, .xz or .zst. A
record has
  {"instruction": "What is 17 + 25?", "response": "42", "condition": "direct"}      the condition may be left out
  {"instruction": ..., "input": ..., "output": ...}     or "prompt" and "completion"
  {"messages": [{"role": "user", "content": ...}, ...]}     or "conversations" with "from" and "value"
  {"text": ...}     plain text, or a .txt file of it: the loss is on all of it; long ones are cut into pieces
  text under "context" or "input" follows the instruction after a blank line (both: context first); other keys are
  not used; the summary counts and names them. A conversation becomes a record for each assistant turn

to try it:
  for i in $(seq 1000); do echo '{"instruction": "What is '$i' + 1?", "response": "'$((i + 1))'"}'; done > sums.jsonl
  hrmcore prepare sums.jsonl --new-tokenizer auto --out store/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore prepare`."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="records, or a glob pattern in quotes; a file is one source, named like it without its endings",
    )
    parser.add_argument("--out", type=Path, required=True, help="the store, a folder that does not exist yet")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a folder with tokenizer.model or tokenizer.json, or a store"
    )
    which.add_argument(
        "--new-tokenizer",
        type=vocabulary_size,
        metavar="SIZE",
        help="train one of SIZE tokens on the records; auto: of a size that fits them",
    )
    parser.add_argument(
        "--columns",
        metavar="NAME=KEY,...",
        help="which key or column holds instruction, response, context, input, condition, messages or text",
    )
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="longest record in tokens (4096)")
    parser.add_argument(
        "--cap",
        action="append",
        default=[],
        metavar="NAME=N",
        help="keep at most N records of a source; may be repeated",
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="an epoch sees the records of a source W times, as 2.5 or 0.5, after its cap; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides which records a cap keeps (0)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at a record that cannot be used, instead of leaving it out"
    )
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print the tokens of the first N records, prefix and loss apart",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one for each core)")


def run(args: argparse.Namespace) -> int:
    """Write the store and say what went into it."""
    store = prepare(
        args.files,
        args.out,
        tokenizer=args.tokenizer,
        new_tokenizer=args.new_tokenizer,
        context=args.context,
        columns=parse_columns(args.columns or ""),
        caps=parse_caps(args.cap),
        weights=parse_weights(args.weight),
        seed=args.seed,
        strict=args.strict,
        workers=args.workers,
    )
    for line in shown(store.corpus, Tokenizer.load(store.folder / TOKENIZER), args.show, sys.stdout.isatty()):
        print(line)
    print("\n".join([*summary(store), *next_step(store)]))
    return 0


def next_step(store: Store) -> list[str]:
    """What to do with a store."""
    return [
        f'next: a run file with train_files = ["{store.folder}"], for `hrmcore train run.toml`;',
        "      `hrmcore train --help` has an example",
    ]


def vocabulary_size(text: str) -> int:
    """A number of tokens, or auto. Raises ArgumentTypeError on anything else."""
    if text == "auto":
        return FITTING
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, or auto, got {text!r}")
    return int(text)


def parse_columns(text: str) -> dict[str, str]:
    """NAME=KEY,NAME=KEY as a mapping. Raises ValueError on another form or a name that comes twice."""
    columns: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, key = (side.strip() for side in part.partition("="))
        if not name or not key:
            raise ValueError(f"--columns must be NAME=KEY,NAME=KEY, got {part!r}")
        if name in columns:
            raise ValueError(f"--columns names {name!r} twice")
        columns[name] = key
    return columns


def parse_caps(texts: Sequence[str]) -> dict[str, int]:
    """NAME=N texts as a mapping. Raises ValueError on another form or a name that comes twice."""
    caps: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--cap must be NAME=N with N at least 1, got {text!r}")
        if name in caps:
            raise ValueError(f"--cap names {name!r} twice")
        caps[name] = int(number)
    return caps


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """NAME=W texts as a mapping. Raises ValueError on another form or a name that comes twice."""
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise ValueError(f"--weight must be NAME=W with W a number, as chat=2.5, got {text!r}")
        if name in weights:
            raise ValueError(f"--weight names {name!r} twice")
        weights[name] = weight
    return weights


def summary(store: Store) -> list[str]:
    """What went into a store and what was left out, as a person reads it."""
    lines = []
    for name, source in store.manifest["sources"].items():
        lines.append(f"{name}: {source['kept']} of {source['read']} records kept")
        if conversations := source.get("conversations"):  # stores of before lack it
            lines.append(f"  {conversations} conversations: a record for each answer in them")
        if texts := source.get("texts"):
            lines.append(f"  {texts} texts, each in pieces that the context of {store.manifest['context']} takes")
        rejected = Rejected(counts=source["left_out"], examples=source["left_out_examples"])
        keys = KeyCounts()
        keys.joined.update(source.get("joined_keys", {}))  # stores of before lack both
        keys.unused.update(source.get("unused_keys", {}))
        lines += [f"  {line}" for line in [*rejected.report(), *keys.report()]]
        if weight := source.get("weight"):
            lines.append(f"  weight {weight:g}: an epoch sees each {weight:g} times")
        if source["beyond_cap"]:
            lines.append(f"  {source['beyond_cap']} left out: beyond the cap of {source['cap']}")
    values = store.manifest
    size = sum(entry["bytes"] for entry in values["files"].values()) / 1e6
    lines.append(
        f"{store.folder}: {values['records']} records, {values['tokens']} tokens, the longest record has "
        f"{values['longest']}; {size:.1f} MB"
    )
    return lines
