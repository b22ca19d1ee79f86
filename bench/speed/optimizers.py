"""How fast the fused optimizers are: a step of each beside torch's fused AdamW and beside the published SophiaG in
plain torch operations, in turns, on tensors with the shapes of a model; the copy bandwidth is measured in the same
turns. Checks before it times: one step of ours and of the plain operations must agree.

    python -m bench.speed.optimizers --rounds 20

The last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrmcore import _C, optim

LEARNING_RATE, WEIGHT_DECAY, RHO, BATCH_TOKENS = 1e-4, 0.1, 0.04, 4096
SOPHIA_BETAS = (0.965, 0.99)


@dataclass(frozen=True)
class Contender:
    """`moved` is the bytes that a call must move for each parameter, `state` those that it keeps between calls."""

    name: str
    call: Callable[[], object]
    moved: int
    state: int


class PlainSophiaG:
    """Algorithm 3 of arXiv 2305.14342, one plain torch operation after the other, as its authors publish it."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.exp_avg = [torch.zeros_like(p) for p in parameters]
        self.hessian = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, m, h in zip(self.parameters, self.exp_avg, self.hessian, strict=True):
            assert p.grad is not None
            m.mul_(SOPHIA_BETAS[0]).add_(p.grad, alpha=1 - SOPHIA_BETAS[0])
            p.mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
            ratio = (m.abs() / (RHO * BATCH_TOKENS * h + 1e-15)).clamp(None, 1)
            p.addcmul_(m.sign(), ratio, value=-LEARNING_RATE)

    @torch.no_grad()
    def update_hessian(self) -> None:
        for p, h in zip(self.parameters, self.hessian, strict=True):
            assert p.grad is not None
            h.mul_(SOPHIA_BETAS[1]).addcmul_(p.grad, p.grad, value=1 - SOPHIA_BETAS[1])


# What the plain operations of a step move: mul 8, add 12, mul 8, abs 8, mul 8, add 8, div 12, clamp 8, sign 8,
# addcmul 16; of a curvature sample: mul 8, addcmul 16.
PLAIN_MOVED, PLAIN_CURVATURE_MOVED = 96, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (8: 37.7 M parameters)")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the model (512)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of every contender (20)")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with rounds for as long (0)")
    parser.add_argument("--threads", type=int, help="default: every processor that this process may use")
    arguments = parser.parse_args()
    if arguments.threads:
        _C.set_num_threads(arguments.threads)
    torch.set_num_threads(_C.num_threads())
    shapes = shapes_of(arguments.layers, arguments.width)
    agree(shapes)
    contenders = contenders_on(shapes)
    times = in_turns([contender.call for contender in contenders], arguments.rounds, arguments.seconds)
    count = sum(rows * columns for rows, columns in shapes)
    report = report_of(contenders, times, count)
    print(table(report))
    print(json.dumps(report))


def shapes_of(layers: int, width: int) -> list[tuple[int, int]]:
    """The matrices of a model: per block [g|q|k|v], o, [a|b], down; then embedding and head of 16 D tokens."""
    ffn, vocabulary = 3 * width, 16 * width
    block = [(4 * width, width), (width, width), (2 * ffn, width), (width, ffn)]
    return [*(layers * block), (vocabulary, width), (vocabulary, width)]


