"""Train, grow and run hierarchical recurrent language models.

The public names are imported when first used, so `import hrmcore` alone stays fast and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrmcore import optim
    from hrmcore.config import HRMConfig
    from hrmcore.engine.engine import load
    from hrmcore.growth import operators as growth
    from hrmcore.growth.operators import grow
    from hrmcore.model import HRM

# Public name -> the module that holds it.
_HOMES = {"load": "engine.engine", "HRM": "model", "HRMConfig": "config", "grow": "growth.operators"}
# Public modules.
_MODULES = ("growth", "optim")

__all__ = ["HRM", "HRMConfig", "grow", "growth", "load", "optim"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hrmcore")
    if name in _MODULES:
        return importlib.import_module(f"hrmcore.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'hrmcore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hrmcore.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES, "__version__"})
