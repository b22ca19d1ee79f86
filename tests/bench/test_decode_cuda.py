"""bench/speed/decode.py --device cuda: the measuring loop on the emulator, transformers on the CPU, and no device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.emulator import emulated_cuda

from bench.speed import decode, decode_cuda
from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.sampling import Sampler
from hrmcore.machine import Work
from hrmcore.model import HRM

pytestmark = [pytest.mark.usefixtures("one_thread")]

TOY = HRMConfig(50, 32, 32, 1, 2, 16, H_cycles=1, L_cycles=1, max_position_embeddings=128)


class Emulated(CudaRunner):
    drawn = 0

    def draw(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler], left: Sequence[int]
    ) -> list[int]:
        self.drawn += len(handles)
        with emulated_cuda():
            return super().draw(handles, tokens, samplers, left)

    def decode(self, *operands: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if _C.emulating_cuda() else emulated_cuda():
            return super().decode(*operands)


@pytest.mark.emulated
def test_batches_take_turns_and_contexts_that_fit_follow() -> None:
    torch.manual_seed(0)
    runner, timed = Emulated(HRM(TOY).requires_grad_(False), blocks=2), []

    def clock(call: Work) -> float:
        call()
        timed.append(call)
        return 0.5

    line = decode_cuda.measure(runner, "cpu", 7, [1, 3], [20, 125], 2, 2, clock, 1 << 20)
    assert set(line["tokens_a_second"]) == set(line["share_of_copy"]) == set(line["share_of_step"]) == {"1", "3"}
    assert min(line["tokens_a_second"].values()) > 0
    assert line["copy_gb_s"] == (1 << 20) / 0.5 / 1e9
    assert list(line["contexts"]) == ["20"]  # after 125 tokens no four more fit
    # Three turns of both batches and two of the context, each of two tokens and the one before.
    assert runner.drawn == 3 * 3 * (1 + 3) + 2 * 3
    assert runner.open_sequences == runner.steps_ahead == 0
    assert "of the step's" in decode_cuda.row({"engine": "hrmcore bfloat16"} | line)


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_transformers_is_timed_or_says_what_it_does_not_take(static: bool, checkpoint: Path) -> None:
    line = decode_cuda.of_transformers(checkpoint, "cpu", 5, 4, 1, static)
    assert ("error" in line) != (line.get("first_token_seconds", 0) > 0)
    assert static or line["tokens_a_second"]["1"] > 0
    assert decode_cuda.row({"engine": "transformers"} | line).startswith("transformers: ")


def test_without_a_device_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert decode.main(["nowhere", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench.speed.decode: device 'cuda': torch")
    assert captured.err.count("\n") == 1
