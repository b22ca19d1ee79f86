"""The planner: against the published runs, torch's FLOP counter, what autograd keeps, and the model itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import hrmcore
from torch.utils.flop_counter import FlopCounterMode

from hrmcore.commands.plan import measure
from hrmcore.config import PRESETS, RECOMPUTE, HRMConfig, LoraConfig, default_intermediate_size
from hrmcore.data.packing import PackedBatch
from hrmcore.gpus import GPUS, Device
from hrmcore.model import HRM, grad_visits
from hrmcore.ops import cross_entropy
from hrmcore.ops.backend import reference_ops
from hrmcore.planner import (
    Budget,
    Horizon,
    Record,
    Stage,
    activation_elements,
    backward_visits,
    memory,
    parameters,
    plan,
    training_flops,
    widest,
)
from hrmcore.train.run_file import TrainConfig, horizon, read_config

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> HRMConfig:
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_layers_per_stack": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 128,
    }
    return HRMConfig(**values | changes)


def batch(config: HRMConfig, lengths: list[int], prompts: list[int]) -> PackedBatch:
    """Random sequences, packed; the loss is on what follows each prompt."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    supervised = [torch.arange(int(offsets[s]) + prompts[s] - 1, int(offsets[s + 1]) - 1) for s in range(len(lengths))]
    rows = torch.cat(supervised)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    return PackedBatch(
        ids=ids,
        offsets=offsets.int(),
        prefix=torch.tensor(prompts, dtype=torch.int32),
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        supervised=rows,
        targets=ids[rows],
        records=tuple(range(len(lengths))),
    )


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert hrmcore("plan", *arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# --- against the published runs (arXiv 2605.20613 and its repository) ---------------------------------------------

PUBLISHED = ["--tokens", "60e9", "--gpu", "H100", "--utilization", "0.38", "--price", "2"]


def test_the_published_1b_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--size", "XL", "--count", "16", *PUBLISHED)
    assert result["flops"] == pytest.approx(1.0e21, rel=0.05)
    assert result["hours"] == pytest.approx(46, rel=0.05)
    assert result["dollars"] == pytest.approx(1472, rel=0.05)
    assert 1e9 < result["memory_bytes_per_gpu"] < 80e9
    assert result["fits"] is True


def test_the_published_0_6b_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--size", "L", "--count", "8", *PUBLISHED)
    assert result["hours"] == pytest.approx(50, rel=0.05)
    assert result["dollars"] == pytest.approx(800, rel=0.05)


# --- against the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*PRESETS, "odd"])
def test_parameters_are_the_models(size: str) -> None:
    shape = config(num_attention_heads=3, head_dim=24) if size == "odd" else HRMConfig.preset(size)
    with torch.device("meta"):
        model = HRM(shape)
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("cycles", [(1, 1), (1, 4), (2, 3), (3, 1), (4, 2)])
def test_backward_visits_are_the_models(cycles: tuple[int, int]) -> None:
    shape = config(H_cycles=cycles[0], L_cycles=cycles[1])
    for k in (None, *range(2, 20)):
        assert sum(backward_visits(shape, k)) == len(grad_visits(*cycles, k))
    with pytest.raises(ValueError, match="at least 2"):
        backward_visits(shape, 1)


@pytest.mark.parametrize("horizon_k", [2, 3, 5, 8, None])
@pytest.mark.parametrize("cycles", [(2, 3), (3, 1)])
def test_flops_are_those_that_torch_counts(horizon_k: int | None, cycles: tuple[int, int]) -> None:
    """On the reference ops, whose products the counter sees. They compute every pair of a sequence, visible or not.

    While K <= H_cycles, no gradient is asked of the first block's input, which the formula counts; else it is exact.
    """
    shape = config(vocab_size=500, H_cycles=cycles[0], L_cycles=cycles[1])
    lengths, prompts = [40, 23, 1 + 30], [10, 5, 30]
    packed = batch(shape, lengths, prompts)
    model = HRM(shape)
    with reference_ops(), FlopCounterMode(display=False) as counter:
        model.loss(packed, horizon=horizon_k).backward()
    pairs = sum(length**2 for length in lengths)
    expected = training_flops(shape, horizon_k, sum(lengths), len(packed.targets), pairs)
    tolerance = 0.02 if horizon_k is not None and horizon_k <= shape.H_cycles else 1e-12
    assert expected.total == pytest.approx(counter.get_total_flops(), rel=tolerance)
    assert min(dataclasses.astuple(expected)) > 0.01 * expected.total  # every part is large enough to be seen


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("horizon_k", [2, 5, 8])
def test_activations_are_what_autograd_keeps(horizon_k: int, precision: str, recompute: str) -> None:
    """The kernels' saved tensors of a real step, each storage once, without weights and without the head's."""
    shape = config(vocab_size=16, hidden_size=64, head_dim=16, num_layers_per_stack=3)
    packed = batch(shape, [128] * 8, [64] * 8)
    model = HRM(shape)
    sizes = {tuple(parameter.shape) for parameter in model.parameters()}
    sizes |= {tuple(reversed(size)) for size in sizes}
    kept: dict[int, int] = {}
    tensors = []
    tokens = {len(packed.ids), len(packed.targets)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in sizes and tensor.is_floating_point() and tokens & set(tensor.shape):
            tensors.append(tensor)  # alive, so that no storage comes back under the same address
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = model.loss(packed, horizon=horizon_k, recompute=recompute)
    loss.backward()  # for a visit's own tensors are kept when it is computed again, and not by these hooks
    estimate = memory(shape, horizon_k, len(packed.ids), 0.5, 1, precision, recompute)
    assert estimate.activations == pytest.approx(sum(kept.values()), rel=0.02)


def test_a_step_holds_no_matrix_of_all_pairs_and_no_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a step on one long sequence; on the reference ops it is one or the other."""
    length = 2048
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 128 * length)
    shape = config(vocab_size=length, num_layers_per_stack=1, L_cycles=1, max_position_embeddings=length)
    model, packed = HRM(shape), batch(shape, [length], [length // 2])

    def largest() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            model.loss(packed, horizon=2).backward()
        events = profile.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    logits = 4 * len(packed.targets) * length  # half as large as all pairs
    assert largest() < logits / 2
    with reference_ops():
        assert largest() >= 4 * length**2


PEAK = """
import json, sys
import torch
from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.data import PackedBatch
from hrmcore.model import HRM

def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def train(model, sequences, steps):
    length, vocabulary = 64, model.config.vocab_size
    ids = torch.randint(0, vocabulary, (sequences * length,))
    rows = torch.cat([torch.arange(s * length + 32, (s + 1) * length) for s in range(sequences)])
    batch = PackedBatch(
        ids=ids,
        offsets=torch.arange(0, len(ids) + 1, length, dtype=torch.int32),
        prefix=torch.full((sequences,), 32, dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32).repeat(sequences),
        supervised=rows,
        targets=ids[rows],
        records=tuple(range(sequences)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            loss = model.loss(batch, horizon=5, recompute=recompute) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
_C.set_num_threads(1)
shape, sequences, bfloat16, recompute = json.loads(sys.argv[1])
config = HRMConfig.from_dict(shape)
train(HRM(config.replace(hidden_size=64, num_attention_heads=1, head_dim=64, num_layers_per_stack=1)), 1, 1)
before = peak()
train(HRM(config), sequences, 2)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("precision", "recompute"),
    [("float32", "sublayer"), ("bfloat16", "sublayer"), ("bfloat16", "none"), ("float32", "visit")],
)
@pytest.mark.parametrize(("width", "vocabulary", "sequences"), [(128, 512, 64), (512, 8000, 8)])
def test_the_peak_is_that_of_a_real_step(
    width: int, vocabulary: int, sequences: int, precision: str, recompute: str
) -> None:
    """Two steps in a process of their own: first mostly activations, then mostly weights.

    The C allocator is told to give freed blocks back: what it would keep for itself is up to it, not to the model.
    """
    shape = config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 21 // 8,
        num_attention_heads=width // 64,
        head_dim=64,
    )
    arguments = json.dumps([shape.to_dict(), sequences, precision == "bfloat16", recompute])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, arguments], capture_output=True, text=True, check=True, env=environment
    )
    estimate = memory(shape, 5, 64 * sequences, 0.5, 1, precision, recompute)
    assert estimate.peak == pytest.approx(int(done.stdout), rel=0.1)


