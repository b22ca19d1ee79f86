"""Models on the disk, in the hrm_text format; the public names. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrmcore._lazy import lazy

if TYPE_CHECKING:
    from hrmcore.checkpoint.hrm_text import Arrays as Arrays
    from hrmcore.checkpoint.hrm_text import Tensors as Tensors
    from hrmcore.checkpoint.hrm_text import key_table as key_table
    from hrmcore.checkpoint.hrm_text import load_model as load_model
    from hrmcore.checkpoint.hrm_text import read_config as read_config
    from hrmcore.checkpoint.hrm_text import read_tensors as read_tensors
    from hrmcore.checkpoint.hrm_text import released_config as released_config
    from hrmcore.checkpoint.hrm_text import resolve as resolve
    from hrmcore.checkpoint.hrm_text import save_model as save_model

__getattr__, __dir__ = lazy(
    __name__,
    {
        "hrm_text": [
            "Arrays",
            "Tensors",
            "key_table",
            "load_model",
            "read_config",
            "read_tensors",
            "released_config",
            "resolve",
            "save_model",
        ],
    },
)
