"""bench/gpu/checklist.py on the emulator: what can run passes, what cannot says so, and what is planted is found."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.emulator import device_with

from hrmcore.engine.cuda_sampling import SamplerSlots

# A forked process has none of the threads that the kernels of this one have started.
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
NEEDS_GPU = ["cubins", "memcheck", "racecheck", "synccheck", "initcheck"]


@pytest.fixture
def checks() -> ModuleType:
    return importlib.import_module("bench.gpu.checks")


@pytest.fixture
def models(checks: ModuleType) -> ModuleType:
    return importlib.import_module("bench.gpu.models")


@pytest.fixture
def checklist(checks: ModuleType) -> ModuleType:
    return importlib.import_module("bench.gpu.checklist")


def failures(checklist: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """The checks that failed, with their reasons; the exit status must fit."""
    status = checklist.main(["--emulated", "--only", *arguments])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (1 if report["failed"] else 0)
    assert report["failed"] == [check["name"] for check in report["checks"] if check["status"] == "failed"]
    return {check["name"]: check["reason"] for check in report["checks"] if check["status"] == "failed"}


@pytest.mark.slow
def test_every_check_runs_or_says_why_not(tmp_path: Path, checklist: ModuleType) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu.checklist", "--emulated", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    assert json.loads(ran.stdout.splitlines()[-1]) == report
    assert report["device"] == "emulated"
    assert report["failed"] == []
    assert [check["name"] for check in report["checks"]] == list(checklist.CHECKS)
    by_name = {check["name"]: check for check in report["checks"]}
    for name, check in by_name.items():
        expected = "not_run" if name in NEEDS_GPU else "passed"
        assert check["status"] == expected, check
        assert bool(check["figures"]) == (expected == "passed")
    assert all(by_name[name]["reason"].startswith("needs a GPU: ") for name in NEEDS_GPU)
    assert by_name["goldens"]["figures"]["replayed"] >= 30
    assert by_name["optimizer_bandwidth"]["figures"]["Sophia"] == {"bytes_a_parameter": 24}
    greedy = by_name["greedy_tokens"]["figures"]
    assert greedy["tokens"] == 3
    assert greedy["same_where_decided"] == greedy["decided"] >= 2
    assert by_name["soak"]["figures"]["cancelled"] > 10
    assert by_name["ranks"]["figures"]["backends"] == ["gloo", "gloo"]
    assert by_name["sampling"]["figures"]["all"] == {"draws": 4, "different": 0}
    assert by_name["fed_back"]["figures"] == {"answers": 3, "tokens": 4, "different": 0}
    assert len(by_name["int8_cache"]["figures"]["errors"]) == 3
    assert by_name["captured_prefill"]["figures"]["40"]["error"] <= 2e-2
    for dtype in ("int8", "int4"):
        packed = by_name["packed_prefill"]["figures"][dtype]
        assert packed["bits"] == "the same"
        assert packed["40"]["error"] <= 2e-2
    assert by_name["second_device"]["figures"] == {"results": 9 + 2, "bits": "the same"}
    assert by_name["graph_against_fused_step"]["figures"]["batch_32"] == "same bits"


def test_a_golden_that_differs(
    checklist: ModuleType,
    checks: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, "OPS", ("swiglu",))
    monkeypatch.setattr(checks, "OPTIMIZERS", ())
    goldens = json.loads(checklist.GOLDENS.read_text())
    path = tmp_path / "goldens.json"
    path.write_text(json.dumps(goldens))
    assert failures(checklist, capsys, "goldens", "--goldens", str(path)) == {}
    golden = goldens["swiglu 1 float32"]
    golden["products"] = [x + 3e-5 * golden["norm"] for x in golden["products"]]
    path.write_text(json.dumps(goldens))
    found = failures(checklist, capsys, "one_hot_mma", "goldens", "--goldens", str(path))
    assert list(found) == ["goldens"]
    assert "swiglu 1 float32 by 3e-05" in found["goldens"]


def test_a_wrong_fragment_layout(
    checklist: ModuleType, checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One register of A with its halves exchanged. (In A and B at once the product would be the same.)"""
    assert failures(checklist, capsys, "one_hot_mma", "halves") == {}
    right, first = checks._pairs, iter([True])
    monkeypatch.setattr(
        checks, "_pairs", lambda *halves: right(*(halves[1::-1] if next(first, False) else halves[:2]), halves[2])
    )
    assert "registers over all products are wrong" in failures(checklist, capsys, "one_hot_mma")["one_hot_mma"]