def test_the_horizon_is_the_trainers() -> None:
    for first, last, fraction, steps in [(2, 5, 0.2, 3000), (2, 5, 0.0, 10), (3, 3, 0.5, 10), (2, 8, 1.0, 600)]:
        run = TrainConfig(
            model=config(),
            train_files=("none",),
            tokenizer="none",
            out="none",
            steps=steps,
            horizon_first=first,
            horizon_last=last,
            horizon_fraction=fraction,
        )
        taken = [horizon(run, step) for step in range(steps)]
        for start, stop in [(0.0, 1.0), (0.1, 0.5), (0.6, 1.0)]:
            shares = dict(Horizon(first, last, fraction).shares(start, stop))
            assert sum(shares.values()) == pytest.approx(stop - start)
            part = taken[round(start * steps) : round(stop * steps)]
            for k in range(first, last + 1):
                assert shares.get(k, 0) == pytest.approx(part.count(k) / steps, abs=1.01 / steps)


def test_a_records_pairs_are_the_masks() -> None:
    for prompt, response in [(5, 3), (0, 7), (6, 0), (1, 1)]:
        length = prompt + response
        seen = sum(j < max(prompt, i + 1) for i in range(length) for j in range(length))
        assert Record(prompt, response).pairs == pytest.approx(seen / length)
        assert Record(prompt, response).supervised == pytest.approx(response / length)


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_growing_run_is_the_sum_of_its_stages() -> None:
    small, large = HRMConfig.preset("L"), HRMConfig.preset("XL")
    budget = Budget(60e9, GPUS["H100"], count=8, record=Record(120, 180))
    grown = plan([Stage(0, "L", small), Stage(20e9, "XL", large)], budget)
    alone = [plan([Stage(0, "", shape)], budget).flops for shape in (small, large)]
    assert grown.from_scratch == alone[1]
    assert alone[0].total < grown.flops.total < alone[1].total
    # K is 5 from 12e9 tokens on, so the last 40e9 tokens cost the large model the same in both runs.
    record = Record(120, 180)
    last = training_flops(large, 5, 40e9, 40e9 * record.supervised, 40e9 * record.pairs)
    assert grown.stages[1].flops.total == pytest.approx(last.total)
    assert sum(stage.tokens for stage in grown.stages) == 60e9
    assert grown.memory == grown.stages[1].memory


