"""`hrmcore bench`: checks every op's cases against float64, then times the largest beside plain torch.

Speeds are given as shares of what this machine can do at most, which is measured in the same run: a plain copy of as
many bytes, and multiply-adds in registers or, where it is faster, a large matrix product of the op's type. Shapes are
those of each op's cases().
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import hrmcore.ops
from hrmcore import _C
from hrmcore.machine import Work, best_times, copy_of, gemm, limits, multiply_adds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # norm(out - ref) / norm(ref), the reference in float64

Case = dict[str, Any]


class WrongKernelError(RuntimeError):
    """A kernel disagrees with its reference; it is not timed."""


def op_names() -> list[str]:
    """The ops: every page in hrmcore/ops that has cases()."""
    names = [module.name for module in pkgutil.iter_modules(hrmcore.ops.__path__)]
    return [name for name in names if hasattr(_page(name), "cases")]


def run(ops: list[str] | None, threads: int | None, seconds: float, as_json: bool) -> dict[str, Any]:
    """Check, time and print the named ops (None: all of them) on the instruction set in use; returns the report.

    `threads` None keeps the present number; `seconds` is the time spent on each printed line; `as_json` prints the
    report as one JSON object instead of a table. Raises ValueError on an unknown op, a time that is not positive or a
    bad number of threads, and WrongKernelError when a kernel disagrees with its reference.
    """
    known = op_names()
    for name in ops or []:
        if name not in known:
            raise ValueError(f"bench: no op is called {name!r}; choose from {', '.join(known)}")
    if not seconds > 0:
        raise ValueError(f"bench: seconds must be positive, got {seconds}")
    with _threads(threads):
        report: dict[str, Any] = {"machine": limits(seconds), "ops": []}
        if not as_json:
            print(_heading(report["machine"]))
        for name in ops or known:
            check(name)
            for line in _time_op(name, seconds):
                report["ops"].append(line)
                if not as_json:
                    print(_row(line), flush=True)
    if as_json:
        print(json.dumps(report))
    return report


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


def check(name: str) -> None:
    """Hold an op's outputs and gradients in every case against its reference in float64, or raise WrongKernelError."""
    page = _page(name)
    for dtype, torch_dtype in DTYPES.items():
        for index, case in enumerate(page.cases(torch_dtype)):
            ours = _differentiate(getattr(page, name), case, [key for key, x in case.items() if _floating(x)])
            exact = {key: x.double() if _floating(x) else x for key, x in case.items()}
            theirs = _differentiate(getattr(page, f"{name}_ref"), exact, ours["gradients"])
            for what in ("outputs", "gradients"):
                # Joined, for one alone may be zero, as the gradient of a query with one key.
                out, reference = _joined(ours[what].values()), _joined(theirs[what].values())
                error = float((out - reference).norm() / reference.norm())
                if not error <= ALLOWED_ERROR[dtype]:
                    raise WrongKernelError(
                        f"{name}, case {index}, {dtype}, {_C.isa()}: the error of the {what} is {error:.3g}, "
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


def _time_op(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    page = _page(name)
    multiply_add, register_flops = multiply_adds()
    op, peer = getattr(page, name), getattr(page, "peer", getattr(page, f"{name}_ref"))
    for dtype, torch_dtype in DTYPES.items():
        product, product_flops = gemm(dtype)
        case = list(page.cases(torch_dtype))[-1]
        shape = "x".join(str(size) for size in next(iter(case.values())).shape)
        differentiable = _differentiate(op, case, [key for key, x in case.items() if _floating(x)])["gradients"]
        ours, theirs = _calls(op, case, differentiable), _calls(peer, case, differentiable)
        for direction in ("forward", "backward"):
            work = page.work(case, backward=direction == "backward")
            calls = [ours[direction], theirs[direction], copy_of(work["bytes"]), multiply_add, product]
            taken, peer_taken, copying, in_registers, multiplied = best_times(calls, seconds)
            computing = work["flops"] / max(register_flops / in_registers, product_flops / multiplied)
            yield {
                "op": name,
                "direction": direction,
                "dtype": dtype,
                "shape": shape,
                "seconds": taken,
                "peer_seconds": peer_taken,
                "gbs": work["bytes"] / taken / 1e9,
                "gflops": work["flops"] / taken / 1e9,
                "bound": "memory" if copying > computing else "compute",
                "share_of_limit": max(copying, computing) / taken,
                "times_torch": peer_taken / taken,
            }


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
    return (
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}\n"
        f"limits: read {machine['read_gbs']:.1f} GB/s, copy {machine['copy_gbs']:.1f} GB/s, "
        f"float32 {machine['float32_gflops']:.0f} GFLOP/s\n\n"
        f"{'op':<17}{'':<10}{'dtype':<10}{'shape':<12}{'ms':>9}  {'speed':>14}  {'of limit':>8}  {'x torch':>7}"
    )


def _row(line: dict[str, Any]) -> str:
    speed = f"{line['gbs']:.1f} GB/s" if line["bound"] == "memory" else f"{line['gflops']:.1f} GFLOP/s"
    return (
        f"{line['op']:<17}{line['direction']:<10}{line['dtype']:<10}{line['shape']:<12}{1e3 * line['seconds']:>9.3f}"
        f"  {speed:>14}  {line['share_of_limit']:>8.0%}  {line['times_torch']:>7.2f}"
    )
