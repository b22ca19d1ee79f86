"""Fused optimizers: Sophia (G and H), AdamAtan2, AdamW, each with an average of the weights (EMA) if asked for.

A step is one pass over memory, in place: one call of a kernel for all parameters of a group on a device. Kernels and
formulas: csrc/ops/optim.{h,cpp,cu}. Parameters and gradients are float32, contiguous and on the CPU or CUDA. A
parameter whose `grad` is None is left alone: no decay, no EMA, no step count.

State of a parameter, made when the optimizer is made, so that torch.distributed.checkpoint finds it there: `step`
(one float32 number, on the CPU), and of the parameter's shape, device and sharding `exp_avg`, `exp_avg_sq` (the Adams)
or `hessian` (Sophia), and `ema`. The EMA starts from the weights before a parameter's first step. With `ema_dtype`
torch.bfloat16 it takes half the memory: it is rounded at random, up or down so that the mean is right, for the nearest
number would not move at a decay of 0.9999. That average is not fused: it costs further passes over memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from hrmcore import _C
from hrmcore.averages import exchanged, local, move_rounded
from hrmcore.operands import check_options, check_tensor, run_kernel

__all__ = ["AdamAtan2", "AdamW", "Sophia"]

_COUNTERS = 32  # of clipped coordinates: blocks on a GPU that added to a single one would queue for it


@dataclass
class _Batch:
    """The parameters of one group on one device that have a gradient."""

    group: dict[str, Any]
    device: torch.device
    numbers: list[int] = field(default_factory=list)  # among all parameters, in the order in which they were given
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    grad_scale: Tensor | None = None  # (1) float32 on the device; None is 1

    def of_states(self, key: str) -> list[Any]:
        return [state[key] for state in self.states]


@dataclass(frozen=True)
class _Sample:
    """A sample probe ⊙ hvp of the Hessian's diagonal, a tensor each; for variant G both are the gradient."""

    group: dict[str, Any]
    numbers: list[int]
    parameters: list[Tensor]
    probes: list[Tensor]
    hvps: list[Tensor]


