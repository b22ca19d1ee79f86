import re

import pytest
import torch
import torch.nn.functional as F
from support.emulator import same_bits_for_every_schedule
from support.oracle import DTYPES, call, framed, listed, relative_error

from hrmcore import _C
from hrmcore.ops import cross_entropy as page
from hrmcore.ops.cross_entropy import (
    NO_TARGET,
    cases,
    cross_entropy,
    cross_entropy_ref,
    sample_targets,
)

pytestmark = pytest.mark.native

INDICES = range(len(list(cases())))
FRAME = 0.6875


def logits_of(dtype, rows=19, vocabulary=3001, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def log_softmax_losses(logits, targets):
    return F.cross_entropy(logits.double(), targets, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 16, 33, 100, 3001])
def test_forward_kernel(backend, dtype, vocabulary):
    logits, targets = logits_of(dtype, vocabulary=vocabulary)
    losses, lse = torch.full((19,), torch.nan, dtype=torch.float64), torch.full((19,), torch.nan)
    call(_C.cross_entropy_forward, framed(logits), targets, losses, lse)
    reference = log_softmax_losses(logits, targets)
    assert (losses - reference).abs().max() <= 2e-6  # nats: float32's rounding of logits up to 30 apart
    assert vocabulary == 1 or relative_error(losses, reference) <= 1.5e-7
    assert relative_error(lse, logits.double().logsumexp(-1)) <= 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 5, 16, 33, 100, 3001])
def test_backward_kernel_in_place(backend, dtype, vocabulary):
    logits, targets = logits_of(dtype, vocabulary=vocabulary)
    lse = logits.double().logsumexp(-1).float()
    inside = framed(logits, FRAME)
    call(_C.cross_entropy_backward, inside, targets, lse, torch.tensor([0.37]))
    reference = logits.double().requires_grad_()
    (0.37 * F.cross_entropy(reference, targets, reduction="sum")).backward()
    # The few large elements of a row decide its norm: as in `bound`, one rounding, of few numbers.
    assert relative_error(inside, reference.grad) <= (1e-6 if dtype == torch.float32 else 2.0**-8)
    around = torch.ones(inside._base.shape, dtype=torch.bool)
    around[1:-1, 3:-3] = False
    assert bool((inside._base[around] == FRAME).all())


