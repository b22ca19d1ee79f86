"""The fused decode step, run by the emulator of CUDA: against the CPU engine, between its forms, and by count.

Shapes: B requests, V vocabulary, R rows and K columns of a matrix.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator import bits_in_any_company, counters, device_with, emulated_cuda, seeded
from support.engines import distance
from support.traffic import matrix_bytes, traffic
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.engine import load
from hrmcore.engine.mma_layout import in_fragments, paired, quantised
from hrmcore.engine.runner import PAGE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

FORMS: tuple[Form, ...] = ("persistent", "graph")
TOLERANCE = 2e-2  # in norm: activations meet the tensor cores as bfloat16; measured 2e-3 to 3e-3

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

SHAPES: dict[str, dict[str, Any]] = {
    "two layers, three heads": {},
    "one head of 64, widths that fill no item of a warp": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "head_dim": 64,
        "num_layers_per_stack": 1,
    },
    "xPos": {"position_encoding": "xpos", "num_layers_per_stack": 1},
    "a window": {"attention_window": 64, "num_layers_per_stack": 1},
    "stacks of two depths": {"H_layers": 1},
    "one stack": {"shared_stacks": True, "num_layers_per_stack": 1},
}


def config(**changes: Any) -> HRMConfig:
    values: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers_per_stack": 2,
        "num_attention_heads": 3,
        "head_dim": 16,
        "H_cycles": 2,
        "L_cycles": 2,
        "max_position_embeddings": 512,
    }
    return HRMConfig(**values | changes)


def random_model(**changes: Any) -> HRM:
    """A model whose weights are numbers of bfloat16, held in float32."""
    torch.manual_seed(0)
    model = HRM(config(**changes)).requires_grad_(False).eval()
    for tensor in (*model.parameters(), model.z_L_init):
        tensor.copy_(tensor.bfloat16())
    return model


class Requests:
    """Prompts in a cache of bfloat16, filled by the model in torch, with room for more; and the CPU engine beside."""

    def __init__(self, model: HRM, lengths: list[int], folder: Path, dtype: str = "bfloat16") -> None:
        torch.manual_seed(1)
        self.prompts = [torch.randint(0, model.config.vocab_size, (n,)).tolist() for n in lengths]
        prefixes = [n // 2 for n in lengths]
        prefill = TorchRunner(model)
        handles, _ = prefill.open(self.prompts, prefixes)
        prefill.reserve(handles, 6 * PAGE)
        self.tables = prefill.page_tables(handles)
        self.kv = prefill.kv.bfloat16()
        model.save_pretrained(folder, allow_xpos=True)
        self.engine = CpuRunner.from_checkpoint(folder, dtype, "bfloat16", 1, 0)
        self.handles, self.logits = self.engine.open(self.prompts, prefixes)
        self.positions = torch.tensor(lengths, dtype=torch.int32)

    def advance(self, step: CudaStep, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """A token for each request: the step's logits, and the engine's."""
        with emulated_cuda():
            ours = step(torch.tensor(tokens, dtype=torch.int32), self.positions, self.tables, self.kv)
        self.positions = self.positions + 1
        return ours, torch.from_numpy(self.engine.step(self.handles, tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_equals_the_cpu_engine(shape: str, tmp_path: Path) -> None:
    model = random_model(**SHAPES[shape])
    requests = Requests(model, [63, 200, 1], tmp_path)
    step = CudaStep(model, form="graph", blocks=3)
    for tokens in ([3, 1, 4], [1, 5, 9]):  # the first request crosses into its second page of the cache
        ours, theirs = requests.advance(step, tokens)
        assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_those_of_the_cpu_engine(dtype: str, tmp_path: Path) -> None:
    """The same numbers to the bit, and a step with them is one with the model that has them, in float32."""
    model = random_model(num_layers_per_stack=1)
    model.save_pretrained(tmp_path / "model")
    packed = CpuRunner.from_checkpoint(tmp_path / "model", dtype, None, 1, 0)
    rounded = random_model(num_layers_per_stack=1)
    for name, tensor in rounded.named_parameters():
        packed.core.get_weight(name, tensor)
        if "embed" not in name:
            padded = torch.nn.functional.pad(model.state_dict()[name], (0, -tensor.shape[1] % 32))
            whole, scales = quantised(padded, "int8" if name == "lm_head.weight" else dtype)
            ours = (whole.view(len(whole), -1, 32) * scales.float()[..., None]).view_as(padded)
            assert torch.equal(ours[:, : tensor.shape[1]], tensor), name
    requests = Requests(rounded, [70, 2], tmp_path / "rounded", "float32")
    ours, theirs = requests.advance(CudaStep(model, blocks=3, dtype=dtype), [7, 8])
    assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_whole_stages_and_rings_of_any_depth_give_the_same_bits(dtype: str, tmp_path: Path) -> None:
    """Shares of a warp from part of a stage to several whole ones, rings of three depths, keys at full width.

    With 227 KiB activations stream, with less they lie in shared memory.
    """
    shape = {"hidden_size": 128, "intermediate_size": 2320, "num_attention_heads": 2, "head_dim": 128}
    shape |= {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1}
    model, rounded = random_model(**shape), random_model(**shape)
    if dtype != "bfloat16":  # in float32 on the CPU, whose engine would round activations to int8, too
        model.save_pretrained(tmp_path / "model")
        packed = CpuRunner.from_checkpoint(tmp_path / "model", dtype, None, 1, 0)
        for name, tensor in rounded.named_parameters():
            packed.core.get_weight(name, tensor)
    requests = Requests(rounded, [130, 5], tmp_path / "rounded", "float32")
    tokens = torch.tensor([7, 8], dtype=torch.int32)
    results = []
    for shared_kib in (99, 180, 227):
        for form in FORMS if shared_kib == 227 else FORMS[:1]:
            with device_with(shared_kib), emulated_cuda():
                step = CudaStep(model, form, 5, dtype)
                results.append(step(tokens, requests.positions, requests.tables, requests.kv.clone()))
    assert all(torch.equal(result, results[0]) for result in results)
    _, theirs = requests.advance(CudaStep(model, blocks=5, dtype=dtype), tokens.tolist())
    assert distance(results[0], theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "changes", "shared_kib"),
    [("bfloat16", {}, 99), ("int8", {"num_attention_heads": 1, "head_dim": 128}, 227)],
)
def test_the_bits_are_the_same_in_both_forms_and_for_every_schedule_grid_and_batch(
    dtype: str, changes: dict[str, Any], shared_kib: int, tmp_path: Path
) -> None:
    """With the kernel for any shape, and with those for head_dim 128, of up to 8 requests and of a single one. Splits
    lie apart in some of these grids.
    """
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=2, **changes)
    requests = Requests(model, [300, 64, 127, 1, 63, 20, 128, 5], tmp_path)
    tokens = torch.arange(8, dtype=torch.int32)

    def run(form: Form, blocks: int, chosen: slice = slice(None)) -> tuple[Tensor, Tensor]:
        kv = requests.kv.clone()
        step = CudaStep(model, form, blocks, dtype)
        with device_with(shared_kib), emulated_cuda():
            return step(tokens[chosen], requests.positions[chosen], requests.tables[chosen], kv), kv

    logits, kv = run("graph", 1)
    for seed in range(5):
        with seeded(seed):
            for again in (run("persistent", 2 + seed), run("graph", 6 - seed)):
                assert torch.equal(again[0], logits)
                assert torch.equal(again[1].view(torch.int16), kv.view(torch.int16))  # rows not yet written are noise
    assert torch.equal(run("persistent", 3, slice(2, 3))[0], logits[2:3])
    if dtype == "bfloat16":  # int8's weights are not the engine's here: the test above has those
        _, theirs = requests.advance(CudaStep(model, "persistent", 2), tokens.tolist())
        assert distance(logits, theirs) < TOLERANCE


# Matrices of o and down whose columns have no room at once beside 9 and more requests: a warp joins splits in parts,
# and what streams by does so again for each tile.
PARTS = {"hidden_size": 48, "intermediate_size": 1040, "num_attention_heads": 6, "head_dim": 128}
PARTS_OF_DOWN = {"hidden_size": 48, "intermediate_size": 1616, "num_attention_heads": 1, "head_dim": 128}
LENGTHS = [130, 64, 2, 1, 63, 20, 9, 5]


@pytest.mark.parametrize(
    ("dtype", "changes", "shared_kib"),
    [
        pytest.param("bfloat16", PARTS, 227, marks=pytest.mark.slow),
        pytest.param("int8", PARTS_OF_DOWN, 227, marks=pytest.mark.slow),
        pytest.param("int4", PARTS_OF_DOWN, 227, marks=pytest.mark.slow),
        ("bfloat16", {}, 163),
        ("int8", {"position_encoding": "xpos"}, 227),
        ("int4", {"num_attention_heads": 1, "head_dim": 64}, 227),
    ],
)
def test_up_to_32_requests_at_once_have_the_bits_of_fewer(
    dtype: str, changes: dict[str, Any], shared_kib: int, tmp_path: Path
) -> None:
    """Kernels for up to 16 and up to 32 requests, the first one's last group ragged, beside the one for up to 8."""
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1, **changes)
    requests = Requests(model, [n + i for i in range(4) for n in LENGTHS], tmp_path)
    tokens = torch.arange(32, dtype=torch.int32)

    def run(form: Form, blocks: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        kv, step, chosen = requests.kv.clone(), CudaStep(model, form, blocks, dtype), slice(first, last)
        with device_with(shared_kib), emulated_cuda():
            assert step.most_requests(requests.tables.shape[1]) == 32
            return step(tokens[chosen], requests.positions[chosen], requests.tables[chosen], kv), kv

    alone = bits_in_any_company(run)
    if dtype == "bfloat16":
        theirs = torch.from_numpy(requests.engine.step(requests.handles, tokens.tolist()))
        assert distance(alone, theirs) < TOLERANCE


def test_the_device_says_how_many_requests_it_takes_at_once(tmp_path: Path) -> None:
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1, **PARTS)
    requests = Requests(model, [5] * 32, tmp_path)
    step = CudaStep(model, "persistent", 3)

    def run(batch: int) -> Tensor:
        tokens = torch.arange(batch, dtype=torch.int32)
        return step(tokens, requests.positions[:batch], requests.tables[:batch], requests.kv)

    with emulated_cuda():
        with device_with(99):
            most = step.most_requests(requests.tables.shape[1])
            assert 0 < most < 32
            assert run(most).isfinite().all()
            with pytest.raises(RuntimeError, match="fewer requests at once would"):
                run(most + 1)
        with device_with(60), pytest.raises(RuntimeError, match="tokens in a request's cache does not fit in"):
            CudaStep(model, "persistent", 3).most_requests(requests.tables.shape[1])


