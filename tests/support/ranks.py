"""One rank of tests/two_ranks.py: it trains what each line of its input says and answers with a line.

In: {"files": a run file for each rank, "port": of rank 0, "poisoned": a record whose loss is NaN, or null,
"dies": the number of the state that rank 0 is killed at, or null}.
Out: {"status": of `hrmcore train`, "errors": its stderr, "held": bytes of model and optimizer at the end}. One process
for many runs: it imports torch only once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import sys

from torch import Tensor

from hrmcore import machine
from hrmcore.averages import local
from hrmcore.cli import main
from hrmcore.data.packing import PackedBatch
from hrmcore.model import HRM
from hrmcore.train.trainer import Trainer

machine.peak_flops = lambda precision, device: 1e12
plain, plain_export, plain_replace = HRM.loss, Trainer.export, os.replace
held = 0


def serve() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        os.environ["MASTER_PORT"] = str(order["port"])
        HRM.loss = plain if order["poisoned"] is None else poisoned(order["poisoned"])  # type: ignore[method-assign]
        if order["dies"] is not None and os.environ["RANK"] == "0":
            os.replace = dying(order["dies"])  # type: ignore[assignment]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = main(["train", order["files"][int(os.environ["RANK"])]])
        print(json.dumps({"status": status, "errors": errors.getvalue(), "held": held}), flush=True)


def poisoned(record: int) -> object:
    """HRM.loss, but NaN for every batch that holds this record."""

    def loss(self: HRM, batch: PackedBatch, *args: object, **options: object) -> Tensor:
        return plain(self, batch, *args, **options) * (float("nan") if record in batch.records else 1)  # type: ignore[arg-type]

    return loss


def dying(last: int) -> object:
    """os.replace, but the process ends before the n-th folder of a state gets its name."""
    states = itertools.count(1)

    def replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        if os.path.isdir(source) and next(states) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        plain_replace(source, target)

    return replace


def counting(self: Trainer) -> None:
    """Trainer.export, before which the memory is counted that the run's tensors hold."""
    global held
    held = sum({t.data_ptr(): t.nbytes for t in map(whole_storage, self._tensors().values())}.values())
    plain_export(self)


def whole_storage(tensor: Tensor) -> Tensor:
    """What this rank keeps for a tensor, be it a view of something larger."""
    part = local(tensor.detach())
    return part.new_empty(0).set_(part.untyped_storage())


Trainer.export = counting  # type: ignore[method-assign]

if __name__ == "__main__":
    serve()
