"""Where a step that is no number comes from: the records, the rate, the weights, and the first op that gives one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hrmcore.averages import local
from hrmcore.data.packing import PackedBatch
from hrmcore.distributed.world import World
from hrmcore.model import HRM, Block


def wrong(loss: float, norm: float, spike_factor: float, typical_loss: float | None) -> str | None:
    """What is wrong with a step's loss and gradient norm; None when nothing is. A `spike_factor` of 0: no spikes."""
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    if spike_factor and typical_loss is not None and loss > spike_factor * typical_loss:
        return f"the loss {loss:.4g} is more than {spike_factor:g} times the usual {typical_loss:.4g}"
    return None


def causes(
    records: Sequence[int], guilty: Sequence[int], describe: Callable[[int], str], rate: float, largest: float
) -> str:
    """Where a fault may come from, in words: the `guilty` records, whose own loss is not finite, the rate, the weights.

    `largest` is the largest magnitude of a weight.
    """
    named = guilty or records
    shown = ", ".join(describe(record) for record in named[:20]) + ("…" if len(named) > 20 else "")
    weights = f"the largest weight is {largest:.3g}" if math.isfinite(largest) else "a weight is not finite"
    figures = f"learning_rate is {rate:g}, {weights}"
    if 0 < len(guilty) < len(records):
        return (
            f"it comes from the records {shown}; mend or remove them, or set on_nonfinite = 'skip'; "
            f"if they are sound, the rate may be too high or the weights spoilt: {figures}"
        )
    who = f"all {len(records)} records have it" if guilty else "no record has it by itself"
    return (
        f"{who}, so look at the rate and the weights first: {figures}; a lower learning_rate, a longer warmup_steps "
        f"or another init_from may help; the records are {shown}"
    )


def largest_weight(model: HRM, world: World) -> float:
    """The largest magnitude of a weight on any rank, infinite if one is not finite."""
    largest = 0.0
    for parameter in model.parameters():
        if (weight := local(parameter.detach())).numel():
            largest = max(largest, float(weight.abs().max().nan_to_num(math.inf)))
    return max(world.sum(largest if rank == world.rank else 0.0) for rank in range(world.ranks))


def first_op(model: HRM, batch: PackedBatch, horizon: int) -> str | None:
    """Which op is the first whose output is not finite, its inputs being finite; None when none is.

    It runs the loss of a batch and its gradients once more, every op watched. A weight that is not finite is named
    instead. The gradients are cleared afterwards. A sentence without its full stop.
    """
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            return f"the weight {name} is not finite"
    watch = _Watch()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name))
        for name, module in model.named_modules()
        if isinstance(module, Block)
    ]
    try:
        with watch:
            loss = model.loss(batch, horizon=horizon)
            watch.enter(None)
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return watch.found and f"the first op with such a value is {watch.found}"


class _Watch(TorchDispatchMode):
    """Looks at what every op takes and gives, in the forward pass and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self._place: str | None = "the embedding"
        self._visits: dict[str, int] = {}

    def enter(self, block: str | None) -> None:
        """A block begins its next visit; None: backward begins."""
        self._place = None
        if block is not None:
            self._visits[block] = self._visits.get(block, 0) + 1
            self._place = f"visit {self._visits[block]} of {block}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read, written = _operands(func, args, kwargs or {})
        sound = self.found is None and all(map(_finite, tree_leaves(read)))
        result = func(*args, **(kwargs or {}))
        name = str(func.name())
        # What is only allocated holds anything.
        if sound and "empty" not in name and not all(map(_finite, tree_leaves((result, written)))):
            self.found = f"{name} in {self._place or 'backward'}"
        return result


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """What an op reads, and what it writes to, which may hold anything before."""
    declared = func._schema.arguments
    given = {argument.name: value for argument, value in zip(declared, args, strict=False)} | dict(kwargs)
    writes = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    read = [value for name, value in given.items() if name not in writes]
    return read, [value for name, value in given.items() if name in writes]


def _finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())
