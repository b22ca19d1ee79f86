"""Batches filled up to buckets, and captured steps: what they compute where a graph is one that runs again."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.graphs import Replayed
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.data.packing import Ahead, BatchStream, Bucket, PackedBatch, pack, pad
from hrmcore.data.records import Corpus
from hrmcore.model import HRM
from hrmcore.ops.cross_entropy import NO_TARGET
from hrmcore.train.captured import CapturedSteps
from hrmcore.train.run_file import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH_TOKENS = 512


def toy(**changes: Any) -> HRM:
    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_layers_per_stack": 1}
    heads = {"num_attention_heads": 2, "head_dim": 16, "H_cycles": 2, "L_cycles": 2}
    return HRM(HRMConfig(**(shape | heads | {"max_position_embeddings": 128} | changes)))


def corpus(count: int = 60) -> Corpus:
    chance = np.random.default_rng(0)
    lengths = chance.integers(3, 90, size=count)
    tokens = chance.integers(37, size=lengths.sum(), dtype=np.int32)
    return Corpus(tokens, np.cumsum([0, *lengths]), (lengths // 2).astype(np.int32).clip(min=1))


def batches(count: int) -> list[PackedBatch]:
    stream = BatchStream(corpus(), BATCH_TOKENS, 0)
    return [next(stream) for _ in range(count)]


def gradients(model: HRM, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Sums over other numbers of rows: float32, in another order."""
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, theirs, strict=True))


def captured(model: HRM, graphs: Replayed) -> CapturedSteps:
    return CapturedSteps(model, BATCH_TOKENS, "sublayer", contextlib.nullcontext, graphs)


# --- buckets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"position_encoding": "xpos", "xpos_scale_base": 64}, {"prefix_lm": False}])
def test_a_padded_batch_has_the_loss_and_the_gradients_of_the_batch(changes: dict[str, Any]) -> None:
    model = toy(**changes)
    for batch in batches(3):
        padded = pad(batch, Bucket(640, 64, 448))
        assert len(padded.ids) == 640 > len(batch.ids)
        assert close(gradients(model, model.padded_loss(padded)), gradients(model, model.loss(batch)))


