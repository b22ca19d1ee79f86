"""Prefills of a model that has nothing but its packed weights, by the emulator of CUDA.

Shapes: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from support.emulator import counters, emulated_cuda
from support.engines import distance
from support.graphs import Replayed
from torch import Tensor

from bench.gpu.decode_step import ALLOWED, QUESTION, Agreement
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.cuda_decode import pack
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.engine import EMBEDDED_MODEL
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

TOLERANCE = 2e-2  # in norm, of logits in bfloat16: as the decode step's
DTYPES = ("int8", "int4")
CONFIG = HRMConfig(50, 48, 80, 1, 3, 16, H_cycles=1, L_cycles=1, max_position_embeddings=512)
SHAPES: dict[str, dict[str, Any]] = {
    "stacks of two depths, twice": {"num_layers_per_stack": 2, "H_layers": 1, "H_cycles": 2},
    "one stack, xPos": {"shared_stacks": True, "position_encoding": "xpos"},
    "a window": {"attention_window": 64},
}


def model_of(**changes: Any) -> HRM:
    """Weights are numbers of bfloat16, held in float32."""
    torch.manual_seed(0)
    model = HRM(CONFIG.replace(**changes)).requires_grad_(False).eval()
    for tensor in (*model.parameters(), model.z_L_init):
        tensor.copy_(tensor.bfloat16())
    return model


def as_packed(model: HRM, dtype: str, folder: Path) -> HRM:
    """The model, in float32, with the numbers that the CPU engine's packed weights hold."""
    model.save_pretrained(folder, allow_xpos=True)
    packed = CpuRunner.from_checkpoint(folder, dtype, None, 1, 0)
    rounded = HRM(model.config).requires_grad_(False).eval()
    rounded.load_state_dict(model.state_dict())
    for name, tensor in rounded.named_parameters():
        packed.core.get_weight(name, tensor)
    return rounded