@pytest.mark.parametrize("chunk", [1, 6000, 1 << 23], ids=["64 rows", "some", "one chunk"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", INDICES)
def test_loss_and_gradients(monkeypatch, dtype, index, chunk):
    monkeypatch.setattr(page, "CHUNK_ELEMENTS", chunk)
    hidden, weight, rows, targets = listed(cases, dtype)[index].values()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss, reference = cross_entropy(*ours, rows, targets), cross_entropy_ref(*theirs, rows, targets)
    assert loss.dtype == torch.float32
    assert reference.dtype == torch.float64
    # In bfloat16 the logits are rounded once, and so is every gradient of theirs.
    assert relative_error(loss, reference) <= (3e-7 if dtype == torch.float32 else 2e-3)
    (0.25 * loss).backward()
    (0.25 * reference).backward()
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, exact.grad) <= (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_weights_under_bfloat16_states(dtype):
    """Autocast's case: weights are float32, states bfloat16. The weights' gradient is float32, summed as such."""
    hidden, weight, rows, targets = listed(cases, torch.bfloat16)[4].values()
    ours, theirs = weight.float().requires_grad_(), weight.double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=dtype == torch.bfloat16):
        loss = cross_entropy(hidden, ours, rows, targets)
    loss.backward()
    cross_entropy_ref(hidden.double(), theirs, rows, targets).backward()
    assert ours.grad.dtype == torch.float32
    assert relative_error(ours.grad, theirs.grad) <= 8e-3


def peak_allocation(compute):
    """The most bytes of tensors that existed together while `compute` ran, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@pytest.mark.memory
def test_memory_is_bounded_by_the_chunk(monkeypatch):
    rows, width, vocabulary = 2048, 16, 1024
    monkeypatch.setattr(page, "CHUNK_ELEMENTS", 128 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)

    def peak(op):
        return peak_allocation(lambda: op(hidden, weight, torch.arange(rows), targets).backward())

    full, chunk = 4 * rows * vocabulary, 4 * 128 * vocabulary
    gradients_and_rows = 3 * (hidden.nbytes + weight.nbytes) + 100 * rows
    assert peak(cross_entropy_ref) >= 2 * full
    assert peak(cross_entropy) <= chunk + gradients_and_rows < full / 6


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [333, 336])  # rows at any alignment, and rows of whole 16-byte pieces
def test_same_bits_for_every_schedule(dtype, vocabulary):
    logits, targets = logits_of(dtype, rows=5, vocabulary=vocabulary)

    def compute():
        values, losses, lse = logits.clone(), torch.empty(5, dtype=torch.float64), torch.empty(5)
        call(_C.cross_entropy_forward, values, targets, losses, lse)
        call(_C.cross_entropy_backward, values, targets, lse, torch.tensor([1.0]))
        return values, losses, lse

    assert same_bits_for_every_schedule(compute)


def test_large_logits(backend):
    """Far from zero nothing overflows, and the gradient of a certain, right row is zero."""
    logits = torch.tensor([[3e38, -3e38, 0.0], [-1e30, -1e30, -1e30], [0.0, 90.0, -90.0]])
    losses, lse = torch.empty(3, dtype=torch.float64), torch.empty(3)
    targets = torch.tensor([0, 1, 2])
    call(_C.cross_entropy_forward, logits, targets, losses, lse)
    assert losses[0] == 0
    assert losses[1:].tolist() == pytest.approx([1.0986122886681098, 180.0], rel=1e-6)
    call(_C.cross_entropy_backward, logits, targets, lse, torch.tensor([1.0]))
    assert logits[0].tolist() == [0, 0, 0]
    assert logits[2].tolist() == pytest.approx([0, 1, -1], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_target_has_no_loss(backend, dtype):
    """Whatever stands in it; the others are as they are without it."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 37, generator=generator).to(dtype)
    logits[1, 5] = torch.nan
    alone = logits[::2].clone()
    results = []
    for values, targets in ((logits, torch.tensor([4, NO_TARGET, 36])), (alone, torch.tensor([4, 36]))):
        losses, lse = torch.empty(len(values), dtype=torch.float64), torch.empty(len(values))
        call(_C.cross_entropy_forward, values, targets, losses, lse)
        call(_C.cross_entropy_backward, values, targets, lse, torch.tensor([0.5]))
        results.append((losses, values))
    assert results[0][0][1] == 0
    assert not results[0][1][1].any()
    assert all(torch.equal(a[::2], b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("column", [0, 7, 16, 20])
def test_nan_is_passed_on(backend, column):
    logits = torch.zeros(2, 21)
    logits[1, column] = torch.nan
    losses, lse = torch.empty(2, dtype=torch.float64), torch.empty(2)
    call(_C.cross_entropy_forward, logits, torch.tensor([3, 3]), losses, lse)
    assert losses.isnan().tolist() == lse.isnan().tolist() == [False, True]


def test_sampled_targets_follow_the_distribution(monkeypatch):
    monkeypatch.setattr(page, "CHUNK_ELEMENTS", 1)  # several chunks
    generator = torch.Generator().manual_seed(0)
    state, weight = torch.randn(1, 8, generator=generator), torch.randn(5, 8, generator=generator)
    draws = 20000
    targets = sample_targets(state.expand(draws, 8), weight, torch.arange(draws), generator)
    chances = (state @ weight.T).softmax(-1)[0]
    found = targets.bincount(minlength=5) / draws
    assert ((found - chances).abs() <= 4 * (chances * (1 - chances) / draws).sqrt()).all()
    again = [sample_targets(state, weight, torch.arange(1), torch.Generator().manual_seed(s)) for s in (1, 1)]
    assert torch.equal(*again)


def test_no_rows():
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss = cross_entropy(hidden, weight, none, none)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


HIDDEN, WEIGHT, ROWS, TARGETS = torch.ones(4, 8), torch.ones(5, 8), torch.tensor([0, 2]), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": HIDDEN.double()}, "hidden must be (T, D) float32 or bfloat16, got torch.float64 (4, 8)"),
        ({"hidden": HIDDEN[0]}, "hidden must be (T, D)"),
        ({"weight": WEIGHT[:, :7]}, "weight must be (V, D) with D = 8, got torch.float32 (5, 7)"),
        ({"weight": WEIGHT.int()}, "weight must be (V, D) with D = 8, got torch.int32"),
        ({"rows": ROWS.int()}, "rows must be (R) int64, got torch.int32 (2,)"),
        ({"rows": torch.tensor([0, 4])}, "rows must be strictly rising, in [0, T = 4)"),
        ({"rows": torch.tensor([-1, 2])}, "rows must be strictly rising, in [0, T = 4)"),
        ({"rows": torch.tensor([2, 2])}, "rows must be strictly rising"),
        ({"targets": torch.tensor([1])}, "targets must be of shape (2,), got (1,)"),
        ({"targets": torch.tensor([1, 5])}, "targets must be in [0, 5), the vocabulary (V), or -1, got 5 in row 1"),
        ({"targets": torch.tensor([-2, 0])}, "targets must be in [0, 5), the vocabulary (V), or -1, got -2 in row 0"),
        ({"targets": TARGETS.int()}, "targets must be int64, got int32"),
    ],
)
def test_bad_input(arguments, message):
    good = {"hidden": HIDDEN, "weight": WEIGHT, "rows": ROWS, "targets": TARGETS}
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_entropy(**(good | arguments))


def test_bad_outputs():
    with pytest.raises(ValueError, match=re.escape("losses must be float64, got float32")):
        call(_C.cross_entropy_forward, HIDDEN, torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=re.escape("scale must be of size 1 (one number) in axis 0, got shape (2)")):
        call(_C.cross_entropy_backward, HIDDEN, torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.ones(2))
    with pytest.raises(ValueError, match=re.escape("lse must be of size 4 (R) in axis 0")):
        call(_C.cross_entropy_backward, HIDDEN, torch.zeros(4, dtype=torch.int64), torch.ones(3), torch.tensor([1.0]))
