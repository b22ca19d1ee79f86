"""The engine's tables of positions against the model's, and against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hrmcore.ops import rope
from hrmcore.positions import rotary_table, xpos_log_decay

UNIT = 2.0**-24  # half a unit in the last place of numbers just below 1


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("length", "head_dim", "theta"), [(1, 2, 1e4), (300, 16, 1e4), (5000, 128, 5e5)])
def test_the_engines_angles_are_the_models_but_for_the_last_place(
    length: int, head_dim: int, theta: float, exact: bool
) -> None:
    ours, models = rotary_table(length, head_dim, theta, exact), rope.rope_table(length, head_dim, theta, exact).numpy()
    assert ours.shape == (length, head_dim)
    assert ours.dtype == np.float32
    # Both round cos and sin. Angles in float32 are themselves off by half a unit in their last place, in both tables.
    allowed = 2 * UNIT if exact else 2 * UNIT + 2 * UNIT * length
    assert np.abs(ours.astype(np.float64) - models).max() <= allowed


def test_exact_angles_are_the_formula_rounded_once() -> None:
    table = rotary_table(4097, 8, 1e4, exact=True)  # more than one block of angles
    angles = np.arange(4097)[:, None] * 1e4 ** -(np.arange(0, 8, 2) / 8)
    assert np.array_equal(table, np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def test_the_decay_is_the_formula_rounded_once_and_the_models() -> None:
    decay = xpos_log_decay(16, 512)
    zeta = [(2 * i + 0.4 * 16) / (1.4 * 16) for i in range(8)]
    assert decay.tolist() == [np.float32(np.log(z) / 512) for z in zeta]
    assert np.array_equal(decay, rope.xpos_log_decay(16, 512).numpy())
    assert bool((decay[:-1] < decay[1:]).all())
    assert decay[-1] < 0


@pytest.mark.parametrize(
    ("head_dim", "scale_base", "message"), [(3, 512, "even"), (0, 512, "even"), (8, 0, "scale_base")]
)
def test_what_is_no_decay_is_refused(head_dim: int, scale_base: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xpos_log_decay(head_dim, scale_base)
