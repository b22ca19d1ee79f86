"""Everything that only a GPU can tell about the CUDA kernels, one check after the other, as one JSON object.

    bench/gpu/checklist.sh --out gpu.json         # on a machine with a GPU; builds first
    python -m bench.gpu.checklist --emulated      # the checks' own logic, on the emulator with toy sizes

A check runs in a process of its own, under a time limit, so that neither a hang nor a broken CUDA context reaches the
next. Its record: {name, status: passed | failed | not_run, reason, figures, seconds}; not_run is whatever could not be
asked here, never a kind of passed. Exit status: 0 nothing failed, 1 something did, 2 no GPU and no --emulated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.gpu import checks as gpu_checks
from bench.gpu import devices as gpu_devices
from bench.gpu import endurance as gpu_endurance
from bench.gpu import models as gpu_models
from bench.gpu import prefill as gpu_prefill
from bench.gpu import sampling as gpu_sampling
from bench.gpu.checks import Here, NotRunError, WrongError

CHECKS = (
    gpu_checks.CHECKS
    | gpu_models.CHECKS
    | gpu_sampling.CHECKS
    | gpu_prefill.CHECKS
    | gpu_devices.CHECKS
    | gpu_endurance.CHECKS
)
GOLDENS = Path(__file__).with_name("goldens.json")
LIMIT = 240.0  # seconds for one check
WHOLE = 1200.0  # seconds for all of them


@dataclass
class Record:
    name: str
    status: str
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="toy sizes on the emulator: shows that the checks work")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CHECKS), help="these checks alone")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="the emulator's results (bench/gpu/goldens.json)")
    parser.add_argument("--write-goldens", action="store_true", help="with --emulated: make that file anew and end")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for one check ({LIMIT:g})")
    arguments = parser.parse_args(argv)
    # The device is asked for in a child: a process that has touched CUDA cannot fork others that use it.
    device = None if arguments.emulated else in_child(gpu_checks.gpu, arguments.limit)
    if device is not None and device.status != "passed":
        print(f"no GPU: {device.reason}; give --emulated to try the checks themselves", file=sys.stderr)
        return 2
    here = Here(arguments.emulated, arguments.goldens)
    if arguments.write_goldens:
        if not arguments.emulated:
            parser.error("--write-goldens needs --emulated: goldens are the emulator's results")
        gpu_checks.write_goldens(here)
        return 0
    records = []
    end = time.perf_counter() + WHOLE
    for name in arguments.only or CHECKS:
        left = end - time.perf_counter()
        if left > 0:
            record = in_child(lambda check=CHECKS[name]: check(here), min(left, arguments.limit))
        else:
            record = Record("", "not_run", f"the {WHOLE:g} s for all checks are over")
        record.name = name
        records.append(record)
        print(f"{name:<24} {record.status:<8} {record.seconds:6.1f} s  {record.reason}", file=sys.stderr, flush=True)
    report = report_of(records, "emulated" if device is None else device.figures)
    text = json.dumps(report)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
    return 1 if report["failed"] else 0


def report_of(records: list[Record], device: object) -> dict[str, Any]:
    return {
        "device": device,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        **{status: [r.name for r in records if r.status == status] for status in ("passed", "failed", "not_run")},
        "seconds": sum(r.seconds for r in records),
        "checks": [asdict(record) for record in records],
    }


def in_child(check: Callable[[], dict[str, Any]], limit: float) -> Record:
    """Run a check in a forked process; one that hangs, dies or raises has failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(check, sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        record = receiver.recv() if receiver.poll(limit) else Record("", "failed", f"no answer within {limit:g} s")
    except EOFError:
        process.join()
        record = Record("", "failed", f"the process died with exit status {process.exitcode}")
    process.kill()
    process.join()
    record.seconds = round(time.perf_counter() - started, 3)
    return record


def _answer(check: Callable[[], dict[str, Any]], sender: Connection) -> None:
    # After a fork torch makes its threads' pool anew at the first use. Two threads at once, in which transformers loads
    # weights, would find none.
    torch.set_num_threads(torch.get_num_threads())
    try:
        record = Record("", "passed", figures=check())
    except NotRunError as reason:
        record = Record("", "not_run", str(reason), reason.figures)
    except WrongError as error:
        record = Record("", "failed", str(error))
    except Exception as error:
        traceback.print_exc()
        record = Record("", "failed", f"{type(error).__name__}: {error}")
    sender.send(record)
    sender.close()
    sys.stderr.flush()
    os._exit(0)  # the parent's exit handlers are not this process's


if __name__ == "__main__":
    sys.exit(main())
