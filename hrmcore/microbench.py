"""`hrmcore bench`: checks every op's cases against float64, then times the largest beside plain torch.

Speeds are given as shares of what this machine can do at most, which is measured in the same run: a plain copy of as
many bytes, and multiply-adds in registers or, where it is faster, a large matrix product of the op's type. Shapes are
those of each op's cases(). On a CUDA device times are those between its events, and torch is compiled where that is
faster.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import hrmcore.ops
from hrmcore import _C
from hrmcore.machine import (
    Work,
    best_times,
    copy_of,
    cuda_limits,
    cuda_seconds,
    gemm,
    limits,
    multiply_adds,
    wall_seconds,
)
from hrmcore.ops.backend import require_cuda

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # norm(out - ref) / norm(ref), the reference in float64

CUDA_HEAD_DIM = 128  # the largest that attention's kernels for CUDA take

Case = dict[str, Any]
Timer = Callable[[Work], float]


@dataclass(frozen=True)
class Place:
    """Where kernels run and by which clock; `compiles`: whether torch may compile what they are compared with."""

    device: str = "cpu"
    timed: Timer = wall_seconds
    compiles: bool = False

    @property
    def on_cuda(self) -> bool:
        return self.timed is not wall_seconds

    @property
    def name(self) -> str:
        return self.device if self.on_cuda else _C.isa()

    def cases(self, page: ModuleType, dtype: torch.dtype) -> list[Case]:
        """An op's cases, on the device; those that its kernels do not take left out."""
        cases = page.cases(dtype)
        if not self.on_cuda:
            return list(cases)
        taken = [case for case in cases if "q" not in case or case["q"].shape[-1] <= CUDA_HEAD_DIM]
        return [{k: x.to(self.device) if hasattr(x, "to") else x for k, x in case.items()} for case in taken]

    def computing(self, dtype: str) -> list[tuple[Work, int]]:
        """What computes fastest here, and its FLOPs."""
        product = gemm(dtype, self.device)
        return [product] if self.on_cuda else [multiply_adds(), product]


class WrongKernelError(RuntimeError):
    """A kernel disagrees with its reference; it is not timed."""


def op_names() -> list[str]:
    """The ops: every page in hrmcore/ops that has cases()."""
    names = [module.name for module in pkgutil.iter_modules(hrmcore.ops.__path__)]
    return [name for name in names if hasattr(_page(name), "cases")]


