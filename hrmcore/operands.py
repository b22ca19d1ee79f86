"""What the optimizers' kernels take: their tensors and options checked, and handed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore.averages import local


def run_kernel(kernel: Callable[..., None], device: torch.device, numbers: list[int], *operands: object) -> None:
    """Call a kernel on tensors, lists of tensors and numbers, in the order of the device's stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kernel(numbers, *[_exported(operand) for operand in operands], stream=stream)


def _exported(operand: Any) -> Any:
    if isinstance(operand, list):
        return [_exported(entry) for entry in operand]
    return to_dlpack(local(operand)) if isinstance(operand, Tensor) else operand


def check_tensor(what: str, number: int, tensor: Tensor) -> None:
    """Raise ValueError, saying `what` number `number` is, on a tensor that no kernel takes."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} {number} must be dense, got layout {tensor.layout}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} {number} must be on the CPU or CUDA, got {tensor.device}")
    if tensor.dtype != torch.float32:
        raise ValueError(f"{what} {number} must be float32, got {tensor.dtype}")
    if not tensor.is_contiguous():
        shape = tuple(tensor.shape)
        raise ValueError(f"{what} {number} must be contiguous, got shape {shape} with strides {tensor.stride()}")


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError, naming the option, on a number with which no step makes sense."""
    for name, allowed, expected in (
        ("lr", lambda x: 0 <= x < math.inf, "at least 0"),
        ("weight_decay", lambda x: 0 <= x < math.inf, "at least 0"),
        ("rho", lambda x: 0 < x < math.inf, "above 0"),
        ("eps", lambda x: 1e-30 <= x < math.inf, "at least 1e-30"),  # it divides, in float32
        ("betas", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers in [0, 1)"),
        ("ema", lambda x: x is None or 0 <= x < 1, "None or in [0, 1)"),
        ("ema_dtype", lambda x: x in (torch.float32, torch.bfloat16), "torch.float32 or torch.bfloat16"),
        ("form", lambda x: x in ("hrm-text", "paper"), "'hrm-text' or 'paper'"),
    ):
        if name in options and not _holds(allowed, options[name]):
            raise ValueError(f"{name} must be {expected}, got {options[name]!r}")


def _holds(allowed: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(allowed(value))
    except TypeError:
        return False
