"""The tables of RoPE and xPos in numpy, for the engine and, where the bits allow it, for the ops. Imports no torch.

Letters: P positions, d head_dim. Sources: arXiv 2104.09864 (RoPE), 2212.10554 (xPos).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rotary_table(length: int, head_dim: int, theta: float, exact: bool) -> NDArray[np.float32]:
    """The table of `hrmcore.ops.rope.rope_table` without torch: (P, d).

    The two share no code, because torch and numpy round powers, cos and sin differently: the tables differ by one unit
    in the last place here and there, and the model's has to keep its bits. The powers go through float64, because
    numpy's float32 powers are off in the last place, too.
    """
    if exact:
        inv_freq = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        table = np.empty((length, head_dim), np.float32)
        half = head_dim // 2
        for start in range(0, length, 4096):  # the float64 angles of all at once would be another 4 tables
            angles = np.arange(start, min(start + 4096, length))[:, None] * inv_freq
            np.cos(angles, out=table[start : start + 4096, :half], casting="same_kind")
            np.sin(angles, out=table[start : start + 4096, half:], casting="same_kind")
        return table
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def xpos_log_decay(head_dim: int, scale_base: int) -> NDArray[np.float32]:
    """The log decay of xPos: how a score decays with the distance of query and key; (d/2).

    Channel pair i is multiplied by zeta_i^(distance / scale_base) = exp(log_decay_i distance), where
    zeta_i = (2i + 0.4 d) / (1.4 d). Raises ValueError on a head_dim that is odd or below 2, or a scale_base below 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"xpos_log_decay: head_dim must be even and at least 2, got {head_dim}")
    if scale_base < 1:
        raise ValueError(f"xpos_log_decay: scale_base must be at least 1, got {scale_base}")
    zeta = (np.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
    return (np.log(zeta) / scale_base).astype(np.float32)
