"""A training step on a GPU: whether it is right, where its time goes, and beside that what train_model.py predicted.

    bench/gpu/train.sh --out train.json           # on a machine with a GPU; at most seven minutes
    python -m bench.gpu.train --emulated          # its own logic, with toy sizes in the emulator; nothing is timed

Right: gradients in bfloat16 beside those of float32 on the CPU, the same bits whatever backward computes again and in
every run, no wait of the host inside a step, and captured steps with the bits of the same step uncaptured, and
a state copied beside the steps with those of the state. Then milliseconds of attention beside FlexAttention compiled
with the same mask, and of whole steps at K = 2 and 5, small and large, by kind of kernel; captured steps beside
uncaptured ones in turns, small and large, which the default of `cuda_graphs` waits for; what a state costs; last
transformers. What does not fit in the time is left out by name.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import train_model
from bench.gpu.checks import Here, packed_lengths, seconds_of
from bench.gpu.models import random_batch, toy
from bench.gpu.report import figure, finish, table
from bench.gpu.train_model import SMALL, Work
from hrmcore import optim
from hrmcore.checkpoint.host_copies import CudaSide, HostCopies, Pair
from hrmcore.config import RECOMPUTE, HRMConfig
from hrmcore.data.packing import Bucket, PackedBatch, pad
from hrmcore.model import HRM
from hrmcore.ops.attention import PackedMask, attention
from hrmcore.train.captured import CapturedSteps, Graphs
from hrmcore.train.resume import tensors_of

LIMIT = 360.0  # seconds, of the seven minutes that train.sh gives
ALLOWED = 2e-2  # of a gradient's norm
HORIZONS = (2, 5)
# Of a kernel's name, in this order: what it is counted as.
KINDS = (
    ("attention backward", ("backward_queries", "backward_keys")),
    ("attention forward", ("forward_mma", "fill_table")),
    ("products", ("gemm", "cutlass", "nvjet", "sm90_xmma", "cublas")),
    ("norms", ("rms_norm", "inject")),
    ("swiglu", ("swiglu",)),
    ("rotation", ("rope",)),
    ("optimizer", ("step<", "multi_tensor", "lpnorm")),
    ("cross-entropy", ("cross_entropy",)),
)


@dataclass(frozen=True)
class Shape:
    """A model and a batch of it."""

    name: str
    config: HRMConfig
    lengths: tuple[int, ...]
    captured: bool = False

    @property
    def work(self) -> Work:
        return Work(self.lengths)


@dataclass
class Plan:
    """What is asked here: a GPU gets the 1B shape and a small one, the emulator a toy."""

    here: Here
    shapes: tuple[Shape, ...]
    attention: dict[str, tuple[tuple[int, ...], int, int]] = field(default_factory=dict)  # lengths, heads, head_dim


def plan_for(here: Here) -> Plan:
    if here.emulated:
        lengths = (9, 30, 5)
        return Plan(
            here,
            (Shape("toy", toy(), lengths), Shape("toy, captured", toy(), lengths, True)),
            {"toy": (lengths, 1, 16)},
        )
    mean = tuple(packed_lengths(55, 297, torch.Generator().manual_seed(8)))
    large = Shape("1B, 16k tokens", HRMConfig.preset("XL"), mean)
    small = [Shape(f"2M, 32k tokens{word}", SMALL, (35,) * 936, word != "") for word in ("", ", captured")]
    calls = {"8 x 2,048": ((2048,) * 8, 12, 128), "55 of mean 297": (mean, 12, 128), "930 x 35": ((35,) * 930, 3, 64)}
    return Plan(here, (large, *small), calls)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="toy sizes in the emulator: shows that this works")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    options = parser.parse_args(argv)
    if not options.emulated and not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device; --emulated tries this without one", file=sys.stderr)
        return 2
    report = run(plan_for(Here(options.emulated, Path())), time.monotonic() + LIMIT)
    return finish(report, options.out, show)


def run(plan: Plan, deadline: float) -> dict[str, Any]:
    """Every part that there is time for; a part that raises is a fault of its own and ends no other."""
    report: dict[str, Any] = {
        "device": "emulated" if plan.here.emulated else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "parts": {},
        "faults": {},
        "left_out": [],
    }
    for name, part in parts_of(plan).items():
        if time.monotonic() > deadline:
            report["left_out"].append(name)
            continue
        started = time.monotonic()
        try:
            report["parts"][name] = part() | {"seconds": round(time.monotonic() - started, 1)}
        except Exception as error:
            report["faults"][name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {report['faults'].get(name, 'done')}", file=sys.stderr, flush=True)
    checked = report["parts"].get("right", {})
    report["right"] = "right" in report["parts"] and not checked["wrong"] and not report["faults"]
    return report


def parts_of(plan: Plan) -> dict[str, Callable[[], dict[str, Any]]]:
    parts: dict[str, Callable[[], dict[str, Any]]] = {"right": partial(right, plan.here)}
    for shape in plan.shapes:
        for horizon in HORIZONS:
            parts[f"{shape.name}, K = {horizon}"] = partial(step_of, plan.here, shape, horizon)
    for shape in (shape for shape in plan.shapes if not shape.captured):
        for horizon in HORIZONS:
            parts[f"graphs, {shape.name}, K = {horizon}"] = partial(graphs_in_turns, plan.here, shape, horizon)
    parts[f"state, {plan.shapes[0].name}"] = partial(state_beside_a_step, plan.here, plan.shapes[0])
    for name, (lengths, heads, head_dim) in plan.attention.items():
        parts[f"attention, {name}"] = partial(attention_times, plan.here, lengths, heads, head_dim)
    if not plan.here.emulated:
        parts["transformers, 16 x 512"] = transformers_step
    return parts


# Right


def autocast(here: Here) -> torch.autocast:
    return torch.autocast(here.device, dtype=torch.bfloat16, cache_enabled=False)


def gradients(here: Here, model: HRM, batch: PackedBatch, recompute: str = "sublayer") -> list[Tensor]:
    with here.kernels():
        with autocast(here):
            loss = model.loss(batch, horizon=5, recompute=recompute) / len(batch.targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(
        float((a.cpu().double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True)
    )


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def right(here: Here) -> dict[str, Any]:
    """What must hold of one step of a toy; `wrong` names what does not."""
    torch.manual_seed(0)
    config = toy()
    batch, _ = random_batch([40, 9, 130, 64], config.vocab_size)
    model = HRM(config)
    with torch.enable_grad():
        exact = torch.autograd.grad(model.loss(batch, horizon=5) / len(batch.targets), list(model.parameters()))
    model = model.to(here.device)
    first = gradients(here, model, batch)
    found = {
        "gradient_error": error(first[1:], list(exact)),
        "same_bits_again": same(first, gradients(here, model, batch)),
        "same_bits_whatever_is_recomputed": all(same(first, gradients(here, model, batch, word)) for word in RECOMPUTE),
        "no_wait_in_a_step": no_wait(here, model, batch),
        "captured_has_the_bits": captured_has_the_bits(here, model, batch),
        "state_beside_has_the_bits": state_beside_has_the_bits(here),
    }
    wrong = [name for name, value in found.items() if value is False]
    if not found["gradient_error"] <= ALLOWED:
        wrong.append("gradient_error")
    return found | {"wrong": wrong}


def no_wait(here: Here, model: HRM, batch: PackedBatch) -> bool | None:
    """Whether loss, backward and the optimizer's step pass where torch makes every wait an error; None: no GPU."""
    if here.emulated:
        return None
    optimizer = optim.AdamAtan2(model.parameters(), lr=0.0, weight_decay=0.0)
    scale = torch.ones(1, device=here.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with autocast(here):
            loss = model.loss(batch, horizon=5)
        loss.backward()
        optimizer.step(grad_scale=scale)
    except RuntimeError as fault:
        print(f"a wait inside a step: {fault}", file=sys.stderr)
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.zero_grad(set_to_none=True)
    return True


class Again:
    """In the place of CUDA graphs, on the emulator."""

    def warm(self, run: Callable[[], list[Tensor | None]]) -> list[Tensor | None]:
        return run()

    def capture(self, run: Callable[[], list[Tensor | None]]) -> tuple[list[Tensor | None], Callable[[], None]]:
        places = run()

        def replay() -> None:
            for place, now in zip(places, run(), strict=True):
                if place is not None and now is not None:
                    place.copy_(now)

        return places, replay


def graphs_of(here: Here) -> Graphs | None:
    return Again() if here.emulated else None


def captured_has_the_bits(here: Here, model: HRM, batch: PackedBatch) -> bool:
    """The third step of a shape, replayed, beside the padded batch run as it is."""
    with here.kernels():
        steps = CapturedSteps(model, 256, "sublayer", partial(autocast, here), graphs_of(here))
        padded = pad(batch, Bucket.of(batch, 256)).to(torch.device(here.device))
        with autocast(here):
            loss = model.padded_loss(padded, 5) / torch.full((), float(len(batch.targets)), device=here.device)
        expected = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            found = steps.backward(batch, 5, len(batch.targets))
        ours = [found, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return same(ours, expected)


class AtOnce:
    """In the place of a stream beside, on the emulator."""

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def begin(self, pairs: Sequence[Pair]) -> None:
        for place, tensor in pairs:
            place.copy_(tensor)

    def hold(self) -> None:
        pass

    def wait(self) -> None:
        pass


def state_beside_has_the_bits(here: Here) -> bool:
    """Tensors that are changed as soon as they may be; large ones on a GPU, whose copies take a while."""
    copies = HostCopies(AtOnce() if here.emulated else CudaSide(torch.device("cuda", 0)))
    count = 1000 if here.emulated else 1 << 26
    tensors = {str(i): torch.randn(count, device=here.device) for i in range(4)}
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    found = copies.begin(tensors)
    copies.hold()
    for tensor in tensors.values():
        tensor.add_(1)
    copies.wait()
    return all(torch.equal(found[name], expected[name]) for name in expected)


# How fast


@dataclass(frozen=True)
class Steps:
    """A model with its optimizer and a batch, and whole steps of it at one horizon, captured or not."""

    here: Here
    shape: Shape
    horizon: int
    model: HRM
    optimizer: optim.AdamAtan2
    batch: PackedBatch

    @classmethod
    def of(cls, here: Here, shape: Shape, horizon: int) -> Steps:
        torch.manual_seed(9)
        model = HRM(shape.config).to(here.device)
        batch, _ = random_batch(list(shape.lengths), shape.config.vocab_size)
        return cls(here, shape, horizon, model, optim.AdamAtan2(model.parameters(), lr=1e-4, ema=0.999), batch)

    def step(self, captured: bool, before_update: Callable[[], None] = lambda: None) -> Callable[[], None]:
        here, count = self.here, len(self.batch.targets)
        precision, graphs = partial(autocast, here), graphs_of(here) if captured else None
        steps = CapturedSteps(self.model, self.shape.work.tokens, "sublayer", precision, graphs) if captured else None

        def step() -> None:
            if steps is not None:
                steps.backward(self.batch, self.horizon, count)
            else:
                with autocast(here):
                    loss = self.model.loss(self.batch, horizon=self.horizon) / count
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            before_update()
            self.optimizer.step(grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0).reshape(1))
            self.optimizer.zero_grad(set_to_none=True)

        return step


def step_of(here: Here, shape: Shape, horizon: int) -> dict[str, Any]:
    """Tokens a second of a whole step, its milliseconds by kind of kernel, and what was predicted of both."""
    step, tokens = Steps.of(here, shape, horizon).step(shape.captured), shape.work.tokens
    predicted = train_model.predict(shape.config, shape.work, horizon, graph=shape.captured)
    found: dict[str, Any] = {
        "tokens": tokens,
        "predicted_ms": predicted,
        "predicted_tokens_a_second": train_model.tokens_a_second(predicted, shape.work),
    }
    with here.kernels():
        for _ in range(3):
            step()
        if here.emulated:
            return found
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, 5)
        found |= {"tokens_a_second": tokens / seconds, "ms": 1e3 * seconds}
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found | {"ms_by_kind": by_kind(profiled(step))}


