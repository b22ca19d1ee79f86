"""Which implementation the ops run: the kernels, or the plain-torch references."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_reference: ContextVar[bool] = ContextVar("hrmcore_reference_ops", default=False)


def reference_active() -> bool:
    """True inside `reference_ops()`."""
    return _reference.get()


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Run every op through its `X_ref` in this context: any dtype, twice differentiable, slow."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)
