"""`hrmcore bench --device cuda` on the emulator, by a clock that is none; and what it says without a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.emulator import emulated_cuda

from hrmcore import cli, machine, microbench, step_bench
from hrmcore.config import HRMConfig
from hrmcore.machine import Work

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

TOY = HRMConfig(50, 32, 32, 1, 2, 16, H_cycles=1, L_cycles=1, max_position_embeddings=512)


class Clock:
    """Each call takes one second longer than the one before, whatever it does."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self, call: Work) -> float:
        call()
        self.now += 1
        return float(self.now)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> microbench.Place:
    """The CPU in the place of a CUDA device, whose limits cost nothing."""
    made = microbench.Place("cpu", Clock())
    monkeypatch.setattr(microbench, "place_of", lambda device: made)
    limits = {"processor": "a card", "torch": "2", "copy_gbs": 4e3, "float32_gflops": 1.0, "bfloat16_gflops": 2.0}
    monkeypatch.setattr(microbench, "cuda_limits", lambda seconds, device: limits)
    return made


def cheap(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    page = microbench._page(name)
    cases = page.cases
    monkeypatch.setattr(page, "cases", lambda dtype=torch.float32: list(cases(dtype))[:2])


@pytest.mark.parametrize("name", ["swiglu", "attention"])
def test_an_op_is_timed_beside_torch_by_the_device_s_clock(
    name: str, place: microbench.Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap(monkeypatch, name)
    assert place.on_cuda
    with emulated_cuda():
        report = microbench.run([name], 1, 1e-9, False, "cuda")
    assert [(line["direction"], line["dtype"]) for line in report["ops"]] == [
        (direction, dtype) for dtype in ("float32", "bfloat16") for direction in ("forward", "backward")
    ]
    for number, line in enumerate(report["ops"]):  # five turns of ours, a copy, a product, torch; the first is the best
        assert (line["seconds"], line["peer_seconds"], line["peer"]) == (20 * number + 1, 20 * number + 4, "torch")
        assert line["times_torch"] == line["peer_seconds"] / line["seconds"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["a card, torch 2", "limits: copy 4000 GB/s, bfloat16 2 GFLOP/s, float32 1 GFLOP/s"]


def test_the_better_of_torch_and_torch_compiled_counts(
    place: microbench.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap(monkeypatch, "swiglu")
    compiled: list[Callable[..., Any]] = []

    def compile_(peer: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled.append(peer)
        return peer

    class Earlier(Clock):
        """Less at each call."""

        def __call__(self, call: Work) -> float:
            return 1000 - super().__call__(call)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(microbench, "place_of", lambda device: microbench.Place("cpu", Earlier(), compiles=True))
    with emulated_cuda():
        lines = microbench.run(["swiglu"], 1, 1e-9, False, "cuda")["ops"]
    assert len(compiled) == 2
    assert {line["peer"] for line in lines} == {"torch, compiled"}

    def refuse(peer: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    with emulated_cuda():
        lines = microbench.run(["swiglu"], 1, 1e-9, False, "cuda")["ops"]
    assert {line["peer"] for line in lines} == {"torch"}


def test_a_wrong_kernel_is_not_timed(place: microbench.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch, "swiglu")
    page = microbench._page("swiglu")
    right = page.swiglu
    monkeypatch.setattr(page, "swiglu", lambda ab: right(ab) * 1.01)
    with emulated_cuda(), pytest.raises(microbench.WrongKernelError, match="swiglu, case 0, float32, cpu: the error"):
        microbench.run(["swiglu"], 1, 1e-9, False, "cuda")


def test_the_decode_step_has_a_line_for_every_dtype_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "CACHED", 5)
    lines = list(step_bench.decode_step_lines("cpu", Clock(), 1e-9, TOY, emulated_cuda, blocks=2))
    assert [(line["dtype"], line["shape"]) for line in lines] == [
        (dtype, f"{batch}x5") for dtype in ("bfloat16", "int8", "int4") for batch in (1, 8)
    ]
    for line in lines:
        assert line["times_torch"] == line["peer_seconds"] / line["seconds"]
        assert line["share_of_limit"] == (line["seconds"] + 1) / line["seconds"]


def test_a_step_s_bytes_are_its_weights_and_its_cache() -> None:
    """Of the packed weights at 8.5 bits, and of the keys and values of 201 tokens."""
    config = HRMConfig.preset("XL")
    layer, head = 1536 * (5 * 1536 + 3 * 4096), 65536 * 1536
    expected = (config.cache_slots * layer + head) * 8.5 / 8 + 8 * 201 * 4 * config.cache_slots * 1536
    assert step_bench.step_bytes(config, "int8", 8) == expected
    assert step_bench.step_bytes(config, "int4", 1) < step_bench.step_bytes(config, "int8", 1)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(microbench, "run", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("arguments", "device", "with_step"),
    [([], "cpu", False), (["--device", "cuda:1"], "cuda:1", True), (["--device", "cuda", "rope"], "cuda", False)],
)
def test_the_decode_step_follows_all_ops(
    bench: list[tuple[Any, ...]], arguments: list[str], device: str, with_step: bool
) -> None:
    assert cli.main(["bench", *arguments]) == 0
    assert bench[0][4] == device
    assert (bench[0][5] is not None) == with_step


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_without_a_device_it_says_so_in_a_line(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cli.main(["bench", "--device", device]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "device 'cuda': torch" in captured.err


def test_a_device_beyond_the_last_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(microbench, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["bench", "--device", "cuda:2"]) == 2
    assert "device 'cuda:2': this machine has 2 CUDA devices" in capsys.readouterr().err


def test_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "tpu"]) == 2
    assert "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'" in capsys.readouterr().err


def test_events_are_read_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert machine.cuda_seconds(lambda: log.append("call")) == 2.5e-3
    assert log == ["record", "call", "record", "wait"]
    assert machine.best_times([lambda: None], 1e-9, machine.cuda_seconds) == [2.5e-3]