def graphs_in_turns(here: Here, shape: Shape, horizon: int) -> dict[str, Any]:
    """Milliseconds of captured and uncaptured steps of one model, in turns, and what capturing holds in memory."""
    steps = Steps.of(here, shape, horizon)
    ways = {"uncaptured": steps.step(False), "captured": steps.step(True)}
    found: dict[str, Any] = {"tokens": shape.work.tokens}
    with here.kernels():
        for name, step in ways.items():
            try:
                for _ in range(3):
                    step()
            except torch.OutOfMemoryError:
                return found | {"out_of_memory": name}
            if not here.emulated:
                torch.cuda.empty_cache()  # what is left is held for good
                found[f"held_gb_{name}"] = torch.cuda.memory_reserved() / 1e9
        if here.emulated:
            return found
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(3):
            for name, step in ways.items():
                times[name].append(seconds_of(step, 5))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    found |= {f"ms_{name}": 1e3 * seconds for name, seconds in medians.items()}
    return found | {"times_as_fast": medians["uncaptured"] / medians["captured"]}


def state_beside_a_step(here: Here, shape: Shape) -> dict[str, Any]:
    """What a training state costs: the host where it is copied in its way, and a step where it is copied beside it."""
    steps = Steps.of(here, shape, HORIZONS[-1])
    copies = HostCopies(AtOnce() if here.emulated else CudaSide(torch.device("cuda", 0)))
    step, step_that_holds = steps.step(False), steps.step(False, copies.hold)

    def step_beside() -> None:
        copies.begin(tensors)
        step_that_holds()

    with here.kernels():
        step()
        tensors = tensors_of(steps.model, steps.optimizer)
        step_beside()
        copies.wait()
        found: dict[str, Any] = {"gb": copies.bytes_held / 1e9}
        if here.emulated:
            return found
        started = time.perf_counter()
        whole = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        found["in_its_way_s"] = time.perf_counter() - started
        del whole
        torch.cuda.synchronize()
        started = time.perf_counter()
        copies.begin(tensors)
        found["host_s"] = time.perf_counter() - started
        copies.wait()
        found["copied_s"] = time.perf_counter() - started
        found |= {"step_ms": 1e3 * seconds_of(step, 3), "step_beside_ms": 1e3 * seconds_of(step_beside, 3)}
    blocking, beside = train_model.state_seconds(shape.config, shape.work, HORIZONS[-1])
    return found | {"predicted_in_its_way_s": blocking, "predicted_beside_s": beside}