def test_the_graph_form_is_captured_once_a_shape_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that keeps its launches' operands and runs them again: the bits of launches without one."""
    model = random_model(num_layers_per_stack=1, H_cycles=1, L_cycles=1)
    requests = Requests(model, [62, 5], tmp_path)
    launch, graphs = CudaStep._launch, []
    in_use: list[torch.device] = []

    @contextlib.contextmanager
    def using(device: torch.device) -> Iterator[None]:
        in_use.append(device)
        yield
        in_use.pop()

    class Graph:
        def __init__(self) -> None:
            graphs.append(self)

        def replay(self) -> None:
            launch(*self.operands)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        assert in_use == [requests.tables.device]  # on another, torch would record another's streams
        with monkeypatch.context() as patch:
            patch.setattr(CudaStep, "_launch", lambda *operands: setattr(graph, "operands", operands))
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", using)
    plain, captured, kv = CudaStep(model, "graph", 2), CudaStep(model, "graph", 2), requests.kv.clone()
    with emulated_cuda():
        for turn in range(3):  # the first request crosses into its second page of the cache
            tokens, positions = torch.tensor([turn, 7 - turn], dtype=torch.int32), requests.positions + turn
            tables = requests.tables[:, : 2 + turn].contiguous()
            expected = plain(tokens, positions, tables, requests.kv)
            assert torch.equal(captured._replayed(tokens, positions, tables, kv), expected)
            assert torch.equal(kv.view(torch.int16), requests.kv.view(torch.int16))
        assert len(graphs) == 2  # tables of 2, and of up to 4 pages
        captured._replayed(tokens[:1], positions[:1], tables[:1].contiguous(), kv)
        captured._replayed(tokens, positions, tables, kv.clone())
    assert len(graphs) == 4


