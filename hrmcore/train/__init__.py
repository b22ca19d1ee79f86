"""Training: the loop, its run file, and what a run leaves behind; the public names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrmcore._lazy import lazy

if TYPE_CHECKING:
    from hrmcore.train.optimizers import make_optimizer as make_optimizer
    from hrmcore.train.run_file import TrainConfig as TrainConfig
    from hrmcore.train.run_file import read_config as read_config
    from hrmcore.train.trainer import Trainer as Trainer

__getattr__, __dir__ = lazy(
    __name__,
    {
        "run_file": ["TrainConfig", "read_config"],
        "optimizers": ["make_optimizer"],
        "trainer": ["Trainer"],
    },
)