def profiled(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = (event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA)
    return [(kernel.name, kernel.time_range.elapsed_us()) for kernel in kernels]


def by_kind(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each kind; what no kind names is `other`, of which the longest eight are named."""
    found: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, microseconds in kernels:
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), "other")
        found[kind] = found.get(kind, 0.0) + microseconds / 1e3
        if kind == "other":
            others[name[:60]] = others.get(name[:60], 0.0) + microseconds / 1e3
    longest = sorted(others.items(), key=lambda entry: -entry[1])[:8]
    return found | {f"other: {name}": ms for name, ms in longest}


def attention_times(here: Here, lengths: tuple[int, ...], heads: int, head_dim: int) -> dict[str, Any]:
    """Forward and backward milliseconds, FlexAttention's, and the error of the one beside the other."""
    q, k, v, gate, mask = operands(here, lengths, heads, head_dim)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
    with here.kernels():
        mask = mask.with_tiles(q)
        out = attention(*leaves, mask)
        grad = torch.ones_like(out)
        torch.autograd.grad(out, leaves, grad, retain_graph=True)
        if here.emulated:
            return {"tokens": len(q)}
        found: dict[str, Any] = {
            "forward_ms": 1e3 * seconds_of(lambda: attention(*(x.detach() for x in leaves), mask)),
            "backward_ms": 1e3 * seconds_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)),
        }
    with contextlib.suppress(ImportError):
        found |= flex_times(leaves, lengths, out.detach())
    return found


