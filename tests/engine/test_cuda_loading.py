"""Loading a checkpoint on CUDA: what the device holds at once, counted, and the bits of what comes to lie there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.emulator import emulated_cuda
from support.live_bytes import DEVICE, LiveBytes

from hrmcore.checkpoint.hrm_text import key_table, map_model, save_model
from hrmcore.config import HRMConfig
from hrmcore.engine import cuda_decode, cuda_runner
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.mma_layout import MMA_DTYPES, in_fragments
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = HRMConfig(400, 64, 96, 2, 2, 32, H_cycles=2, L_cycles=2, max_position_embeddings=64)
# Of a weight that is packed: its bfloat16, four numbers in float32 (for int4 the weight, its whole number, a miss and a
# product of these), and of every 32 weights some numbers more.
BYTES_OF_PACKING = 20


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    save_model(HRM(CONFIG), tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr(cuda_runner, "require_cuda", lambda: None)
    return tmp_path / "model"


def test_no_more_than_a_matrix_is_on_the_device_beside_the_packed_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_decode, "PACKED_AT_ONCE", 1 << 12)
    with LiveBytes() as live:
        runner = CudaRunner.from_checkpoint(checkpoint, "int8", "meta", None)
        loaded = live.peak
    kept, largest = live.now, 2 * CONFIG.intermediate_size * CONFIG.hidden_size
    assert loaded <= kept + 2 * 2 * largest + BYTES_OF_PACKING * (1 << 12)  # a matrix, and its rows in pairs
    matrices = sum(torch.Size(key.shape).numel() for key in key_table(CONFIG) if len(key.shape) == 2)
    assert loaded - len(runner._decode_step.weights) < 2 * matrices  # all of them in bfloat16 would be more


def test_bfloat16_is_on_the_device_twice_and_float32_never(checkpoint: Path) -> None:
    with LiveBytes() as live:
        runner = CudaRunner.from_checkpoint(checkpoint, "auto", "meta", None)
    model = 2 * sum(p.numel() for p in runner._model.parameters())
    assert live.peak < len(runner._decode_step.weights) + 2 * model


@pytest.mark.parametrize("dtype", MMA_DTYPES)
def test_what_packing_a_weight_takes(dtype: str) -> None:
    part = torch.empty(256, 1536, dtype=torch.bfloat16, device=DEVICE)
    with LiveBytes() as live:
        in_fragments(part, dtype)
    assert live.peak <= (BYTES_OF_PACKING - 2) * part.numel()


@pytest.mark.slow
def test_the_1b_shape_takes_little_more_than_what_stays() -> None:
    """All its tensors, none of which is ever filled: 0.2 GB of embedding, a byte and a sixteenth for each weight."""
    config = HRMConfig.preset("XL")
    with torch.device("meta"):
        model = HRM(config)
    weights = {name: torch.empty(x.shape, dtype=torch.bfloat16) for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.reset_positions(config.max_position_embeddings)
    with LiveBytes() as live:
        runner = CudaRunner(model.requires_grad_(False), "int8", device=DEVICE)
    matrices = sum(torch.Size(key.shape).numel() for key in key_table(config) if len(key.shape) == 2)
    matrices -= config.vocab_size * config.hidden_size  # the embedding
    assert len(runner._decode_step.weights) == matrices * 17 // 16
    assert live.peak < live.now + BYTES_OF_PACKING * cuda_decode.PACKED_AT_ONCE < 1.6e9


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", MMA_DTYPES)
def test_what_lies_there_has_the_bits_of_a_model_that_was_there(dtype: str, checkpoint: Path) -> None:
    """A part at a time or all at once, from the file or from memory: the weights, and the logits of a prompt."""
    mapped = map_model(checkpoint)
    assert mapped.lm_head.weight.dtype == torch.bfloat16
    with emulated_cuda():
        ours = CudaRunner.from_checkpoint(checkpoint, dtype, "cpu", None)
        theirs = CudaRunner(HRM.from_pretrained(checkpoint).requires_grad_(False), dtype)
        assert torch.equal(ours._decode_step.weights, theirs._decode_step.weights)
        _, logits = ours.open([[1, 2, 3]], [3])
        _, expected = theirs.open([[1, 2, 3]], [3])
    assert (logits == expected).all()


def test_parts_of_a_matrix_have_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = HRM(CONFIG.replace(vocab_size=90)).requires_grad_(False)  # whose last tile is not full
    for dtype in MMA_DTYPES:
        whole = cuda_decode.pack(model, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_decode, "PACKED_AT_ONCE", 1)
            assert torch.equal(cuda_decode.pack(model, dtype), whole)


def test_a_window_is_the_loaded_model_s_own(checkpoint: Path) -> None:
    assert map_model(checkpoint, attention_window=64).config.attention_window == 64
    with pytest.raises(ValueError, match="attention_window"):
        map_model(checkpoint, attention_window=-1)


def test_a_mapped_model_that_is_not_finite_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = map_model(checkpoint)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    save_model(model, tmp_path / "broken", torch.bfloat16)
    with pytest.raises(ValueError, match=r"'lm_head.weight' has a value that is NaN or infinite"):
        map_model(tmp_path / "broken")
