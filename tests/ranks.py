"""One rank of tests/test_distributed.py: it trains what each line of its input says and answers with a line.

In: {"files": a run file for each rank, "port": of rank 0, "poisoned": a record whose loss is NaN, or null}.
Out: {"status": of `hrmcore train`, "errors": its stderr}. One process for many runs: it imports torch only once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

from torch import Tensor

from hrmcore import microbench
from hrmcore.cli import main
from hrmcore.data import PackedBatch
from hrmcore.model import HRM

microbench.peak_flops = lambda precision: 1e12
plain = HRM.loss


def serve() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        os.environ["MASTER_PORT"] = str(order["port"])
        HRM.loss = plain if order["poisoned"] is None else poisoned(order["poisoned"])  # type: ignore[method-assign]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = main(["train", order["files"][int(os.environ["RANK"])]])
        print(json.dumps({"status": status, "errors": errors.getvalue()}), flush=True)


def poisoned(record: int) -> object:
    """HRM.loss, but NaN for every batch that holds this record."""

    def loss(self: HRM, batch: PackedBatch, *args: object, **options: object) -> Tensor:
        return plain(self, batch, *args, **options) * (float("nan") if record in batch.records else 1)  # type: ignore[arg-type]

    return loss


if __name__ == "__main__":
    serve()