def operands(
    here: Here, lengths: tuple[int, ...], heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, PackedMask]:
    generator = torch.Generator().manual_seed(5)
    fused = torch.randn(sum(lengths), 4, heads, head_dim, generator=generator).to(here.device, torch.bfloat16)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    prefix = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
    q, k, v, gate = fused.unbind(1)
    return q, k, v, gate, PackedMask(offsets, prefix).to(torch.device(here.device))


def flex_times(leaves: Sequence[Tensor], lengths: tuple[int, ...], ours: Tensor) -> dict[str, Any]:
    """FlexAttention, compiled, with the mask of packed prefixes; the gate is applied by torch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = sum(lengths)
    sizes = torch.tensor(lengths, device="cuda")
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), sizes)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(tokens, device="cuda") - starts[sequence]
    prefix = (sizes // 2)[sequence]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (sequence[i] == sequence[j]) & ((place[j] <= place[i]) | (place[j] < prefix[i]))

    block_mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        out = compiled(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=block_mask)
        return out[0].transpose(0, 1) * torch.sigmoid(gate)

    out = call(*leaves)
    grad = torch.ones_like(out)
    return {
        "flex_error": float((ours.double() - out.detach().double()).norm() / out.detach().double().norm()),
        "flex_forward_ms": 1e3 * seconds_of(lambda: call(*(x.detach() for x in leaves))),
        "flex_backward_ms": 1e3 * seconds_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)),
    }


def transformers_step() -> dict[str, Any]:
    """transformers' training step at the 1B shape, 16 sequences of 512, AdamW fused, under autocast."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    from hrmcore.checkpoint.hrm_text import released_config

    shape = HRMConfig.preset("XL")
    config = HrmTextConfig.from_dict(released_config(shape, torch.float32))
    model = HrmTextForCausalLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, shape.vocab_size, (16, 512), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"tokens_a_second": ids.numel() / seconds_of(step, 5)}


# What is printed


def show(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}: {'right' if report['right'] else 'WRONG'}")
    lines = []
    for name, part in report["parts"].items():
        if "predicted_ms" in part:
            measured = part.get("ms_by_kind", {})
            predicted = part["predicted_ms"]
            kinds = ", ".join(f"{kind} {figure(measured.get(kind))} / {ms:.1f}" for kind, ms in predicted.items())
            speed = f"{figure(part.get('tokens_a_second'), 0)} / {part['predicted_tokens_a_second']:,.0f}"
            lines.append([name, speed, f"{figure(part.get('ms'))} / {sum(predicted.values()):.1f}", kinds])
    print("\nmeasured / predicted\n")
    print(table(["", "tok/s", "ms", "ms by kind"], lines))
    for name, part in report["parts"].items():
        if "predicted_ms" not in part:
            print(f"{name}: {part}")
    for name, fault in report["faults"].items():
        print(f"{name} FAILED: {fault}")


if __name__ == "__main__":
    sys.exit(main())
