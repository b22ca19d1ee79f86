"""One process of tests/test_dropin.py's DDP: three steps on its row of the batch, then its weights into a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hrmcore.config import HRMConfig
from hrmcore.model import HRM
from hrmcore.optim import AdamW

sys.path.append(str(Path(__file__).parents[1]))
from support.runs import MODEL


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = HRM(HRMConfig(vocab_size=40, **MODEL))
    if rank == 0:  # DDP gives the other process these weights
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=1e-3)
    ids = (torch.arange(36).view(2, 18) % 40)[rank : rank + 1]
    for _ in range(3):
        optimizer.zero_grad()
        logits = wrapped(ids, prefix_length=0)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
