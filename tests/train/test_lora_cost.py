"""What [lora] costs by the planner: against torch's FLOP counter, what autograd keeps, a real step's peak; `plan`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import hrmcore
from torch.utils.flop_counter import FlopCounterMode

from hrmcore.config import BASES, HRMConfig, LoraConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.lora import adapted_model
from hrmcore.model import HRM
from hrmcore.ops.backend import reference_ops
from hrmcore.planner import adapted_memory, adapter_parameters, memory, training_flops

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 64  # tokens of a sequence, half of them with loss


def shape(width: int, vocabulary: int, layers: int) -> HRMConfig:
    return HRMConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 21 // 8,
        num_layers_per_stack=layers,
        num_attention_heads=width // 64,
        head_dim=64,
        max_position_embeddings=128,
    )


def checkpoint(folder: Path, config: HRMConfig) -> Path:
    torch.manual_seed(0)
    HRM(config).save_pretrained(folder)
    return folder


def batch(config: HRMConfig, sequences: int) -> PackedBatch:
    ids = torch.randint(0, config.vocab_size, (sequences * LENGTH,), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(s * LENGTH + LENGTH // 2, (s + 1) * LENGTH) for s in range(sequences)])
    return PackedBatch(
        ids=ids,
        offsets=torch.arange(0, len(ids) + 1, LENGTH, dtype=torch.int32),
        prefix=torch.full((sequences,), LENGTH // 2, dtype=torch.int32),
        positions=torch.arange(LENGTH, dtype=torch.int32).repeat(sequences),
        supervised=rows,
        targets=ids[rows],
        records=tuple(range(sequences)),
    )


@pytest.mark.parametrize("horizon", [2, 5, None])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_flops_are_those_that_torch_counts(horizon: int | None, targets: tuple[str, ...], tmp_path: Path) -> None:
    """On the reference ops, which compute every pair.

    The formula counts a gradient that nobody asks for: that of the first block's input, behind its gqkv projection.
    """
    config, lora = shape(128, 900, 3), LoraConfig(rank=4, targets=targets, base="float32")
    packed, model = batch(config, 3), adapted_model(checkpoint(tmp_path, config), lora)
    with reference_ops(), FlopCounterMode(display=False) as counter:
        model.loss(packed, horizon=horizon).backward()
    counts = len(packed.ids), len(packed.targets), 3 * LENGTH**2
    expected = training_flops(config, horizon, *counts, lora).total
    adapted = len({"self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} & set(lora.parts))
    unasked = 2 * len(packed.ids) * 128 * (4 * 128 + adapted * lora.rank)
    assert expected - unasked == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert expected < training_flops(config, horizon, *counts).total
    assert adapter_parameters(config, lora) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", BASES)
def test_activations_are_what_autograd_keeps(precision: str, base: str, tmp_path: Path) -> None:
    """The saved tensors of a step, each storage once; those of adapters are told by their rank, an odd number."""
    config, lora, kept, alive = shape(64, 16, 3), LoraConfig(rank=7, base=base), dict[int, int](), []
    model, packed = adapted_model(checkpoint(tmp_path, config), lora), batch(config, 16)
    tokens = {len(packed.ids), len(packed.targets)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tokens & set(tensor.shape) and 7 not in tensor.shape:
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.loss(packed, horizon=5)
    estimate = adapted_memory(config, 5, len(packed.ids), 0.5, precision, lora)
    assert estimate.activations == pytest.approx(sum(kept.values()), rel=0.02)
    assert estimate.activations == memory(config, 5, len(packed.ids), 0.5, 1, precision).activations


PEAK = """
import json, sys
from pathlib import Path
import torch
from hrmcore import _C
from hrmcore.config import LoraConfig
from hrmcore.lora import adapted_model
from hrmcore.optim import AdamW

sys.path.insert(0, sys.argv[3])
from test_lora_cost import batch, checkpoint, shape

def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def train(folder, sequences, steps):
    model = adapted_model(folder, LoraConfig(rank=8, base=base))
    packed = batch(model.config, sequences)
    optimizer = AdamW(model.parameters())
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            loss = model.loss(packed, horizon=5) / len(packed.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
_C.set_num_threads(1)
sequences, bfloat16, base = json.loads(sys.argv[2])
folder = Path(sys.argv[1])
train(folder / "small", 1, 1)
before = peak()
train(folder / "large", sequences, 2)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("precision", "base"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")]
)
@pytest.mark.parametrize(("width", "vocabulary", "sequences"), [(256, 512, 64), (768, 8000, 8)])
def test_the_peak_is_that_of_a_real_step(
    width: int, vocabulary: int, sequences: int, precision: str, base: str, tmp_path: Path
) -> None:
    """Two steps in a process of their own: first mostly activations, then mostly weights.

    The C allocator is told to give freed blocks back, as in tests/test_planner.py.
    """
    config = shape(width, vocabulary, 2)
    checkpoint(tmp_path / "small", shape(64, 64, 1))
    checkpoint(tmp_path / "large", config)
    given = [str(tmp_path), json.dumps([sequences, precision == "bfloat16", base]), str(Path(__file__).parent)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *given], capture_output=True, text=True, check=True, env=environment
    )
    estimate = adapted_memory(config, 5, LENGTH * sequences, 0.5, precision, LoraConfig(rank=8, base=base))
    assert estimate.peak == pytest.approx(int(done.stdout), rel=0.15)


def test_plan_states_the_released_1b(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--size", "XL", "--lora", "16", "--tokens", "1e6", "--batch-tokens", "512"]
    assert hrmcore(*given, "--base", "int8", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    # By hand: 32 layers of 30,670,848 weights in a byte, twice 65,536 x 1,536 in two; rank 16 on every part.
    weights = 32 * 30_670_848 + 2 * 2 * 65_536 * 1536
    adapters = 32 * 16 * (4 * (1536 + 1536) + (1536 + 1536) + 2 * (1536 + 4096) + (4096 + 1536))
    assert planned["trained_parameters"] == adapters == 16_515_072
    assert planned["memory_by_part"]["weights"] == weights + 4 * adapters
    assert planned["memory_by_part"]["optimizer"] == 8 * adapters
    assert planned["memory_bytes_per_gpu"] < 6e9
    assert hrmcore(*given) == 0
    out = capsys.readouterr().out
    assert "parameters     1,182,793,728, of adapters 16,515,072: they alone are trained" in out
    assert "memory each    4." in out
    assert hrmcore(*given[:3], "--base", "int8", "--tokens", "1e6") == 2
    assert (
        capsys.readouterr().err
        == "hrmcore plan: --base goes with --lora: it says what the frozen weights are held as\n"
    )
    assert hrmcore("plan", "--size", "XL", "--tokens", "1e6", "--lora", "0") == 2
    assert capsys.readouterr().err == "hrmcore plan: lora: rank must be at least 1, got 0\n"