class _Fused(torch.optim.Optimizer):
    """What the three share: early checks, state, EMA, the walk over the parameters."""

    _moments: ClassVar[tuple[str, str]]

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError on an option or a parameter that cannot work."""
        check_options({**self.defaults, **param_group})
        first = sum(len(group["params"]) for group in self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for number, parameter in enumerate(group["params"], first):
                check_tensor("parameter", number, parameter)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            if parameter.requires_grad:
                self._start(parameter, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient; returns the result of `closure`, which runs first.

        Gradients count as if multiplied by `grad_scale`, (1) float32 on any device: clipping them takes no pass of its
        own, and nobody waits for the factor. Raises ValueError, before anything has changed, on a gradient or an option
        that cannot work.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in self._ready():
            batch.grad_scale = None if grad_scale is None else grad_scale.to(batch.device)
            averages = self._averages(batch)
            fused = averages if batch.group["ema_dtype"] == torch.float32 else [None] * len(averages)
            self._update(batch, fused)
            torch._foreach_add_(batch.of_states("step"), 1)
            if fused is not averages and batch.group["ema"] is not None:
                move_rounded(batch.numbers, batch.parameters, batch.states, 1 - batch.group["ema"])
        return loss

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """The model's weights are their EMA inside this context, for evaluation and export; afterwards as before.

        Parameters that have taken no step keep their weights. Raises ValueError when no EMA is kept.
        """
        if all(group["ema"] is None for group in self.param_groups):
            raise ValueError("this optimizer keeps no EMA; make it with ema=0.9999, or another decay")
        pairs = [
            (parameter, self.state[parameter]["ema"])
            for group in self.param_groups
            for parameter in group["params"]
            if group["ema"] is not None and self.state.get(parameter, {}).get("step", 0) > 0
        ]
        with exchanged(pairs):
            yield

    def _update(self, batch: _Batch, averages: Sequence[Tensor | None]) -> None:
        raise NotImplementedError

    def _start(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] = torch.tensor(0.0)
        for name in self._moments:
            state[name] = torch.zeros_like(parameter)
        if group["ema"] is not None:
            state["ema"] = parameter.detach().to(group["ema_dtype"], copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, a pickle or `load_state_dict`, which may be of before an option was there."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("ema_dtype", torch.float32)
            for kept in (self.state[p] for p in group["params"] if "ema" in self.state.get(p, {})):
                kept["ema"] = kept["ema"].to(group["ema_dtype"])  # torch has given it the parameter's

    def _ready(self) -> list[_Batch]:
        """The parameters with gradients, everything checked before the first is touched."""
        batches: list[_Batch] = []
        number = -1
        for group in self.param_groups:
            check_options(group)
            by_device: dict[torch.device, _Batch] = {}
            for parameter in group["params"]:
                number += 1
                if (gradient := parameter.grad) is None:
                    continue
                check_tensor("parameter", number, parameter)
                check_tensor("the gradient of parameter", number, gradient)
                batch = by_device.setdefault(parameter.device, _Batch(group, parameter.device))
                batch.numbers.append(number)
                batch.parameters.append(parameter)
                batch.gradients.append(gradient)
                batch.states.append(self._state(parameter, group))
            batches += by_device.values()
        return batches

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not self.state[parameter]:  # it was frozen when the optimizer was made
            self._start(parameter, group)
        return self.state[parameter]

    def _averages(self, batch: _Batch) -> Sequence[Tensor | None]:
        """The EMA of each parameter; it begins at the weights as they are now, before the first step."""
        if batch.group["ema"] is None:
            return [None] * len(batch.parameters)
        for parameter, state in zip(batch.parameters, batch.states, strict=True):
            if "ema" not in state:
                state["ema"] = parameter.detach().to(batch.group["ema_dtype"], copy=True)
            elif state["step"] == 0:
                state["ema"].copy_(parameter)
        return batch.of_states("ema")


class Sophia(_Fused):
    """Sophia: momentum divided by a running estimate of the Hessian's diagonal, clipped to 1 in every coordinate.

    m = b1 m + (1 − b1) g;  p −= lr·wd·p;  p −= lr · clip(m / max(rho·B·h, eps), 1). Every 10 steps or so, call
    `update_hessian` for h. While h is 0, as it is before the first call, every step is lr times the sign of m.

    `variant` "G" (Gauss-Newton-Bartlett) takes the curvature from squared gradients of labels that the model itself
    sampled; B is then the number of tokens over which that loss was averaged: `batch_tokens`, or what a step is given
    instead. "H" (Hutchinson) takes it from Hessian products; its B is 1. Raises ValueError on numbers out of range: lr
    or weight_decay below 0, a beta or ema outside [0, 1), rho not above 0, eps below 1e-30, batch_tokens below 1 or
    given for H. Source: arXiv 2305.14342.

    >>> loss_of_sampled_labels.backward()  # the mean over the batch; the model's own labels at supervised positions
    >>> sophia.update_hessian()
    >>> sophia.zero_grad()
    """

    _moments = ("exp_avg", "hessian")

    def __init__(
        self,
        params: ParamsT,
        variant: str = "G",
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        eps: float = 1e-12,
        ema: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
        batch_tokens: int | None = None,
    ) -> None:
        if variant not in ("G", "H"):
            raise ValueError(f"variant must be 'G' or 'H', got {variant!r}")
        self.variant = variant
        self._step_tokens: int | None = None  # what a step was given
        self._clipped: dict[torch.device, Tensor] = {}  # counts of the last step
        self._counted = 0  # the coordinates of which those are counts
        options = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "eps": eps, "ema": ema}
        super().__init__(params, **options, ema_dtype=ema_dtype, batch_tokens=batch_tokens)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError on an option or a parameter that cannot work."""
        given = param_group.get("batch_tokens", self.defaults["batch_tokens"])
        if given is not None:
            self._tokens_of_step(given)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle needs; torch's own list knows nothing of the variant."""
        return {**super().__getstate__(), "variant": self.variant}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, a pickle or `load_state_dict`; what was saved before batch_tokens was an option has none."""
        super().__setstate__(state)
        self._step_tokens = None
        self._clipped, self._counted = {}, 0
        for group in self.param_groups:
            group.setdefault("batch_tokens", self.defaults.setdefault("batch_tokens", None))

    @property
    def clipped(self) -> tuple[int, int]:
        """The coordinates, of this process's shards, that the last step clipped, and all that it stepped."""
        return sum(int(count.sum()) for count in self._clipped.values()), self._counted

    @property
    def clipped_fraction(self) -> float:
        """The share of coordinates, of this process's shards, that the last step clipped; NaN before the first."""
        clipped, counted = self.clipped
        return clipped / counted if counted else math.nan

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        batch_tokens: int | None = None,
    ) -> Any:
        """One step. `batch_tokens`, for variant G, stands for the optimizer's own in this step alone.

        Raises ValueError, before anything has changed, when neither is there for G, or as the optimizer itself does.
        """
        for group in self.param_groups:
            self._tokens_of_step(group["batch_tokens"] if batch_tokens is None else batch_tokens)
        self._step_tokens = batch_tokens
        self._clipped.clear()
        self._counted = 0
        return super().step(closure, grad_scale=grad_scale)

    def _tokens_of_step(self, tokens: int | None) -> int:
        """B of a step, from what it or the group was given."""
        if self.variant == "H":
            if tokens is not None:
                raise ValueError("batch_tokens is for variant G only; H's curvature does not depend on the batch size")
            return 1
        if tokens is None:
            raise ValueError("variant G needs batch_tokens: Sophia(batch_tokens=n), or step(batch_tokens=n)")
        if tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1 for variant G, got {tokens}")
        return tokens

    def _update(self, batch: _Batch, averages: Sequence[Tensor | None]) -> None:
        group = batch.group
        if batch.device not in self._clipped:
            self._clipped[batch.device] = torch.zeros(_COUNTERS, dtype=torch.int64, device=batch.device)
        run_kernel(
            _C.sophia_step,
            batch.device,
            batch.numbers,
            batch.parameters,
            batch.gradients,
            batch.of_states("exp_avg"),
            batch.of_states("hessian"),
            averages,
            self._clipped[batch.device],
            float(group["lr"]),
            group["betas"][0],
            group["weight_decay"],
            group["rho"],
            self._tokens_of_step(group["batch_tokens"] if self._step_tokens is None else self._step_tokens),
            group["eps"],
            group["ema"] or 0.0,
            batch.grad_scale,
        )
        self._counted += sum(local(parameter).numel() for parameter in batch.parameters)

    def update_hessian(self, loss: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Update h with one curvature sample ĥ: h = b2 h + (1 − b2) ĥ.

        G: ĥ = g², g being the gradients as they stand, of the mean loss of labels sampled from the model's own
        distribution. The gradients are left alone: clear them before the next backward.
        H: ĥ = u ⊙ ∇²L u with the probe u normal, drawn from `generator`, and L = `loss`, a scalar that must be twice
        differentiable: compute it inside hrmcore.ops.backend.reference_ops(). The gradients are left alone.

        Raises ValueError when `loss` is missing for H or given for G, and for H on sharded parameters. Raises
        FloatingPointError, with nothing changed, when the sample is not finite: it would stay in h. On sharded
        parameters every rank then raises, so call it on all of them.
        """
        if (loss is not None) != (self.variant == "H"):
            raise ValueError("update_hessian takes the loss for variant H, and nothing for variant G")
        samples = self._gauss_newton() if loss is None else self._hutchinson(loss, generator)
        self._refuse_nonfinite(samples)
        for sample in samples:
            hessians = [self._state(parameter, sample.group)["hessian"] for parameter in sample.parameters]
            device, b2 = sample.parameters[0].device, sample.group["betas"][1]
            run_kernel(_C.sophia_curvature, device, sample.numbers, hessians, sample.probes, sample.hvps, b2)

    def _gauss_newton(self) -> list[_Sample]:
        return [_Sample(b.group, b.numbers, b.parameters, b.gradients, b.gradients) for b in self._ready()]

    def _hutchinson(self, loss: Tensor, generator: torch.Generator | None) -> list[_Sample]:
        for group in self.param_groups:
            check_options(group)
        everything = [(group, p) for group in self.param_groups for p in group["params"]]
        if any(isinstance(p, DTensor) for _, p in everything):
            raise ValueError("variant H needs whole parameters and these are sharded; variant G works on shards")
        trained = [(index, group, p) for index, (group, p) in enumerate(everything) if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, _, p in trained], create_graph=True, allow_unused=True)
        used = [(*entry, g) for entry, g in zip(trained, gradients, strict=True) if g is not None]
        probes = [
            torch.randn(p.shape, generator=generator, device=generator.device if generator else p.device).to(p.device)
            for _, _, p, _ in used
        ]
        curved = [(g, u) for (*_, g), u in zip(used, probes, strict=True) if g.requires_grad]
        if not curved:
            raise ValueError("the loss has no second derivative; compute it from the parameters, in reference_ops()")
        hvps = torch.autograd.grad(  # Hessian-vector products ∇²L u
            [g for g, _ in curved], [p for _, _, p, _ in used], [u for _, u in curved], materialize_grads=True
        )
        return [
            _Sample(group, [number], [p], [probe], [hvp.contiguous()])
            for (number, group, p, _), probe, hvp in zip(used, probes, hvps, strict=True)
        ]

    @torch.no_grad()
    def _refuse_nonfinite(self, samples: Sequence[_Sample]) -> None:
        """Raise FloatingPointError when a product probe ⊙ hvp is not finite, on this rank or another."""
        entries = [
            (number, (local(probe) * local(hvp)).isfinite().all())
            for sample in samples
            for number, probe, hvp in zip(sample.numbers, sample.probes, sample.hvps, strict=True)
        ]
        finite = torch.stack([flag.to(entries[0][1].device) for _, flag in entries]).tolist() if entries else []
        faulty = [number for (number, _), sound in zip(entries, finite, strict=True) if not sound]
        if self._on_any_rank(bool(faulty)):
            where = f"parameter {faulty[0]}" if faulty else "another rank's shards"
            raise FloatingPointError(f"the curvature sample is not finite in {where}")

    def _on_any_rank(self, here: bool) -> bool:
        """Whether `here` is true on any of the ranks that the parameters are sharded over."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor):
                    flag = torch.tensor(float(here), device=parameter.device)
                    dist.all_reduce(flag, dist.ReduceOp.MAX, parameter.device_mesh.get_group())
                    return bool(flag)
        return here


class AdamAtan2(_Fused):
    """AdamW with an arctangent in place of m̂ / (√v̂ + eps): no epsilon, and the scale of the gradients does not matter.

    `form` "hrm-text", the default, is the update of HRM-Text's own trainer: p −= lr · atan2(m, √v̂) / (1 − b1ᵗ), the
    momentum's bias corrected outside the arctangent. "paper" corrects it inside: p −= lr · atan2(m̂, √v̂), which is
    arXiv 2407.05872 with its constants a = b = 1. With b1 = 0.9 a first step is 0.997 lr in the one and π/4 lr in the
    other; after 100 steps they agree to 3e-5. Raises ValueError on another form, and on numbers out of range: lr or
    weight_decay below 0, a beta or ema outside [0, 1). Sources: arXiv 2407.05872; github.com/sapientinc/HRM-Text,
    models/adam_atan2.py.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
        form: str = "hrm-text",
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ema": ema, "ema_dtype": ema_dtype}
        super().__init__(params, **options, form=form)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, a pickle or `load_state_dict`; what was saved before there were two forms had the paper's."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("form", "paper")

    def _update(self, batch: _Batch, averages: Sequence[Tensor | None]) -> None:
        paper = batch.group["form"] == "paper"
        _run_adam(_C.adam_atan2_paper_step if paper else _C.adam_atan2_step, batch, averages, eps=0.0)


class AdamW(_Fused):
    """Adam with decoupled weight decay: p −= lr·wd·p; p −= lr · m̂ / (√v̂ + eps).

    Raises ValueError on numbers out of range: lr or weight_decay below 0, a beta or ema outside [0, 1), eps below
    1e-30. Source: arXiv 1711.05101.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        ema: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema": ema}
        super().__init__(params, **options, ema_dtype=ema_dtype)

    def _update(self, batch: _Batch, averages: Sequence[Tensor | None]) -> None:
        _run_adam(_C.adamw_step, batch, averages, eps=batch.group["eps"])


def _run_adam(kernel: Callable[..., None], batch: _Batch, averages: Sequence[Tensor | None], eps: float) -> None:
    group = batch.group
    run_kernel(
        kernel,
        batch.device,
        batch.numbers,
        batch.parameters,
        batch.gradients,
        batch.of_states("exp_avg"),
        batch.of_states("exp_avg_sq"),
        averages,
        [int(step) + 1 for step in batch.of_states("step")],
        float(group["lr"]),
        *group["betas"],
        group["weight_decay"],
        eps,
        group["ema"] or 0.0,
        batch.grad_scale,
    )
