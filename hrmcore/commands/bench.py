"""`hrmcore bench`: the command around `hrmcore.microbench`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrmcore.microbench import Place

EXAMPLE = """\
examples:
  hrmcore bench                                  all ops, a few minutes
  hrmcore bench rms_norm attention --threads 1 --seconds 2 --json
  hrmcore bench --device cuda                    the CUDA kernels and the fused decode step
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore bench`."""
    parser.epilog = EXAMPLE
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to run (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="seconds to measure each line of the table (0.5)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Check the ops against their references, then time them; on CUDA the decode step after all of them."""
    from hrmcore import microbench

    more = _decode_step if args.device != "cpu" and not args.ops else None
    microbench.run(args.ops or None, args.threads, args.seconds, args.json, args.device, more)
    return 0


def _decode_step(place: Place, seconds: float) -> Iterator[dict[str, Any]]:
    from hrmcore.step_bench import decode_step_lines

    return decode_step_lines(place.device, place.timed, seconds)
