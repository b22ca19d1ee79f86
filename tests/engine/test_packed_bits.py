"""The bits of packed weights are the same on every processor, so a packed file serves any machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.model import HRM
from hrmcore.ops.rope import rope_table

pytestmark = pytest.mark.native

CONFIG = HRMConfig(131, 129, 200, 1, 3, 64, 1, 1, max_position_embeddings=64)  # nothing fills its last panel or group

# Recorded from kernels whose packing test_engine_core.py compares with PyTorch's arithmetic.
DIGESTS = {
    "float32": "9ff77c0ce511fbd0",
    "bfloat16": "5e50da007e8ea3cd",
    "int8": "e555445fb3edd7fc",
    "int4": "cdfde5551b7702cd",
}


def weights(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The same on any machine: integer arithmetic, exact conversions and powers of two, then one rounding."""
    words = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(1_000_003 * seed)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    fractions = (words >> np.uint64(11)).astype(np.float64) / 2.0**53 - 0.5
    sizes = 0.5 ** np.arange(8)
    return (fractions * sizes[words & np.uint64(7)]).astype(np.float32).reshape(shape)


def packed(dtype: str) -> _C.Engine:
    core = _C.Engine(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        L_layers=1,
        H_layers=1,
        num_heads=CONFIG.num_attention_heads,
        head_dim=CONFIG.head_dim,
        H_cycles=1,
        L_cycles=1,
        eps=CONFIG.rms_norm_eps,
        embedding_scale=1.0,
        rope=rope_table(64, CONFIG.head_dim, CONFIG.rope_theta),
        dtype=dtype,
        kv_dtype="float32",
        threads=1,
        cache_tokens=64,
    )
    core.allocate_weights()
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in HRM(CONFIG).state_dict().items()}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        if name != "rope_table":
            core.set_weight(name, weights(shape, seed))
    return core


@pytest.mark.parametrize("dtype", DIGESTS)
def test_packed_weights_have_the_bits_of_every_other_machine(dtype: str, isa: str) -> None:
    core = packed(dtype)  # packed_weights() borrows from it
    assert hashlib.sha256(core.packed_weights()).hexdigest()[:16] == DIGESTS[dtype]
