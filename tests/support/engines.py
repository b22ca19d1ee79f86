"""What tests of the engine share: models packed from memory, and how far two results are from each other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrmcore import _C
from hrmcore.model import HRM


def set_weights(core: _C.Engine, model: HRM) -> None:
    """Pack a model's weights into an engine without any."""
    core.allocate_weights()
    for name, tensor in model.state_dict().items():
        if name != "rope_table":
            core.set_weight(name, tensor)


def distance(ours: Tensor | NDArray[np.float32], theirs: Tensor | NDArray[np.float32]) -> float:
    """norm(ours - theirs) / norm(theirs), in float64. A wrong shape is an error."""
    a, b = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())