def test_sharding_divides_what_it_shards() -> None:
    shape = config()
    one, four = (memory(shape, 5, 1000, 0.5, ranks, "bfloat16") for ranks in (1, 4))
    for part in ("weights", "optimizer", "gradients"):
        assert getattr(one, part) == 4 * getattr(four, part)
    assert (one.activations, one.logits) == (four.activations, four.logits)
    assert four.cast == 2 * parameters(shape)
    assert one.weights + one.gradients + one.optimizer == 16 * parameters(shape)
    assert activation_elements(shape, 2) == 2 * (2 * 48 + 5 * 64 + 2 * 128) + 48  # what blocks keep, and a stack's norm


def test_a_checkpoint_and_its_config_are_planned(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [planned(capsys, str(path), "--tokens", "1e6") for path in (checkpoint, checkpoint / "config.json")]
    for result in results:
        assert result["parameters"] == sum(p.numel() for p in HRM.from_pretrained(checkpoint).parameters())
        assert result["dollars"] is None
    assert results[0]["flops"] == results[1]["flops"]


def write_plan(checkpoint: Path, folder: Path, keys: str = "", stages: str = "") -> Path:
    run_file = folder / "run.toml"
    run_file.write_text(
        f'train_files = ["a.jsonl"]\ntokenizer = "{checkpoint}"\nout = "out"\nsteps = 100\nbatch_tokens = 512\n{keys}'
        "[model]\nhidden_size = 32\nintermediate_size = 48\nnum_layers_per_stack = 1\n"
        f"num_attention_heads = 2\nhead_dim = 16\n{stages}"
    )
    return run_file


def test_a_run_file_says_the_rest(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = write_plan(checkpoint, tmp_path, keys="horizon_last = 3\n")
    result = planned(capsys, str(run_file))
    assert (result["tokens"], result["batch_tokens"], result["precision"]) == (51200, 512, "float32")
    assert result["horizon"] == {"first": 2, "last": 3, "fraction": 0.2}
    assert planned(capsys, str(run_file), "--tokens", "7", "--batch-tokens", "3")["tokens"] == 7


def test_a_run_files_growth_is_planned(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wider = "[[grow]]\nat_tokens = 20000\nhidden_size = 64\n"
    deeper = "[[grow]]\nat_tokens = 30000\nnum_layers_per_stack = 3\n"
    run_file = write_plan(checkpoint, tmp_path, stages=wider + deeper)
    result = planned(capsys, str(run_file))
    small = read_config(run_file).model
    wide = small.replace(hidden_size=64, embedding_scale=None)
    deep = wide.replace(num_layers_per_stack=3)
    assert [stage["parameters"] for stage in result["stages"]] == [parameters(shape) for shape in (small, wide, deep)]
    assert [stage["tokens"] for stage in result["stages"]] == [20000, 10000, 21200]
    assert result["parameters"] == parameters(deep)
    assert result["flops"] < result["from_scratch_flops"]
    assert hrmcore("plan", str(run_file)) == 0
    out = capsys.readouterr().out
    assert f"[[grow]] 2   {parameters(deep):,} parameters, 2.12e+04 tokens" in out
    assert re.search(r"^time +[\d.]+ seconds on", out, re.M)


def test_a_table_shows_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--size", "L", "--stage", "20e9:XL", "--count", "8", *PUBLISHED]
    assert hrmcore(*arguments) == 0
    out = capsys.readouterr().out
    result = planned(capsys, *arguments[1:])
    assert f"{result['parameters']:,}" in out
    assert f"{result['flops']:.3g}" in out
    assert f"{result['hours']:.1f} hours" in out
    assert f"${result['dollars']:,.0f}" in out
    assert f"{result['memory_bytes_per_gpu'] / 1e9:.1f} GB" in out
    assert "growing saves" in out
    assert "without head and attention" in out


def test_planning_a_size_needs_no_torch() -> None:
    code = "import sys; from hrmcore.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["plan", "--size", "B", "--tokens", "1e9"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


def test_this_machine_can_be_measured() -> None:
    device = measure("float32", seconds=0.05)
    assert 1e8 < device.peak < 1e16
    assert 1e8 < device.memory < 1e14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--size", "XS", "--tokens", "1"], "invalid choice: 'XS'"),
        (["--size", "B"], "say how many --tokens"),
        (["--size", "B", "--tokens", "many"], "--tokens: invalid float value: 'many'"),
        (["--size", "B", "--tokens", "0"], "tokens must be from 1"),
        (["--size", "B", "--tokens", "nan"], "tokens must be from 1"),
        (["--size", "B", "--tokens", "1e300"], "tokens must be from 1"),
        (["--size", "B", "--tokens", "1", "--gpu", "H1000"], "invalid choice: 'H1000'"),
        (["--size", "B", "--tokens", "1", "--count", "0"], "count must be from 1"),
        (["--size", "B", "--tokens", "1", "--batch-tokens", "0"], "batch_tokens must be from 1"),
        (["--size", "B", "--tokens", "1", "--utilization", "1.5"], "utilization must be above 0"),
        (["--size", "B", "--tokens", "1", "--utilization", "nan"], "utilization must be above 0"),
        (["--size", "B", "--tokens", "1", "--price", "-1"], "price must be 0 or more"),
        (["--size", "B", "--tokens", "1", "--prompt-tokens", "9"], "go together"),
        (["--size", "B", "--tokens", "1", "--prompt-tokens", "-9", "--response-tokens", "20"], "prompt tokens must be"),
        (["--size", "B", "--tokens", "1", "--prompt-tokens", "0", "--response-tokens", "0"], "at least one token"),
        (["--size", "B", "--tokens", "9", "--stage", "5"], "--stage must be TOKENS:SIZE"),
        (["--size", "B", "--tokens", "9", "--stage", "x:L"], "--stage must be TOKENS:SIZE"),
        (["--size", "B", "--tokens", "9", "--stage", "9:L"], "stages must start at rising token counts"),
        (["--size", "B", "--tokens", "9", "--stage", "5:L", "--stage", "4:XL"], "rising token counts"),
        (["--size", "L", "--tokens", "9", "--stage", "5:B"], "stage B: hidden_size would shrink from 1280 to 1024"),
        (["--size", "B", "--tokens", "9", "--stage", "5:no/such/folder"], "no/such/folder: no such folder"),
        (["no/such/folder", "--tokens", "9"], "no/such/folder: no such folder"),
        (["no/such/config.json", "--tokens", "9"], "no/such/config.json: no such file"),
        (["no/such/run.toml", "--tokens", "9"], "no/such/run.toml: No such file"),
        (["B", "--size", "B", "--tokens", "9"], "not allowed with"),
        (["--size", "B", "--tokens", "9", "--measure", "--gpu", "H100"], "not allowed with"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore("plan", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hrmcore plan: ")
    assert message in err


def test_horizons_are_checked() -> None:
    for impossible in [(1, 5, 0.2), (5, 2, 0.2), (2, 5, 1.5)]:
        with pytest.raises(ValueError, match="horizon"):
            Horizon(*impossible)


def test_the_largest_model_of_an_80_gb_card_is_the_one_that_the_guide_states() -> None:
    """One head more does not fit; what is computed again buys width. An H200 measured 70 GB for the 1B step, K = 5."""
    guide = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    device, shape, found = GPUS["H100"], HRMConfig.preset("XL"), []
    assert device.memory == 80e9
    for recompute in RECOMPUTE:
        wide = widest(shape, device, 5, 16_384, 0.5, recompute)
        need = memory(wide, 5, 16_384, 0.5, 1, "bfloat16", recompute)
        assert need.peak + need.weights <= device.memory
        width = (wide.num_attention_heads + 1) * wide.head_dim
        more = wide.replace(
            num_attention_heads=wide.num_attention_heads + 1,
            hidden_size=width,
            intermediate_size=default_intermediate_size(width),
        )
        need = memory(more, 5, 16_384, 0.5, 1, "bfloat16", recompute)
        assert need.peak + need.weights > device.memory
        found.append(parameters(wide))
        [line] = [line for line in guide.splitlines() if line.startswith(f'| `"{recompute}"` |')]
        assert line.endswith(f"| {parameters(wide) / 1e9:.2f} B parameters |")
    assert found == sorted(found)
    with pytest.raises(ValueError, match="a GPU of nothing: its memory does not take a model of one head"):
        widest(shape, Device("a GPU of nothing", 1.0, 1e6), 5, 16_384, 0.5, "visit")


def test_a_plan_tells_what_recomputing_saves(capsys: pytest.CaptureFixture[str]) -> None:
    """And says it where it is not the usual."""
    arguments = ["--size", "XL", "--tokens", "60e9", "--batch-tokens", "16384"]
    needed = [
        planned(capsys, *arguments, "--recompute", word)["memory_bytes_per_gpu"]
        for word in ("visit", "sublayer", "none")
    ]
    assert needed == sorted(needed)
    assert needed[0] < 0.6 * needed[1]
    assert hrmcore("plan", *arguments, "--recompute", "visit") == 0
    assert "in bfloat16, recompute visit; fits in 80.0 GB" in capsys.readouterr().out


def test_adapters_are_planned_as_they_are_trained() -> None:
    Budget(1e9, GPUS["H100"], lora=LoraConfig())
    with pytest.raises(ValueError, match="adapters are planned with recompute 'sublayer' alone, got 'visit'"):
        Budget(1e9, GPUS["H100"], lora=LoraConfig(), recompute="visit")
