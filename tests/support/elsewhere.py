"""A device that is none: tensors that claim another one than the CPU, where their numbers lie.

What mixes operands of two devices, or reads numbers that are not on the CPU, fails here as it would on a GPU. The
device is called "meta", the only one besides the CPU for which autograd asks nothing of the build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CROSSING = ("aten::_to_copy", "aten::copy_")  # what may see both devices
# For these the host waits on a GPU: what they return, or its shape, depends on numbers there. multinomial checks them.
READING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "multinomial", "bincount"),
        *("unique_dim", "_unique2", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
    )
}
_waits: list[str] = []


class Elsewhere(Tensor):
    """A tensor whose numbers, `inner`, are for operations that lie where it does."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        claimed = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        claimed.inner = inner
        return claimed

    def tolist(self) -> Any:
        _waits.append("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def another_device() -> Iterator[list[str]]:
    """DEVICE holds numbers in this context; autocast does not know it.

    Yields a list that grows by a name whenever the host would wait for the device.
    """
    _waits.clear()
    with mock.patch("torch.is_autocast_enabled", return_value=False), _Device():
        yield _waits


def inner_of(tensor: Tensor) -> Tensor:
    """The numbers, for a kernel that is called by address; the tensor must be on DEVICE."""
    assert isinstance(tensor, Elsewhere), "an operand of a kernel is on the CPU"
    return tensor.inner


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    theirs = {id(x.inner): x for x in leaves if isinstance(x, Elsewhere)}
    ours = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim()]
    crosses = func._schema.name in CROSSING
    masked = func._schema.name == "aten::index" and any(
        x.dtype == torch.bool for x in leaves[1:] if isinstance(x, Tensor)
    )
    if theirs and (func._schema.name in READING or masked):
        _waits.append(func._schema.name)
    assert crosses or not (theirs and ours), f"{func}: operands on two devices"
    leaving, kwargs = bool(theirs), dict(kwargs)
    if kwargs.get("device") is not None:
        leaving = torch.device(kwargs["device"]) == DEVICE
        kwargs["device"] = "cpu"
    if crosses and func._schema.name == "aten::copy_":
        leaving = isinstance(args[0], Elsewhere)
    if theirs and crosses and not leaving:
        _waits.append("to the host")
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not leaving:
        return out

    def claimed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return theirs[id(x)] if id(x) in theirs else Elsewhere(x)  # what works in place returns its operand

    return tree_map(claimed, out)
