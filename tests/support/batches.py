"""A small packed batch of random tokens, for what needs no corpus."""

from __future__ import annotations

import torch

from hrmcore.data.packing import PackedBatch


def batch(lengths: tuple[int, ...] = (9, 1, 14, 70), prefix: tuple[int, ...] = (4, 0, 14, 66)) -> PackedBatch:
    """Sequences of these lengths over a vocabulary of 37, every third token supervised."""
    generator = torch.Generator().manual_seed(1)
    tokens, ints = sum(lengths), torch.int32
    supervised = torch.arange(0, tokens, 3)
    return PackedBatch(
        ids=torch.randint(37, (tokens,), generator=generator),
        offsets=torch.tensor([0, *lengths]).cumsum(0).to(ints),
        prefix=torch.tensor(prefix, dtype=ints),
        positions=torch.cat([torch.arange(n, dtype=ints) for n in lengths]),
        supervised=supervised,
        targets=torch.randint(37, (len(supervised),), generator=generator),
        records=tuple(range(len(lengths))),
    )