def test_a_token_is_one_launch_and_five_barriers_a_layer(tmp_path: Path) -> None:
    model = random_model()
    requests = Requests(model, [5], tmp_path)
    visited = model.config.cache_slots
    counters()
    requests.advance(CudaStep(model, "persistent", 2), [1])
    counted = counters()
    assert (counted["launches"], counted["grid_barriers"]) == (1, 5 * visited)
    requests.advance(CudaStep(model, "graph", 2), [1])
    assert (counters()["launches"]) == 5 * visited + 1
    assert 5 * HRMConfig.preset("XL").cache_slots <= 642


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("bfloat16", {"attention_window": 128}), ("int8", {"position_encoding": "xpos"}), ("int4", {})],
)
def test_the_bytes_read_are_those_of_the_plan(dtype: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """All that the thread blocks read, and what of it no other block has read before in its phase."""
    model = random_model(num_layers_per_stack=2, H_cycles=1, L_cycles=1, **changes)
    requests = Requests(model, [400, 5], tmp_path)
    counters()
    requests.advance(CudaStep(model, blocks=7, dtype=dtype), [1, 2])
    counted, planned = counters(), traffic(model.config, [400, 5], 7, dtype, requests.tables.shape[1])
    assert counted["bytes_read"] == planned.total
    assert counted["bytes_read_first"] == planned.from_memory


def test_one_request_of_the_1b_model_reads_little_but_weights() -> None:
    config = HRMConfig.preset("XL")
    for position in (100, 511, 768, 1023, 4000):
        read = traffic(config, [position], blocks=132)
        assert read.weights == 2 * (
            config.cache_slots * (4 + 1) * 1536**2 + config.cache_slots * 3 * 1536 * 4096 + 65536 * 1536
        )
        assert read.cache == config.cache_slots * 4 * config.attention_width * (position + 1)
        assert read.total <= 1.15 * read.floor  # of the caches on the chip; test below: of memory


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("requests", [1, 8])
def test_the_1b_model_takes_little_but_weights_and_cache_from_memory(dtype: str, requests: int) -> None:
    for position in (0, 100, 1023, 4000):
        read = traffic(HRMConfig.preset("XL"), range(position, position + requests), blocks=132, dtype=dtype)
        assert read.floor < read.from_memory <= 1.02 * read.floor


def test_fragments_meet_their_activations() -> None:
    """Every weight of an item meets the activation of its column, by the PTX ISA's tables for mma.m16n8k16."""
    weight = torch.arange(256, dtype=torch.bfloat16).view(16, 16)
    registers = in_fragments(weight, "bfloat16").view(torch.bfloat16).view(32, 4, 2)  # lane, register, half
    seen = torch.zeros(16, 16)
    for lane in range(32):
        g, h = divmod(lane, 4)
        for register in range(4):
            for half in range(2):
                row, inner = g + 8 * (register % 2), 2 * h + half + 8 * (register // 2)
                # Row `inner` of B is in lane inner % 8 // 2 of each four, register inner // 8; those hold 4 neighbours.
                column = 4 * (inner % 8 // 2) + 2 * (inner // 8) + inner % 2
                assert registers[lane, register, half] == weight[row, column]
                seen[row, column] += 1
    assert torch.equal(seen, torch.ones(16, 16))


def test_fragments_of_ragged_matrices_are_padded_with_zeros() -> None:
    weight = torch.arange(1, 20 * 24 + 1).view(20, 24).remainder(251).add(1).bfloat16()
    fragments = in_fragments(weight, "bfloat16")
    assert fragments.shape[:2] == (2, 2)
    assert fragments.nbytes == matrix_bytes(20, 24, "bfloat16")
    assert fragments.view(torch.bfloat16).count_nonzero() == weight.numel()
    for tile, item in ((0, 0), (0, 1), (1, 0), (1, 1)):
        block = weight[16 * tile : 16 * tile + 16, 16 * item : 16 * item + 16]
        assert torch.equal(fragments[tile : tile + 1, item : item + 1], in_fragments(block, "bfloat16"))


def test_paired_rows_share_a_tile() -> None:
    """Two heads of 32: the tile of channels 8 to 15 of the second ends with their partners, 16 further on."""
    rows = paired(torch.arange(64)[:, None], 2)[:, 0].view(4, 16).tolist()
    assert rows[3] == [*range(40, 48), *range(56, 64)]
    assert sorted(row for tile in rows for row in tile) == list(range(64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24, "hidden_size": 48}, "head_dim that is one of 16, 32, 64, 128, got 24"),
        ({"hidden_size": 24}, "hidden_size that is a multiple of 16, got 24"),
        ({"intermediate_size": 40}, "intermediate_size that is a multiple of 16, got 40"),
    ],
)
def test_a_model_that_the_kernels_do_not_take_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CudaStep(random_model(**changes))


def test_wrong_operands_are_refused(tmp_path: Path) -> None:
    requests = Requests(random_model(num_layers_per_stack=1), [5], tmp_path)
    step, ids = CudaStep(random_model(num_layers_per_stack=1)), torch.zeros(1, dtype=torch.int32)
    good = {"tokens": ids, "positions": ids, "tables": requests.tables, "kv": requests.kv}
    for name, wrong, message in (
        ("tokens", ids.long(), "tokens must be"),
        ("tokens", ids.repeat(33), "the number of tokens must be from 1 to 32, got 33"),
        ("positions", ids.repeat(2), "positions must"),
        ("kv", requests.kv.float(), "kv must"),
        ("kv", requests.kv[1:], "kv must"),
        ("tables", requests.tables[0], "tables must"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**good | {name: wrong})
    with pytest.raises(ValueError, match="tokens must be on a CUDA device, got a tensor on the CPU"):
        step(**good)


def test_the_engine_on_cuda_prefills_in_torch_and_decodes_in_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sequences, at once and as many at once as the device is said to take; then one of them alone."""
    model = random_model(num_layers_per_stack=1)
    model.save_pretrained(tmp_path)
    prompts, prefixes = [list(range(1, 3 + i)) for i in range(10)], [1 + i for i in range(10)]
    cpu = CpuRunner.from_checkpoint(tmp_path, "bfloat16", None, 1, 0)
    cpu_handles, _ = cpu.open(prompts, prefixes)
    theirs = torch.from_numpy(cpu.step(cpu_handles, range(10)))
    runner = CudaRunner(model, blocks=3)
    handles, _ = runner.open(prompts, prefixes)
    in_groups = CudaRunner(model, blocks=3)
    same_handles, _ = in_groups.open(prompts, prefixes)
    counters()
    with emulated_cuda():
        ours = torch.from_numpy(runner.step(handles, range(10)))
        assert distance(ours, theirs) < TOLERANCE
        assert counters()["launches"] == 1
        monkeypatch.setattr(in_groups._decode_step, "most_requests", lambda pages: 4)
        again = in_groups.step(same_handles, range(10))
        assert torch.equal(torch.from_numpy(again), ours)
        assert counters()["launches"] == 3
        one = torch.from_numpy(runner.step(handles[9:], [4]))
    assert distance(one, torch.from_numpy(cpu.step(cpu_handles[9:], [4]))) < TOLERANCE
    assert runner.dtype == "bfloat16"
    for handle in handles:
        runner.close(handle)
    assert runner.open_sequences == 0


def test_loading_for_cuda_without_a_device_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda': torch .*; use device 'cpu'"):
        load(checkpoint, device="cuda:1")


@pytest.mark.slow
def test_the_embedded_model_answers_as_on_the_cpu() -> None:
    """Greedy: 10 tokens; `python -m bench.gpu.decode_step --tokens 64` runs the 64 (result: docs/results/cuda.md)."""
    found = importlib.import_module("bench.gpu.decode_step").compare(tokens=10, blocks=2)
    assert found["tokens"] == 10
    assert found["error"] < TOLERANCE
    assert found["decided"] >= 4
    assert found["same_where_decided"] == found["decided"]