def test_empty_sequences_change_no_bit() -> None:
    """Tokens and rows as many as the batch is computed with anyway."""
    model, batch = toy(), batches(1)[0]
    same = Bucket.of(batch, 64)
    same = replace(same, tokens=len(batch.ids))
    ours, theirs = (
        gradients(model, loss)
        for loss in (model.padded_loss(pad(batch, replace(same, sequences=64))), model.padded_loss(pad(batch, same)))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_bucket_holds_its_batch_and_few_come() -> None:
    found = [Bucket.of(batch, BATCH_TOKENS) for batch in batches(40)]
    for batch, bucket in zip(batches(40), found, strict=True):
        padded = pad(batch, bucket)
        assert (len(padded.ids), len(padded.prefix), len(padded.supervised)) == (
            bucket.tokens,
            bucket.sequences,
            bucket.supervised,
        )
        assert len(padded.offsets) == bucket.sequences + 1
        assert int(padded.offsets[-1]) == bucket.tokens == len(padded.positions)
        assert int(padded.offsets.diff().max()) == int(batch.offsets.diff().max())
        assert bucket.tokens - len(batch.ids) < 64
        assert (padded.targets[len(batch.targets) :] == NO_TARGET).all()
    assert len(set(found)) <= 12


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch does not fit"):
        pad(batches(1)[0], Bucket(64, 64, 64))


# --- steps ---------------------------------------------------------------------------------------------------------


def test_the_second_batch_of_a_shape_is_captured_and_later_ones_replay() -> None:
    """Bits as of the padded batch run as it is; what was captured is never read before it was computed."""
    model, graphs = toy(), Replayed()
    steps = captured(model, graphs)
    for number, batch in enumerate(batches(12)):
        loss = steps.backward(batch, 3 + number % 2, 7)
        expected = gradients(model, model.padded_loss(pad(batch, Bucket.of(batch, BATCH_TOKENS)), 3 + number % 2) / 7)
        found = [loss, *(p.grad for p in model.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        model.zero_grad(set_to_none=True)
    assert graphs.calls.count("warm") >= graphs.calls.count("capture") >= 1
    assert graphs.calls.count("replay") == 12 - graphs.calls.count("warm")


def test_accumulated_batches_of_one_shape_do_not_write_over_one_another() -> None:
    model, graphs = toy(), Replayed()
    steps, batch = captured(model, graphs), batches(1)[0]
    others = [
        replace(batch, ids=torch.randint(37, batch.ids.shape, generator=torch.Generator().manual_seed(s)))
        for s in range(5)
    ]
    for other in others[:2]:
        steps.backward(other, 5, 3)
    model.zero_grad(set_to_none=True)
    losses = [steps.backward(other, 5, 3) for other in others]
    assert graphs.calls[-5:] == 5 * ["replay"]
    each = [gradients(model, model.padded_loss(pad(other, Bucket.of(other, BATCH_TOKENS)), 5) / 3) for other in others]
    assert all(torch.equal(loss, one[0]) for loss, one in zip(losses, each, strict=True))
    for number, parameter in enumerate(model.parameters(), 1):
        expected = each[0][number]
        for one in each[1:]:
            expected = expected + one[number]
        assert torch.equal(parameter.grad, expected)


def test_an_embedding_outside_of_the_horizon_gets_no_gradient() -> None:
    model = toy()
    steps = captured(model, Replayed())
    for _ in range(3):
        steps.backward(batches(1)[0], 2, 1)
    assert model.embed_tokens.weight.grad is None
    assert model.lm_head.weight.grad is not None


def test_a_wrong_row_is_refused() -> None:
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="rows must be strictly rising"):
        captured(toy(), Replayed()).backward(replace(batch, supervised=batch.supervised.flip(0)), 5, 1)


@pytest.mark.parametrize("keys", [{"device": "cpu"}, {"device": "cuda", "parallel": "sharded"}])
def test_graphs_need_one_whole_model_on_a_gpu(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs device = 'cuda' and parallel = 'data'"):
        TrainConfig(
            model=toy().config, train_files=("none",), tokenizer="none", out="none", steps=1, cuda_graphs=True, **keys
        )


# --- the next batch ------------------------------------------------------------------------------------------------


def test_batches_are_packed_ahead_in_the_same_order_and_the_position_is_that_of_what_was_taken() -> None:
    plain, ahead = (BatchStream(corpus(), BATCH_TOKENS, 0) for _ in range(2))
    packed = Ahead(ahead)
    for _ in range(20):
        assert packed.position == plain.position
        assert next(packed).records == next(plain).records
    packed.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_stream_goes_on_where_one_that_packed_ahead_was_left() -> None:
    """Position and bookmark, across several windows and an epoch's end, are those of the batches that were taken."""
    records, tokens = corpus(1500), 512
    plain, packed = BatchStream(records, tokens, 0), Ahead(BatchStream(records, tokens, 0))
    expected, places = [], []
    for _ in range(150):
        places.append((packed.position, packed.bookmark))
        expected.append(next(plain).records)
        assert next(packed).records == expected[-1]
    packed.close()
    assert {position[0] for position, _ in places} == {0, 1}
    assert len({bookmark for _, bookmark in places}) > 3
    for number in range(0, 150, 7):
        again = BatchStream(records, tokens, 0, *places[number])
        assert [next(again).records for _ in expected[number : number + 40]] == expected[number : number + 40]


def test_what_packing_raised_is_raised_by_next() -> None:
    stream = Ahead(BatchStream(corpus(), 8, 0))  # a record is longer
    with pytest.raises(ValueError, match="raise it to at least that"):
        next(stream)
    stream.close()


def test_packing_a_corpus_gives_what_is_padded() -> None:
    """A last batch that is far from full goes into a smaller bucket."""
    batch = pack(corpus(), [0, 1], BatchStream.MULTIPLE)
    assert Bucket.of(batch, BATCH_TOKENS).tokens < Bucket.of(batches(1)[0], BATCH_TOKENS).tokens