def parameters_on(shapes: list[tuple[int, int]], gradients: list[Tensor]) -> list[Tensor]:
    """Fresh parameters, the same every time; all contenders read the same gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def gradients_on(shapes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [1e-3 * torch.randn(shape, generator=generator) for shape in shapes]


def sophia_on(parameters: list[Tensor], variant: str = "G", ema: float | None = None) -> optim.Sophia:
    return optim.Sophia(
        parameters, variant, lr=LEARNING_RATE, betas=SOPHIA_BETAS, rho=RHO, weight_decay=WEIGHT_DECAY, ema=ema
    )


def agree(shapes: list[tuple[int, int]]) -> None:
    """Raises SystemExit when a step of ours and of the plain operations differ."""
    few = shapes[:2]
    gradients = gradients_on(few)
    ours, theirs = parameters_on(few, gradients), parameters_on(few, gradients)
    fused, plain = sophia_on(ours), PlainSophiaG(theirs)
    for optimizer in (fused, plain):
        optimizer.update_hessian()
    fused.step(batch_tokens=BATCH_TOKENS)
    plain.step()
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit("the fused Sophia and the plain one differ after a step: not timed")


def contenders_on(shapes: list[tuple[int, int]]) -> list[Contender]:
    gradients = gradients_on(shapes)
    directions = [torch.randn(g.shape, generator=torch.Generator().manual_seed(2)) for g in gradients]

    def fresh() -> list[Tensor]:
        return parameters_on(shapes, gradients)

    def curvature_of_h(optimizer: optim.Sophia) -> None:
        parameters = parameters_of(optimizer)
        hessians = [optimizer.state[p]["hessian"] for p in parameters]
        gradients = [p.grad for p in parameters]
        _C.sophia_curvature(list(range(len(parameters))), hessians, directions, gradients, SOPHIA_BETAS[1])

    contenders = []
    for ema in (None, 0.9999):
        averaged, more = (" + EMA", 8) if ema else ("", 0)
        kept = 12 if ema else 8
        sophia = sophia_on(fresh(), ema=ema)
        sophia.update_hessian()
        atan2 = optim.AdamAtan2(fresh(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, ema=ema)
        adamw = optim.AdamW(fresh(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, ema=ema)
        contenders += [
            Contender(f"Sophia-G{averaged}", lambda s=sophia: s.step(batch_tokens=BATCH_TOKENS), 24 + more, kept),
            Contender(f"AdamAtan2{averaged}", atan2.step, 28 + more, kept),
            Contender(f"AdamW{averaged}", adamw.step, 28 + more, kept),
        ]
        if ema is None:
            contenders.append(Contender("Sophia-G, curvature", sophia.update_hessian, 12, kept))
    sophia_h = sophia_on(fresh(), "H")
    plain, torchs = PlainSophiaG(fresh()), torch.optim.AdamW(fresh(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    plain.update_hessian()
    source = torch.ones(max(1, sum(g.numel() for g in gradients)))
    target = torch.empty_like(source)
    return [
        *contenders,
        Contender("Sophia-H", sophia_h.step, 24, 8),
        Contender("Sophia-H, curvature", lambda: curvature_of_h(sophia_h), 16, 8),
        Contender("torch AdamW(fused=True)", torchs.step, 28, 8),
        Contender("plain torch SophiaG", plain.step, PLAIN_MOVED, 8),
        Contender("plain torch SophiaG, curvature", plain.update_hessian, PLAIN_CURVATURE_MOVED, 8),
        Contender("copy", lambda: _C.stream_copy(source, target), 8, 0),
    ]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def in_turns(calls: list[Callable[[], object]], rounds: int, seconds: float) -> list[list[float]]:
    """Seconds of every call in every round; each is called once untimed first."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds or time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return times


def report_of(contenders: list[Contender], times: list[list[float]], count: int) -> dict[str, Any]:
    copy = count * 8 / statistics.median(times[-1]) / 1e9
    lines = []
    for contender, taken in zip(contenders, times, strict=True):
        seconds = statistics.median(taken)
        speed = count * contender.moved / seconds / 1e9
        lines.append(
            {
                "name": contender.name,
                "seconds": seconds,
                "best_seconds": min(taken),
                "worst_seconds": max(taken),
                "moved_bytes_a_parameter": contender.moved,
                "state_bytes_a_parameter": contender.state,
                "gb_s": speed,
                "share_of_copy": speed / copy,
            }
        )
    by_name = dict(zip([line["name"] for line in lines], times, strict=True))
    return {
        "parameters": count,
        "threads": _C.num_threads(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "rounds": len(times[0]),
        "copy_gb_s": copy,
        "lines": lines,
        "plain_over_sophia": ratio(by_name["plain torch SophiaG"], by_name["Sophia-G"]),
        "torch_adamw_over_sophia": ratio(by_name["torch AdamW(fused=True)"], by_name["Sophia-G"]),
        "torch_adamw_over_adamw": ratio(by_name["torch AdamW(fused=True)"], by_name["AdamW"]),
    }


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """The ratio of the best times, and median and quartiles of the ratio round by round."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else 3 * each
    return {"best": min(slow) / min(fast), "median": median, "lower_quartile": low, "upper_quartile": high}


def table(report: dict[str, Any]) -> str:
    rows = [
        f"{report['parameters'] / 1e6:.1f} M parameters, {report['isa']}, {report['threads']} threads, "
        f"torch {report['torch']}, {report['rounds']} rounds, copy {report['copy_gb_s']:.1f} GB/s",
        f"{'':<31}{'ms':>8}{'best':>8}{'worst':>8}{'bytes moved':>13}{'kept':>6}{'GB/s':>7}{'of copy':>9}",
    ]
    for line in report["lines"]:
        rows.append(
            f"{line['name']:<31}{1e3 * line['seconds']:>8.1f}{1e3 * line['best_seconds']:>8.1f}"
            f"{1e3 * line['worst_seconds']:>8.1f}{line['moved_bytes_a_parameter']:>13}"
            f"{line['state_bytes_a_parameter']:>6}{line['gb_s']:>7.1f}{line['share_of_copy']:>9.0%}"
        )
    for key, goal in (("plain_over_sophia", 3.5), ("torch_adamw_over_sophia", 1.0)):
        found = report[key]
        rows.append(
            f"{key.replace('_', ' ')}: {found['median']:.2f} (quartiles {found['lower_quartile']:.2f} to "
            f"{found['upper_quartile']:.2f}, of best times {found['best']:.2f}); goal {goal}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