def test_bytes_that_should_not_move(
    checklist: ModuleType, checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(checks.MOVED, "AdamW", 20)
    found = failures(checklist, capsys, "optimizer_bandwidth", "grid_barriers")
    assert list(found) == ["optimizer_bandwidth"]
    assert "must move 20 bytes" in found["optimizer_bandwidth"]


def test_repeats_with_other_bits(
    checklist: ModuleType, checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "OPS", ())
    monkeypatch.setattr(checks, "OPTIMIZERS", ("AdamW",))
    monkeypatch.setattr(checks, "optimizer_steps", lambda here, kind: checks.torch.rand(3))
    found = failures(checklist, capsys, "identical_repeats")
    assert found == {"identical_repeats": "AdamW: repeat 1 has other bits than the first"}


def test_forms_of_the_decode_step_that_differ(
    checklist: ModuleType, models: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Off(models.CudaStep):  # type: ignore[name-defined, misc]
        def __call__(self, *operands: Any) -> Any:
            logits = super().__call__(*operands)
            return logits + (1e-3 if self.form == "persistent" and len(logits) == 8 else 0)

    monkeypatch.setattr(models, "CudaStep", Off)
    found = failures(checklist, capsys, "graph_against_fused_step", "grid_barriers")
    assert found == {"graph_against_fused_step": "batch 8: the two forms have other bits"}


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [(2e-2, "logits differ by 0."), (1.0, "other tokens where transformers' best one leads: {'tokens': 1,")],
)
def test_a_token_that_transformers_does_not_say(
    allowed: float,
    reason: str,
    checklist: ModuleType,
    models: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Second(models.CudaRunner):  # type: ignore[name-defined, misc]
        """Its best logit is 0 at the end of the prompt."""

        def open(self, *operands: Any) -> Any:
            handles, rows = super().open(*operands)
            return handles, rows * (rows < rows.max())

    monkeypatch.setattr(models, "CudaRunner", Second)
    monkeypatch.setattr(models, "EMULATED_TOKENS", 1)
    monkeypatch.setattr(models, "ALLOWED", allowed)
    found = failures(checklist, capsys, "greedy_tokens")
    assert found["greedy_tokens"].startswith(reason)


def test_draws_that_are_not_the_cpu_s(
    checklist: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = SamplerSlots.draw
    monkeypatch.setattr(SamplerSlots, "draw", lambda self, logits, *rest: draw(self, -logits, *rest))
    found = failures(checklist, capsys, "sampling", "fed_back")
    assert found["sampling"].startswith("greedy: ")
    assert found["sampling"].endswith(" of 4 tokens are not the CPU's")
    assert found["fed_back"].endswith(" of 3 answers are not those of the host")


def test_a_step_that_does_not_train(
    checklist: ModuleType, models: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models.optim.AdamAtan2, "step", lambda self: None)
    found = failures(checklist, capsys, "training_mfu")
    assert found["training_mfu"].startswith("the loss of one batch went from 4.")


def test_the_share_of_a_peak(models: ModuleType) -> None:
    """The published run (arXiv 2605.20613): 22,600 tokens/s, 17.7 GFLOP each without head and attention."""
    flops = models.planner.training_flops(models.HRMConfig.preset("XL"), 5, 1000).total
    figures = models.of_peak(flops, 1000, 1000 / 22_600, 989.4e12)
    assert figures == {
        "gflop_a_token": pytest.approx(17.7, abs=0.05),
        "tokens_a_second": pytest.approx(22_600),
        "tflops": pytest.approx(400, abs=1),
        "mfu": pytest.approx(0.404, abs=0.001),
    }
    assert models.of_peak(flops, 1000, None, None) == {"gflop_a_token": figures["gflop_a_token"]}


def test_pairs_of_a_batch_and_the_model_that_fits(models: ModuleType) -> None:
    batch, pairs = models.random_batch([4, 1], 50)
    assert batch.offsets.tolist() == [0, 4, 5]
    assert len(batch.targets) == 2 + 1 + 2
    assert pairs == (2 + 2 + 3 + 4) + 1
    assert models.largest_that_fits(80e9) == "XL"
    assert models.largest_that_fits(24e9) in ("B", "L")
    with pytest.raises(models.NotRunError, match=r"the smallest model takes \d+\.\d GB, 2\.0 GB are free"):
        models.largest_that_fits(2e9)


def test_one_gpu_is_not_two(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = importlib.import_module("bench.gpu.devices")
    monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(checks.NotRunError, match="needs two GPUs, this machine has 1"):
        devices.second_device(checks.Here(False, Path()))


def test_a_second_device_with_other_bits(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, turns = importlib.import_module("bench.gpu.devices"), iter([0.0, 1.0])
    monkeypatch.setattr(devices, "computed_on", lambda device, here: [("a draw", checks.torch.tensor(next(turns)))])
    with pytest.raises(checks.WrongError, match="cpu and cpu have other bits: a draw"):
        devices.second_device(checks.Here(True, Path()))


def sleep() -> dict[str, Any]:
    time.sleep(60)
    return {}


def die() -> dict[str, Any]:
    os._exit(7)


def err() -> dict[str, Any]:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (sleep, "no answer within 0.5 s"),
        (die, "the process died with exit status 7"),
        (err, "KeyError: 'x'"),
    ],
)
def test_a_check_that_does_not_answer(checklist: ModuleType, check: Callable[[], dict[str, Any]], reason: str) -> None:
    record = checklist.in_child(check, 0.5 if check is sleep else 60)
    assert (record.status, record.reason) == ("failed", reason)


def test_no_gpu_is_said(
    checklist: ModuleType, checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> dict[str, Any]:
        raise checks.WrongError("torch finds no CUDA device")

    monkeypatch.setattr(checks, "gpu", none)
    assert checklist.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "no GPU: torch finds no CUDA device; give --emulated to try the checks themselves\n"


def test_the_cubins_of_a_gpu(checks: ModuleType) -> None:
    """A GPU runs what was compiled for its own major version, up to its minor one."""
    paths = [Path(f"_C_cuda.{i}.sm_{v}.cubin") for i, v in enumerate((80, 90, 100, 120, 80))]
    targets = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 3): "sm_100", (12, 0): "sm_120"}
    assert {gpu: checks.chosen(paths, *gpu) for gpu in targets} == targets
    with pytest.raises(checks.WrongError, match="no cubin for sm_75; there are sm_80, sm_90, sm_100, sm_120"):
        checks.chosen(paths, 7, 5)


@pytest.fixture
def endurance(checks: ModuleType) -> ModuleType:
    return importlib.import_module("bench.gpu.endurance")


def test_a_soak_counts_wrong_answers_and_memory_that_grows(
    checklist: ModuleType,
    checks: ModuleType,
    endurance: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(endurance, "FEW_REQUESTS", 10)
    monkeypatch.setattr(endurance, "TOKENS", 4)
    monkeypatch.setattr(endurance, "MAX_BATCH", 4)
    here = checks.Here(True, Path())
    figures = endurance.soak(here)
    assert figures["requests"] >= 14
    with monkeypatch.context() as patch:
        held = iter([{"host": 0}, {"host": endurance.GROWN_HOST + 1}])
        patch.setattr(endurance, "memory", lambda device: next(held))
        with pytest.raises(checks.WrongError, match="memory grew by"):
            endurance.soak(here)
    with monkeypatch.context() as patch:
        patch.setattr(endurance.Soak, "fill", lambda soak: soak.alone.__setitem__(slice(None), ["?"] * 12))
        with pytest.raises(checks.WrongError, match=r"\d+ of \d+ answers are not what the prompt gets alone"):
            endurance.soak(here)


def test_no_memory_that_nobody_notices(
    checks: ModuleType, endurance: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checks.Here(True, Path())
    with endurance.no_memory(here), pytest.raises(endurance.torch.OutOfMemoryError):
        endurance.torch.zeros(3)
    assert endurance.expect_memory_error("it", lambda: [][0], IndexError) == "list index out of range"
    with pytest.raises(checks.WrongError, match="it: there was no memory, and no error came"):
        endurance.expect_memory_error("it", lambda: None, MemoryError)
    monkeypatch.setattr(endurance, "_NoMemory", endurance.contextlib.nullcontext)
    with pytest.raises(checks.WrongError, match="a prefill: there was no memory, and no error came"):
        endurance.out_of_memory(here)


def test_a_rank_that_fails_says_why(checks: ModuleType, endurance: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(checks.WrongError, match=r"(?s)1 processes over gloo: .*No such file") as error:
        endurance.run_ranks(tmp_path / "none.toml", 1, "gloo", "cpu")
    assert "none.toml" in str(error.value)


def test_the_decode_step_under_the_sanitizers(checks: ModuleType, models: ModuleType) -> None:
    here = checks.Here(True, Path())
    with device_with(227):
        assert models.every_small_step(here) == 2 * len(models.MMA_DTYPES) * 4  # of 1, 8, 9 and 32 requests
    assert importlib.import_module("bench.gpu.sampling").every_small_draw(here) == 14