def run(
    ops: list[str] | None,
    threads: int | None,
    seconds: float,
    as_json: bool,
    device: str = "cpu",
    more: Callable[[Place, float], Iterator[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Check, time and print the named ops (None: all of them) on the instruction set in use; returns the report.

    `threads` None keeps the present number; `seconds` is the time spent on each printed line; `as_json` prints the
    report as one JSON object instead of a table. `more` gives lines of what is no op.

    Raises ValueError on an unknown op, a time that is not positive, a bad number of threads or a device that is not
    there, and WrongKernelError when a kernel disagrees with its reference.
    """
    known = op_names()
    for name in ops or []:
        if name not in known:
            raise ValueError(f"bench: no op is called {name!r}; choose from {', '.join(known)}")
    if not seconds > 0:
        raise ValueError(f"bench: seconds must be positive, got {seconds}")
    place = place_of(device)
    with _threads(threads):
        machine = cuda_limits(seconds, device) if place.on_cuda else limits(seconds)
        report: dict[str, Any] = {"machine": machine, "ops": []}
        if not as_json:
            print(_heading(machine))
        for line in _lines(ops or known, place, seconds, more):
            report["ops"].append(line)
            if not as_json:
                print(_row(line), flush=True)
    if as_json:
        print(json.dumps(report))
    return report


def place_of(device: str) -> Place:
    """Where kernels are timed: cpu, cuda or cuda:N. Raises ValueError on another, and where there is none."""
    if device == "cpu":
        return Place()
    if re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise ValueError(f"bench: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    try:
        require_cuda()
    except RuntimeError as error:
        raise ValueError(f"bench: {error}") from None
    count = torch.cuda.device_count()
    if (torch.device(device).index or 0) >= count:
        raise ValueError(f"bench: device {device!r}: this machine has {count} CUDA devices, numbered from 0")
    torch.cuda.set_device(device)
    return Place(device, cuda_seconds, compiles=True)


def _lines(
    names: list[str],
    place: Place,
    seconds: float,
    more: Callable[[Place, float], Iterator[dict[str, Any]]] | None,
) -> Iterator[dict[str, Any]]:
    for name in names:
        check(name, place)
        yield from _time_op(name, seconds, place)
    if more is not None:
        yield from more(place, seconds)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    ours, torchs = _C.num_threads(), torch.get_num_threads()
    _C.set_num_threads(ours if threads is None else threads)
    torch.set_num_threads(_C.num_threads())
    try:
        yield
    finally:
        _C.set_num_threads(ours)
        torch.set_num_threads(torchs)


def _page(name: str) -> ModuleType:
    return importlib.import_module(f"hrmcore.ops.{name}")


# Checking


def check(name: str, place: Place = Place()) -> None:
    """Hold an op's outputs and gradients in every case against its reference in float64, or raise WrongKernelError."""
    page = _page(name)
    for dtype, torch_dtype in DTYPES.items():
        for index, case in enumerate(place.cases(page, torch_dtype)):
            ours = _differentiate(getattr(page, name), case, [key for key, x in case.items() if _floating(x)])
            exact = {key: x.double() if _floating(x) else x for key, x in case.items()}
            theirs = _differentiate(getattr(page, f"{name}_ref"), exact, ours["gradients"])
            for what in ("outputs", "gradients"):
                # Joined, for one alone may be zero, as the gradient of a query with one key.
                out, reference = _joined(ours[what].values()), _joined(theirs[what].values())
                error = float((out - reference).norm() / reference.norm())
                if not error <= ALLOWED_ERROR[dtype]:
                    raise WrongKernelError(
                        f"{name}, case {index}, {dtype}, {place.name}: the error of the {what} is {error:.3g}, "
                        f"allowed are {ALLOWED_ERROR[dtype]:g}; it is not timed"
                    )


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _differentiate(op: Callable[..., Any], case: Case, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The op's outputs, and its gradients to the named arguments that it has one for."""
    inputs = {key: case[key].detach().requires_grad_() for key in names}
    outputs = _as_tuple(op(**(case | inputs)))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
    return {
        "outputs": {str(index): out for index, out in enumerate(outputs)},
        "gradients": {key: g for key, g in zip(inputs, gradients, strict=True) if g is not None},
    }


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# Timing


def _time_op(name: str, seconds: float, place: Place) -> Iterator[dict[str, Any]]:
    page = _page(name)
    op, peer = getattr(page, name), getattr(page, "peer", getattr(page, f"{name}_ref"))
    for dtype, torch_dtype in DTYPES.items():
        computing, computed_flops = zip(*place.computing(dtype), strict=True)
        case = place.cases(page, torch_dtype)[-1]
        shape = "x".join(str(size) for size in next(iter(case.values())).shape)
        differentiable = _differentiate(op, case, [key for key, x in case.items() if _floating(x)])["gradients"]
        ours = _calls(op, case, differentiable)
        peers = _peers(peer, case, differentiable, place)
        for direction in ("forward", "backward"):
            work = page.work(case, backward=direction == "backward")
            beside = [calls[direction] for calls in peers.values()]
            calls = [ours[direction], copy_of(work["bytes"], place.device), *computing, *beside]
            taken, copying, *others = best_times(calls, seconds, place.timed)
            peak = max(flops / time for flops, time in zip(computed_flops, others, strict=False))
            peer_taken, best = min(zip(others[len(computing) :], peers, strict=True))
            yield {
                "op": name,
                "direction": direction,
                "dtype": dtype,
                "shape": shape,
                "seconds": taken,
                "peer": best,
                "peer_seconds": peer_taken,
                "gbs": work["bytes"] / taken / 1e9,
                "gflops": work["flops"] / taken / 1e9,
                "bound": "memory" if copying > work["flops"] / peak else "compute",
                "share_of_limit": max(copying, work["flops"] / peak) / taken,
                "times_torch": peer_taken / taken,
            }


def _peers(
    peer: Callable[..., Any], case: Case, differentiable: Iterable[str], place: Place
) -> dict[str, dict[str, Work]]:
    """Plain torch as it is, and compiled where that is asked for and works."""
    found = {"torch": _calls(peer, case, differentiable)}
    if place.compiles:
        with suppress(Exception):  # torch.compile does not take everything
            compiled = _calls(torch.compile(peer, dynamic=False), case, differentiable)
            for call in compiled.values():
                call()
            found["torch, compiled"] = compiled
    return found


def _calls(op: Callable[..., Any], case: Case, differentiable: Iterable[str]) -> dict[str, Work]:
    """An op's forward pass alone and its backward pass alone, to the inputs named."""
    inputs = {key: case[key].detach().requires_grad_() for key in differentiable}
    outputs = _as_tuple(op(**(case | inputs)))
    grads = [torch.ones_like(out) for out in outputs]

    def forward() -> None:
        with torch.no_grad():
            op(**case)

    def backward() -> None:
        torch.autograd.grad(outputs, list(inputs.values()), grads, retain_graph=True)

    return {"forward": forward, "backward": backward}


# Printing


def _heading(machine: dict[str, Any]) -> str:
    if "isa" in machine:
        what = f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
        most = f"read {machine['read_gbs']:.1f} GB/s, copy {machine['copy_gbs']:.1f} GB/s, "
    else:
        what = f"{machine['processor']}, torch {machine['torch']}"
        most = f"copy {machine['copy_gbs']:.0f} GB/s, bfloat16 {machine['bfloat16_gflops']:.0f} GFLOP/s, "
    return (
        f"{what}\nlimits: {most}float32 {machine['float32_gflops']:.0f} GFLOP/s\n\n"
        f"{'op':<17}{'':<10}{'dtype':<10}{'shape':<12}{'ms':>9}  {'speed':>14}  {'of limit':>8}  {'x torch':>7}"
    )


def _row(line: dict[str, Any]) -> str:
    speed = f"{line['gbs']:.1f} GB/s" if line["bound"] == "memory" else f"{line['gflops']:.1f} GFLOP/s"
    return (
        f"{line['op']:<17}{line['direction']:<10}{line['dtype']:<10}{line['shape']:<12}{1e3 * line['seconds']:>9.3f}"
        f"  {speed:>14}  {line['share_of_limit']:>8.0%}  {line['times_torch']:>7.2f}"
    )
