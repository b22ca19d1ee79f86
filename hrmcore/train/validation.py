"""How good a model is on validation records while it trains: loss, and the share of answers that are right."""

from __future__ import annotations

import numpy as np
import torch

from hrmcore.data.packing import BatchStream, epoch_batches, pack
from hrmcore.data.records import Corpus
from hrmcore.model import HRM


@torch.no_grad()
def mean_loss(model: HRM, corpus: Corpus, batch_tokens: int) -> float:
    """Loss a supervised token over all records, in nats."""
    total, count = 0.0, 0
    for records in epoch_batches(corpus.lengths, batch_tokens, seed=0, epoch=0):
        batch = pack(corpus, records, BatchStream.MULTIPLE)
        total += float(model.loss(batch))
        count += len(batch.targets)
    return total / count


@torch.no_grad()
def exact_matches(model: HRM, corpus: Corpus, count: int, batch_tokens: int) -> float:
    """Share of `count` records, evenly spread over the corpus, that greedy decoding answers with the exact response.

    No decoding is needed for that. An answer is right if and only if, after every prefix of the right response, the
    likeliest token is the next token of that response.
    """
    chosen = np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(np.int64))
    right = 0
    for batch_indices in epoch_batches(corpus.lengths[chosen], batch_tokens, seed=0, epoch=0):
        batch = pack(corpus, [int(chosen[index]) for index in batch_indices], BatchStream.MULTIPLE)
        wrong = batch.supervised[model.greedy_tokens(batch).to(batch.targets.device) != batch.targets]
        sequences = torch.bucketize(wrong, batch.offsets[1:].long(), right=True)
        right += len(batch.records) - len(sequences.unique())
    return right / len(chosen)
