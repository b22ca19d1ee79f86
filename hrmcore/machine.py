"""What this machine can do and hold: the peak of its arithmetic and of its memory, and what is free of the latter."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hrmcore import _C

Work = Callable[[], object]


def limits(seconds: float) -> dict[str, Any]:
    """What this machine can do at most on the instruction set and threads in use: GB/s and float32 GFLOP/s."""
    source = torch.ones(1 << 26)  # 256 MiB: more than most caches
    sums = torch.empty(-(-len(source) // _C.stream_block))
    multiply_add, flops = multiply_adds()
    read = best_times([lambda: _C.stream_read(source, sums)], seconds)[0]
    copy = best_times([copy_of(2 * source.nbytes)], seconds)[0]
    computing = best_times([multiply_add], seconds)[0]
    return {
        "processor": processor(),
        "isa": _C.isa(),
        "threads": _C.num_threads(),
        "torch": torch.__version__,
        "read_gbs": source.nbytes / read / 1e9,
        "copy_gbs": 2 * source.nbytes / copy / 1e9,
        "float32_gflops": flops / computing / 1e9,
    }


def cuda_limits(seconds: float, device: str) -> dict[str, Any]:
    """What a CUDA device can do at most: GB/s of a copy, and GFLOP/s of large products."""
    size = 4 << 30
    copy = best_times([copy_of(size, device)], seconds, cuda_seconds)[0]
    return {
        "processor": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_gbs": size / copy / 1e9,
        **{f"{dtype}_gflops": peak_flops(dtype, seconds, device) / 1e9 for dtype in ("float32", "bfloat16")},
    }


def peak_flops(dtype: str, seconds: float = 0.1, device: str = "cpu") -> float:
    """FLOP/s that this machine, or its CUDA device, reaches at best in "float32" or "bfloat16".

    A large matrix product of this type; on the CPU, on the threads in use, multiply-adds in float32 registers where
    they are faster: a matrix unit counts.
    """
    product, product_flops = gemm(dtype, device)
    if torch.device(device).type != "cpu":
        return product_flops / best_times([product], seconds, cuda_seconds)[0]
    multiply_add, flops = multiply_adds()
    in_registers, multiplied = best_times([multiply_add, product], seconds)
    return max(flops / in_registers, product_flops / multiplied)


def wall_seconds(call: Work) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Work) -> float:
    """How long what a call enqueues takes on the CUDA device, gaps where that waits for the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def best_times(calls: list[Work], seconds: float, timed: Callable[[Work], float] = wall_seconds) -> list[float]:
    """Seconds of each call's best run, as STREAM reports them; in turns, so that a busy machine slows all of them."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            taken.append(timed(call))
    return [min(taken) for taken in times]


def copy_of(size: int, device: str = "cpu") -> Work:
    """A plain copy that moves `size` bytes, read and written together."""
    source = torch.ones(max(1, size // 8), device=device)
    target = torch.empty_like(source)
    if torch.device(device).type != "cpu":
        return lambda: target.copy_(source)
    return lambda: _C.stream_copy(source, target)


def multiply_adds() -> tuple[Work, int]:
    """About a millisecond of multiply-adds on every thread, and their FLOPs."""
    sums, rounds = torch.empty(4 * _C.num_threads()), 20_000
    return lambda: _C.multiply_add(sums, rounds), 2 * _C.multiply_add_width * rounds * len(sums)


def gemm(dtype: str, device: str = "cpu") -> tuple[Work, int]:
    """A matrix product large enough for the device to reach its best, and its FLOPs."""
    on_cpu = torch.device(device).type == "cpu"
    side = 768 if on_cpu else 8192
    a, b = (torch.ones(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))

    return lambda: torch.mm(a, b), 2 * side**3


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held, in bytes; on a GPU, what its tensors there have."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def available_memory(device: torch.device) -> int:
    """Bytes of the device's memory that can still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text(encoding="ascii").splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    # Without /proc, as on macOS, which tells no more than what it has in all.
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
