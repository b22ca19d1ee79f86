"""The checks of bench/gpu/checklist.py that ask for kernels; models.py has those that run whole models. Each takes
where it runs and returns its figures, raises NotRunError with the reason why it cannot run here, or anything else when
what it looked at is wrong.

On the emulator sizes are toys and nothing is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrmcore import _C, optim

OPS = ("rms_norm", "rms_norm_inject", "rope", "swiglu", "attention", "cross_entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # norm(out - reference) / norm(reference)
PACKAGE = Path(_C.__file__).parent


class NotRunError(Exception):
    """This check cannot be asked here."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class WrongError(Exception):
    """What was looked at is wrong."""


@dataclass(frozen=True)
class Here:
    """Where the checks run: a GPU, or the emulator on the CPU."""

    emulated: bool
    goldens: Path

    @property
    def device(self) -> str:
        return "cpu" if self.emulated else "cuda"

    @property
    def library(self) -> Path:
        """The ops' kernels."""
        return PACKAGE / ("_C_emulated.so" if self.emulated else "_C_cuda.so")

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """The ops run the CUDA kernels on `device` inside this context."""
        if not self.library.exists():
            raise WrongError(f"{self.library} is missing; build with HRMCORE_CUDA=ON or HRMCORE_EMULATOR=ON")
        _C.emulate_cuda(str(self.library) if self.emulated else "")
        try:
            yield
            self.wait()
        finally:
            _C.emulate_cuda("")

    def wait(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize()

    def stream(self) -> int:
        return 0 if self.emulated else torch.cuda.current_stream().cuda_stream

    def require_gpu(self, why: str) -> None:
        if self.emulated:
            raise NotRunError(f"needs a GPU: {why}")

    def has(self, op: str) -> bool:
        """Whether the library holds the op's kernels."""
        library = ctypes.CDLL(str(self.library))
        return any(hasattr(library, f"hrmcore_{op}{way}") for way in ("", "_forward"))


def gpu() -> dict[str, Any]:
    """The GPU, or an error when there is none."""
    if not torch.backends.cuda.is_built():
        raise WrongError("this torch is built without CUDA")
    if not torch.cuda.is_available():
        raise WrongError("torch finds no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


# Cases: what goldens, repetitions and the comparison with torch share


def cases(here: Here, op: str, dtype: torch.dtype, real: bool) -> Iterator[dict[str, Any]]:
    """An op's cases on the device: all of them, or without `real` the small ones. The CUDA kernels' limits aside."""
    page = importlib.import_module(f"hrmcore.ops.{op}")
    for case in page.cases(dtype):
        if op == "attention" and case["q"].shape[-1] > 128:
            continue
        if real or max(x.numel() for x in case.values() if isinstance(x, Tensor)) <= 6_000:
            yield {key: x.to(here.device) if hasattr(x, "to") else x for key, x in case.items()}


def differentiate(run: Callable[..., Any], case: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of every differentiable operand, each as one vector."""
    leaves = {
        k: x.detach().requires_grad_() for k, x in case.items() if isinstance(x, Tensor) and x.is_floating_point()
    }
    if "table" in leaves:  # rope's angles: constants
        leaves["table"].requires_grad_(False)
    result = run(**(case | leaves))
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    gradients = torch.autograd.grad(
        outputs, [x for x in leaves.values() if x.requires_grad], seeds, allow_unused=True, materialize_grads=True
    )
    return {"outputs": _joined(outputs), "gradients": _joined(gradients)}


def _joined(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def optimizer_steps(here: Here, kind: str) -> Tensor:
    """Parameters and state after three steps of an optimizer on odd shapes, as one vector."""
    shapes = [(1,), (7, 33), (0,), (4099,), *([(3, 5)] * 50)]
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(here.device)) for s in shapes]
    optimizer = make_optimizer(kind, params, ema=0.9)
    for _ in range(3):
        for p in params:
            p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(here.device)
        step(optimizer, curvature=True)
    return _joined(params + [x.to(here.device) for p in params for x in optimizer.state[p].values()])


def make_optimizer(kind: str, params: list[torch.nn.Parameter], ema: float | None = None) -> torch.optim.Optimizer:
    return {"Sophia": optim.Sophia, "AdamAtan2": optim.AdamAtan2, "AdamW": optim.AdamW}[kind](params, ema=ema)


def step(optimizer: torch.optim.Optimizer, curvature: bool = False) -> None:
    if not isinstance(optimizer, optim.Sophia):
        optimizer.step()
        return
    if curvature:
        optimizer.update_hessian()
    optimizer.step(batch_tokens=16)


OPTIMIZERS = ("Sophia", "AdamAtan2", "AdamW")


def small_results(here: Here) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """(name, dtype, what computes it) of everything that goldens hold."""
    for op in OPS:
        if not here.has(op):
            continue
        run = getattr(importlib.import_module(f"hrmcore.ops.{op}"), op)
        for dtype, torch_dtype in DTYPES.items():
            for index, case in enumerate(cases(here, op, torch_dtype, real=False)):

                def compute(run: Callable[..., Any] = run, case: dict[str, Any] = case) -> Tensor:
                    return torch.cat(list(differentiate(run, case).values()))

                yield f"{op} {index} {dtype}", dtype, compute
    for kind in OPTIMIZERS:
        yield kind, "float32", lambda kind=kind: optimizer_steps(here, kind)


# Goldens: of each result its length, its bits' hash, its norm and eight products with random vectors


PROJECTIONS = 8


def summary(result: Tensor) -> dict[str, Any]:
    x = result.detach().cpu()
    bits = x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).numpy().tobytes()
    exact = x.double()
    generator = torch.Generator().manual_seed(3)
    products = [
        float(exact @ torch.randn(len(exact), generator=generator, dtype=torch.float64)) for _ in range(PROJECTIONS)
    ]
    norm = float(exact.norm())
    return {"elements": len(x), "sha256": hashlib.sha256(bits).hexdigest()[:16], "norm": norm, "products": products}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """An estimate of norm(a - b) / norm(b) from the products; inf where lengths differ or a NaN is."""
    if a["elements"] != b["elements"]:
        return math.inf
    gap = math.sqrt(sum((x - y) ** 2 for x, y in zip(a["products"], b["products"], strict=True)) / PROJECTIONS)
    relative = gap / b["norm"] if b["norm"] else gap
    return relative if relative == relative else math.inf


def write_goldens(here: Here) -> None:
    with here.kernels():
        goldens = {name: summary(compute()) for name, _, compute in small_results(here)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(golden)}" for name, golden in goldens.items())
    here.goldens.write_text(f"{{\n{lines}\n}}\n")


# The checks


def cubins(here: Here) -> dict[str, Any]:
    """Every kernel of every cubin for this GPU loads."""
    here.require_gpu("no driver here loads a cubin")
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        raise NotRunError("cuobjdump, of the CUDA toolkit, is not on the PATH")
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes a context
    driver = ctypes.CDLL("libcuda.so.1")
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump, "-xelf", "all", str(here.library)], cwd=folder, check=True, capture_output=True)
        capability = chosen(Path(folder).glob("*.cubin"), *torch.cuda.get_device_capability())
        for path in sorted(Path(folder).glob(f"*.{capability}.cubin")):
            module, functions = ctypes.c_void_p(), ctypes.c_uint()
            image = path.read_bytes()
            for status in (
                driver.cuModuleLoadData(ctypes.byref(module), image),
                driver.cuModuleGetFunctionCount(ctypes.byref(functions), module),
            ):
                if status:
                    raise WrongError(f"{path.name}: the driver says error {status}")
            loaded.append({"cubin": path.name, "kernels": functions.value})
    return {
        "target": capability,
        "cubins": len(loaded),
        "kernels": sum(entry["kernels"] for entry in loaded),
        "loaded": loaded,
    }


def chosen(paths: Iterable[Path], major: int, minor: int) -> str:
    """The target that a GPU of this capability runs: of its own major version the highest that it has reached."""
    versions = {int(found[1]) for path in paths if (found := re.search(r"\.sm_(\d+)\.cubin$", path.name))}
    fitting = [v for v in versions if v // 10 == major and v % 10 <= minor]
    if not fitting:
        raise WrongError(f"no cubin for sm_{major}{minor}; there are {', '.join(f'sm_{v}' for v in sorted(versions))}")
    return f"sm_{max(fitting)}"


def _hardware(here: Here) -> ctypes.CDLL:
    library = ctypes.CDLL(str(here.library if here.emulated else PACKAGE / "_C_hardware.so"))
    for name in ("products", "products_f16", "halves", "barriers"):
        getattr(library, f"hrmcore_hardware_{name}").restype = ctypes.c_char_p
    return library


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _refuse(error: bytes | None) -> None:
    if error:
        raise WrongError(error.decode())


def _pairs(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers of 16 bits to a register."""
    bits = [x.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF for x in (low, high)]
    return bits[0] | bits[1] << 16


def one_hot_mma(here: Here) -> dict[str, Any]:
    """mma.m16n8k16 places every element of A, B and C where the PTX ISA's fragment tables say: exact, bf16 and f16."""
    counts = [_one_hot(here, dtype) for dtype in (torch.bfloat16, torch.float16)]
    return {"products": sum(counts), "wrong": 0}


def _one_hot(here: Here, dtype: torch.dtype) -> int:
    lane = torch.arange(32)
    row, column = lane // 4, lane % 4 * 2
    generator = torch.Generator().manual_seed(4)
    numbers = lambda *shape: torch.randint(-8, 9, shape, generator=generator).float()  # noqa: E731
    hot_a, hot_b = torch.eye(256).view(256, 16, 16), torch.eye(128).view(128, 16, 8)
    a = torch.cat([hot_a, numbers(128, 16, 16)])
    b = torch.cat([numbers(256, 16, 8), hot_b])
    c = numbers(384, 16, 8)
    a_places = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
    a_registers = torch.stack([_pairs(a[:, r, k], a[:, r, k + 1], dtype) for r, k in a_places], -1)
    b_registers = torch.stack([_pairs(b[:, k, row], b[:, k + 1, row], dtype) for k in (column, column + 8)], -1)
    c_places = [(row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)]
    registers = [
        x.contiguous().to(here.device)
        for x in (a_registers, b_registers, torch.stack([c[:, r, k] for r, k in c_places], -1))
    ]
    library = _hardware(here)
    multiply = library.hrmcore_hardware_products if dtype == torch.bfloat16 else library.hrmcore_hardware_products_f16
    _refuse(multiply(*map(_pointer, registers), len(a), ctypes.c_void_p(here.stream())))
    here.wait()
    expected = c + a @ b
    wrong = sum(
        int((registers[2][..., i].cpu() != expected[:, r, k]).any(-1).sum()) for i, (r, k) in enumerate(c_places)
    )
    if wrong:
        raise WrongError(f"{wrong} of {4 * len(a)} registers over all products are wrong")
    return len(a)


def halves(here: Here) -> dict[str, Any]:
    """float32 becomes f16 as torch on the CPU has it: every f16, midpoints, their neighbours, what is out of range."""
    exact = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    between = (exact[1:] + exact[:-1]) / 2
    odd = torch.tensor([65519.996, 65520.0, 1e30, float("inf"), 2.0**-25, 2.0**-24 * 0.500001, 1e-40])
    numbers = torch.cat([exact, between, between.nextafter(exact[1:]), between.nextafter(exact[:-1]), odd])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 16))
    x = torch.cat([numbers, -numbers]).to(here.device)
    found = torch.empty_like(x)
    convert = _hardware(here).hrmcore_hardware_halves
    _refuse(convert(_pointer(x), _pointer(found), len(x) // 32, ctypes.c_void_p(here.stream())))
    here.wait()
    wrong = int((found.cpu().view(torch.int32) != x.cpu().half().float().view(torch.int32)).sum())
    if wrong:
        raise WrongError(f"{wrong} of {len(x)} numbers become another f16 than torch's")
    return {"numbers": len(x), "wrong": 0}


def grid_barriers(here: Here) -> dict[str, Any]:
    """A million grid barriers, each block reading what its neighbour wrote before; the time limit is the watchdog."""
    blocks = 3 if here.emulated else torch.cuda.get_device_properties(0).multi_processor_count
    rounds = 200 if here.emulated else 500_000
    state, slots, wrong = (torch.zeros(n, dtype=torch.int32, device=here.device) for n in (1, blocks, blocks))
    wrong -= 1  # each block writes its own
    library = _hardware(here)
    started = time.perf_counter()
    _refuse(
        library.hrmcore_hardware_barriers(
            *map(_pointer, (state, slots, wrong)), blocks, rounds, ctypes.c_void_p(here.stream())
        )
    )
    here.wait()
    seconds = time.perf_counter() - started
    if wrong.any():
        raise WrongError(f"blocks read something else than their neighbours wrote, by block: {wrong.tolist()}")
    figures: dict[str, Any] = {"blocks": blocks, "barriers": 2 * rounds, "stale_reads": 0}
    return figures if here.emulated else figures | {"microseconds_a_barrier": seconds / (2 * rounds) * 1e6}


def goldens_replayed(here: Here) -> dict[str, Any]:
    """What the emulator computed, computed again here: within the dtype's error, for rounding differs."""
    goldens = json.loads(here.goldens.read_text())
    found, missing = {}, []
    with here.kernels():
        for name, dtype, compute in small_results(here):
            if name not in goldens:
                missing.append(name)
                continue
            now = summary(compute())
            found[name] = (distance(now, goldens[name]), dtype, now["sha256"] == goldens[name]["sha256"])
    bad = {name: error for name, (error, dtype, _) in found.items() if not error <= ALLOWED_ERROR[dtype]}
    if bad:
        name = max(bad, key=lambda n: bad[n])
        raise WrongError(f"{len(bad)} of {len(found)} differ from the emulator, most: {name} by {bad[name]:.3g}")
    worst = {d: max((error for error, dtype, _ in found.values() if dtype == d), default=None) for d in DTYPES}
    left = sorted({name.split()[0] for name in goldens.keys() - found.keys()})
    return {
        "replayed": len(found),
        "identical_bits": sum(same for *_, same in found.values()),
        "worst_error": worst,
        "not_in_the_library": left,
        "without_golden": missing,  # made anew by --emulated --write-goldens
    }


def sanitizer(tool: str) -> Callable[[Here], dict[str, Any]]:
    def check(here: Here) -> dict[str, Any]:
        """The small cases, the decode step in its forms, and draws, under a tool of compute-sanitizer."""
        here.require_gpu("compute-sanitizer instruments a GPU's code; the emulator's own detectors run in the tests")
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise NotRunError("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
        lines = (
            "from bench.gpu import checks as g, models as m, sampling as s; here = g.Here(False, g.Path());"
            "g.one_hot_mma(here);"
            "print(g.every_small_result(here) + m.every_small_step(here) + s.every_small_draw(here))"
        )
        # Without torch's cache every tensor is an allocation of its own, whose ends and first contents are watched.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ran = subprocess.run(
            [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", lines],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            env=environment,
        )
        if ran.returncode:
            raise WrongError(f"{tool}, exit status {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")
        return {"results": int(ran.stdout.split()[-1]) if ran.stdout.split()[-1].isdigit() else ran.stdout[-300:]}

    return check


def every_small_result(here: Here) -> int:
    """Computes each once; returns how many."""
    with here.kernels():
        return len([compute() for _, _, compute in small_results(here)])


def against_torch(here: Here) -> dict[str, Any]:
    """Every op in every case, real shapes on a GPU, against the plain-torch reference in float64."""
    worst: dict[str, float] = {}
    left = [op for op in OPS if not here.has(op)]
    for op in OPS:
        if op in left:
            continue
        page = importlib.import_module(f"hrmcore.ops.{op}")
        for dtype, torch_dtype in DTYPES.items():
            for index, case in enumerate(cases(here, op, torch_dtype, real=not here.emulated)):
                with here.kernels():
                    ours = differentiate(getattr(page, op), case)
                exact = {
                    k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in case.items()
                }
                theirs = differentiate(getattr(page, f"{op}_ref"), exact)
                for what, out in ours.items():
                    error = float((out.double() - theirs[what]).norm() / (theirs[what].norm() or 1))
                    if not error <= ALLOWED_ERROR[dtype]:
                        raise WrongError(f"{op}, case {index}, {dtype}: the error of the {what} is {error:.3g}")
                    worst[f"{op} {dtype} {what}"] = max(error, worst.get(f"{op} {dtype} {what}", 0.0))
    return {"worst_error": worst, "not_in_the_library": left}


def identical_repeats(here: Here) -> dict[str, Any]:
    """The same bits every time: a hundred repeats, on the emulator three schedules."""
    repeats = 3 if here.emulated else 100
    seed = ctypes.CDLL(str(here.library)).hrmcore_test_seed if here.emulated else None
    if seed is not None:
        seed.argtypes = [ctypes.c_uint64]
    count = 0
    with here.kernels():
        for name, _, compute in small_results(here):
            first = compute().cpu()
            for repeat in range(1, repeats):
                if seed is not None:
                    seed(repeat)
                if not torch.equal(compute().cpu(), first):
                    raise WrongError(f"{name}: repeat {repeat} has other bits than the first")
            if seed is not None:
                seed(0)
            count += 1
    return {"results": count, "repeats": repeats}


def attention_against_sdpa(here: Here) -> dict[str, Any]:
    """Packed prefix attention beside torch's scaled_dot_product_attention, sequence by sequence; mean length 297."""
    from hrmcore.ops.attention import PackedMask, attention

    count, mean, heads, head_dim = (4, 12, 2, 32) if here.emulated else (32, 297, 12, 128)
    generator = torch.Generator().manual_seed(5)
    lengths = packed_lengths(count, mean, generator)
    prefixes = [n // 2 for n in lengths]
    dtype = torch.float32 if here.emulated else torch.bfloat16
    fused = torch.randn(sum(lengths), 4, heads, head_dim, generator=generator).to(here.device, dtype)
    q, k, v, gate = fused.unbind(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = PackedMask(offsets, torch.tensor(prefixes, dtype=torch.int32)).to(here.device)

    def theirs(wide: torch.dtype = dtype) -> Tensor:
        outputs = []
        for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
            place = torch.arange(end - begin, device=here.device)
            seen = place < (place[:, None] + 1).clamp(min=prefixes[s])
            rows = [x[None, begin:end].transpose(1, 2).to(wide) for x in (q, k, v)]
            outputs.append(F.scaled_dot_product_attention(*rows, attn_mask=seen)[0].transpose(0, 1))
        return torch.cat(outputs) * torch.sigmoid(gate.to(wide))

    with here.kernels():
        out = attention(q, k, v, gate, mask)
    exact = theirs(torch.float64)
    error = float((out.double() - exact).norm() / exact.norm())
    allowed = ALLOWED_ERROR["float32" if here.emulated else "bfloat16"]
    if not error <= allowed:
        raise WrongError(f"the error is {error:.3g}, allowed are {allowed:g}")
    figures = {"sequences": count, "mean_length": sum(lengths) / count, "error": error}
    if here.emulated:
        return figures
    ours = seconds_of(lambda: attention(q, k, v, gate, mask))
    return figures | {"milliseconds": 1e3 * ours, "sdpa_milliseconds": 1e3 * seconds_of(theirs)}


def packed_lengths(count: int, mean: int, generator: torch.Generator) -> list[int]:
    """Spread from a third of the mean to some three times it, their mean being exact."""
    raw = torch.exp(0.7 * torch.randn(count, generator=generator))
    lengths = (raw / raw.sum() * count * mean).long().clamp(min=mean // 3)
    lengths[lengths.argmax()] += count * mean - lengths.sum()
    return lengths.tolist()


def seconds_of(call: Callable[[], object], repeats: int = 20) -> float:
    """The least time of a call on the GPU, between events."""
    call()
    best = math.inf
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


# Bytes that a step must move for each parameter: what is read and what is written of p, g, m, h or v, and the average.
MOVED = {"Sophia": 24, "AdamAtan2": 28, "AdamW": 28}


def optimizer_bandwidth(here: Here) -> dict[str, Any]:
    """GB/s of a step over 100 M parameters; on the emulator the bytes that the kernels asked for, by count."""
    figures: dict[str, Any] = {}
    for kind in OPTIMIZERS:
        for ema in (None, 0.999):
            shapes = [(5, 13), (100,)] if here.emulated else [(25_000_000,)] * 4
            params = [torch.nn.Parameter(torch.ones(s, device=here.device)) for s in shapes]
            for p in params:
                p.grad = torch.ones_like(p)
            count = sum(p.numel() for p in params)
            optimizer = make_optimizer(kind, params, ema)
            moved = MOVED[kind] + (8 if ema else 0)
            name = kind + (" + EMA" if ema else "")
            with here.kernels():
                if here.emulated:
                    _counted_bytes(here)
                    step(optimizer)
                    figures[name] = {"bytes_a_parameter": _counted_bytes(here) / count}
                    if figures[name]["bytes_a_parameter"] != moved:
                        raise WrongError(f"{name}: {figures[name]}, but a step must move {moved} bytes a parameter")
                else:
                    seconds = seconds_of(lambda optimizer=optimizer: step(optimizer))
                    figures[name] = {"gb_s": count * moved / seconds / 1e9, "milliseconds": 1e3 * seconds}
            del params, optimizer
    return figures


def _counted_bytes(here: Here) -> int:
    """Bytes read and written by the launches since the last call."""
    numbers = (ctypes.c_uint64 * 6)()  # launches, bytes read, bytes written, and what is not asked for here
    ctypes.CDLL(str(here.library)).hrmcore_test_counters(numbers)
    return numbers[1] + numbers[2]


CHECKS: dict[str, Callable[[Here], dict[str, Any]]] = {
    "cubins": cubins,
    "one_hot_mma": one_hot_mma,
    "halves": halves,
    "grid_barriers": grid_barriers,
    "goldens": goldens_replayed,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "synccheck": sanitizer("synccheck"),
    "initcheck": sanitizer("initcheck"),
    "against_torch": against_torch,
    "identical_repeats": identical_repeats,
    "attention_against_sdpa": attention_against_sdpa,
    "optimizer_bandwidth": optimizer_bandwidth,
}
