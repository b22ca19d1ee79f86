"""`hrmcore bench`: the command around `hrmcore.microbench`."""

from __future__ import annotations

import argparse

EXAMPLE = """\
examples:
  hrmcore bench                                  all ops, a few minutes
  hrmcore bench rms_norm attention --threads 1 --seconds 2 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore bench`."""
    parser.epilog = EXAMPLE
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to run (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="seconds to measure each line of the table (0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Check the ops against their references, then time them."""
    from hrmcore import microbench

    microbench.run(args.ops or None, args.threads, args.seconds, args.json)
    return 0