def prompts_of(lengths: list[int]) -> list[list[int]]:
    torch.manual_seed(sum(lengths))
    return [torch.randint(0, 50, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefills_and_steps_are_those_of_the_cpu_engines_weights(shape: str, dtype: str, tmp_path: Path) -> None:
    """Run in buckets, warm, captured and replayed, and as they are; then a step; and logits of every token."""
    model = model_of(**SHAPES[shape])
    plain = TorchRunner(as_packed(model, dtype, tmp_path))  # before the runners make the model bfloat16
    in_buckets, as_it_is = (CudaRunner(model, dtype, blocks=3, graphs=graphs) for graphs in (Replayed(), None))
    for lengths in ([20, 3], [9, 12], [30, 2]):
        prompts, prefixes = prompts_of(lengths), [length // 2 for length in lengths]
        theirs, expected = plain.open(prompts, prefixes)
        with emulated_cuda():
            ours, found = in_buckets.open(prompts, prefixes)
        assert distance(found, expected) < TOLERANCE
    with emulated_cuda():
        others, found = as_it_is.open(prompts, prefixes)
        stepped = [runner.step(handles, [7, 8]) for runner, handles in ((in_buckets, ours), (as_it_is, others))]
        every_token, every_layer = in_buckets.logits(prompts[0], 9), in_buckets.layers(prompts[0], 9)
    assert distance(found, expected) < TOLERANCE
    expected = plain.step(theirs, [7, 8])
    assert all(distance(logits, expected) < TOLERANCE for logits in stepped)
    assert distance(every_token, plain.logits(prompts[0], 9)) < TOLERANCE
    assert distance(every_layer, plain.layers(prompts[0], 9)) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_prompt_do_not_depend_on_its_bucket_or_its_neighbours(dtype: str) -> None:
    """Its logits, and its keys and values."""
    runner = CudaRunner(model_of(), dtype, blocks=3, graphs=Replayed())
    (prompt, *others), found = prompts_of([21, 50, 130]), []
    for company in ([], others[:1], others, [others[1]]):
        with emulated_cuda():
            handles, logits = runner.open([*company, prompt], [len(p) for p in (*company, prompt)])
        rows = runner._sequences[handles[-1]].rows(0, len(prompt))
        found.append((torch.from_numpy(logits[-1]), runner.kv[:, :, rows]))
    for logits, kv in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(kv, found[0][1])


def tensors_of(holder: object) -> dict[int, int]:
    """The memory of every tensor that an object holds on to: its address and its bytes."""
    not_held = (ModuleType, type, FunctionType, BuiltinFunctionType)
    found, seen, left = {}, set(), [holder]
    while left:
        held = left.pop()
        if id(held) in seen or isinstance(held, not_held):
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            storage = held.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        left += gc.get_referents(held)
        left += list(getattr(held, "__dict__", {}).values())
    return found


def test_int8_and_int4_hold_their_packed_weights_and_the_embedding_alone() -> None:
    """Every tensor that a runner reaches; in bfloat16 the matrices are there twice."""
    changes = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 64, "num_layers_per_stack": 2}
    held, weights = {}, {}
    for dtype in ("bfloat16", *DTYPES):
        model = model_of(**changes)
        runner = CudaRunner(model, dtype, graphs=Replayed())
        weights[dtype] = len(pack(model, dtype))
        del model
        held[dtype] = sum(tensors_of(runner).values())
    matrices = weights[
        "bfloat16"
    ]  # as many bytes as in the model: 48 rows of the vocabulary's 50 and 2 of a tile aside
    assert weights["int8"] / matrices == pytest.approx(17 / 32, rel=1e-2)  # 8 bits, and 16 for each 32
    assert weights["int4"] / matrices == pytest.approx(9 / 32, rel=1e-2)
    for dtype in DTYPES:
        # gone: the model's copy, whose head has no rows to fill a tile up, and what is not packed of bfloat16's
        of_model = matrices - 2 * 14 * 192
        assert held["bfloat16"] - held[dtype] == of_model + matrices - weights[dtype]
    assert held["int8"] < 0.35 * held["bfloat16"]
    assert held["int4"] < 0.25 * held["bfloat16"]


def test_a_layer_is_eight_launches() -> None:
    """Four products, rotation with the cache, attention, two norms, of which the last closes the visit."""
    runner = CudaRunner(model_of(), "int8", graphs=Replayed())
    counters()
    with emulated_cuda():
        runner.open(prompts_of([30]), [30])
    # One norm opens the first visit, one table of attention's tiles is made, the head is a product.
    assert counters()["launches"] == 8 * CONFIG.cache_slots + 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedded_model_answers_as_on_the_cpu(dtype: str) -> None:
    """Its question's first tokens, each prefilled with all before it, beside the CPU engine in float32."""
    ids = Tokenizer.load(EMBEDDED_MODEL).prompt(QUESTION, "direct")
    packed = CpuRunner.from_checkpoint(EMBEDDED_MODEL, dtype, None, 1, 0)
    model = HRM.from_pretrained(EMBEDDED_MODEL).requires_grad_(False)
    rounded = HRM(model.config).requires_grad_(False).eval()
    rounded.load_state_dict(model.state_dict())
    for name, tensor in rounded.named_parameters():
        packed.core.get_weight(name, tensor)
    plain, ours = TorchRunner(rounded), CudaRunner(model, dtype, blocks=2, graphs=Replayed())
    agreement = Agreement()
    for _ in range(6):
        expected = torch.from_numpy(plain.open([ids], [len(ids)])[1][0])
        with emulated_cuda():
            found = torch.from_numpy(ours.open([ids], [len(ids)])[1][0])
        agreement.add(found, expected)
        ids = [*ids, int(expected.argmax())]
    assert agreement.error < ALLOWED
    assert agreement.decided >= 1
    assert agreement.same_where_decided == agreement.decided
