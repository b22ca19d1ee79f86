"""Models, their files and their runs made larger, the function unchanged; the public names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrmcore._lazy import lazy

if TYPE_CHECKING:
    from hrmcore.growth.files import grow_files as grow_files
    from hrmcore.growth.operators import KINDS as KINDS
    from hrmcore.growth.operators import MODES as MODES
    from hrmcore.growth.operators import SIZES as SIZES
    from hrmcore.growth.operators import Growth as Growth
    from hrmcore.growth.operators import Kind as Kind
    from hrmcore.growth.operators import grow as grow

__getattr__, __dir__ = lazy(
    __name__,
    {
        "files": ["grow_files"],
        "operators": ["KINDS", "MODES", "SIZES", "Growth", "Kind", "grow"],
    },
)
