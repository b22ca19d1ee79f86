"""The bytes that tensors of a pretended device hold at once: torch's "meta", on which nothing is computed.

Tensors of the model's real size can be made there; main memory is the CPU's.
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hrmcore.model import HRM

DEVICE = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts in its context; `peak` is the most that was held at once, `now` what is.

    A model without weights, which hrmcore makes on "meta" too, counts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._counting = True

    def __enter__(self) -> LiveBytes:
        self._patch = mock.patch.object(HRM, "__init__", self._not_counted(HRM.__init__))
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def _not_counted(self, made: Any) -> Any:
        def without(*args: Any, **kwargs: Any) -> None:
            self._counting = False
            made(*args, **kwargs)
            self._counting = True

        return without

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not self._counting:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
