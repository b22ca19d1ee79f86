"""The engine on CUDA: prefill layer by layer, decoding and sampling in kernels, one KV cache for both.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hrmcore.checkpoint.hrm_text import CONFIG_FILE, map_model
from hrmcore.engine.cuda_cache import KV_DTYPES
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.decode_ahead import DecodeAhead
from hrmcore.engine.mma_layout import MMA_DTYPES
from hrmcore.engine.packed_model import packed_model
from hrmcore.engine.prefill_buckets import BucketedPrefill
from hrmcore.engine.runner import Rows
from hrmcore.engine.sampling import Sampler
from hrmcore.engine.torch_runner import TorchRunner, _Sequence, one_at_a_time, upload
from hrmcore.graphs import CudaGraphs, Graphs
from hrmcore.model import HRM
from hrmcore.ops.backend import require_cuda


class CudaRunner(TorchRunner):
    """Sequences over a model in bfloat16 on a CUDA device; the weights of its matrices are `dtype`.

    In int8 and int4 nothing of the matrices stays but what the decode step takes: prefills multiply with that. In
    bfloat16 both have a copy. `device` is where it computes, by default where the model lies: from main memory the
    matrices of an int8 or int4 runner come there one at a time. `form` and `blocks` are those of CudaStep, `graphs`
    what prefills are captured by; None is torch's, on a CUDA device alone. `kv_dtype`, of the cached keys and values,
    is bfloat16 or int8.
    """

    def __init__(
        self,
        model: HRM,
        dtype: str = "bfloat16",
        form: Form = "persistent",
        blocks: int = 0,
        graphs: Graphs | None = None,
        device: torch.device | None = None,
        kv_dtype: str = "bfloat16",
    ) -> None:
        model = model.to(torch.bfloat16)
        if device is not None:
            _bring(model, device, matrices=dtype == "bfloat16")
        model.reset_positions(len(model.rope_table))  # angles stay float32
        super().__init__(model, torch.uint8 if kv_dtype == "int8" else torch.bfloat16)
        self.dtype = dtype
        self._decode_step = CudaStep(model, form, blocks, dtype, kv_dtype)
        if dtype != "bfloat16":
            self._model = packed_model(model, self._decode_step.weights, dtype)
        self._ahead = DecodeAhead(self, self.config.vocab_size, self._device)
        if graphs is None and self._device.type == "cuda":
            graphs = CudaGraphs(self._device)
        self._prefill = None if graphs is None else BucketedPrefill(self._model, graphs)

    @classmethod
    def from_checkpoint(
        cls, folder: Path, dtype: str, device: str, attention_window: int | None, kv_dtype: str | None = None
    ) -> CudaRunner:
        """Load a checkpoint; dtype auto is bfloat16, and so is a kv_dtype of None.

        Raises ValueError on another dtype or kv_dtype, on a packed checkpoint, and where there is no CUDA: it says what
        is missing.
        """
        if kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype must be {' or '.join(KV_DTYPES)} on {device}, got {kv_dtype!r}")
        try:
            require_cuda()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        if dtype not in ("auto", *MMA_DTYPES):
            raise ValueError(f"dtype must be auto, {', '.join(MMA_DTYPES)} on {device}, got {dtype!r}")
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder}: a packed checkpoint is for the CPU; give the one that it was made from")
        model = map_model(folder, attention_window).requires_grad_(False)
        weights = "bfloat16" if dtype == "auto" else dtype
        return cls(model, weights, device=torch.device(device), kv_dtype=kv_dtype or "bfloat16")

    @one_at_a_time
    @torch.inference_mode()
    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Append one token to each of these sequences; returns the logits (S, V) float32 that follow."""
        self._ahead.forget(handles)
        self.reserve(handles, 1)
        lengths = [self.length_of(handle) for handle in handles]
        ids, positions = (upload(list(numbers), self._device) for numbers in (tokens, lengths))
        logits = self.decode(ids, positions, self.page_tables(handles))
        self._lengthen(handles)
        return logits.cpu().numpy()

    @one_at_a_time
    @torch.inference_mode()
    def draw(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler], left: Sequence[int]
    ) -> list[int]:
        """Append one token to each of these sequences; the token that each sampler draws next, on the device.

        Where `left` says that more may be asked for, the step after this one is under way when this one's tokens come.
        """
        drawn = self._ahead.draw(handles, tokens, samplers, left)
        self._lengthen(handles)
        return drawn

    @one_at_a_time
    def close(self, handle: int) -> None:
        self._ahead.close(handle)
        super().close(handle)

    @property
    def steps_ahead(self) -> int:
        """For how many sequences a step is under way that nobody has asked for yet."""
        return self._ahead.steps_ahead

    def length_of(self, handle: int) -> int:
        """How many tokens a sequence holds."""
        return self._sequences[handle].length

    def pages_of(self, handles: Sequence[int]) -> tuple[int, ...]:
        """How many pages each of these sequences has."""
        return tuple(len(self._sequences[handle].pages) for handle in handles)

    def decode(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Run tokens (S) int32 at positions (S) int32, as many at a time as the device takes, up to 32.

        Returns the logits (S, V) float32 that follow, on the device.
        """
        most = self._decode_step.most_requests(tables.shape[1])
        groups = [slice(first, first + most) for first in range(0, len(tokens), most)]
        logits = [self._decode_step(tokens[one], positions[one], tables[one], self.kv) for one in groups]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _advance(self, sequences: Sequence[_Sequence], added: Sequence[Sequence[int]]) -> Rows:
        """A prefill that fits a bucket runs in its shapes."""
        prefill = self._prefill
        if prefill is None or any(sequence.length for sequence in sequences) or not prefill.takes(added):
            return super()._advance(sequences, added)
        for sequence, prompt in zip(sequences, added, strict=True):
            self._pool.reserve(sequence, len(prompt))
        with torch.inference_mode():
            rows = [sequence.rows(0, len(prompt)) for sequence, prompt in zip(sequences, added, strict=True)]
            prefixes = [sequence.prefix for sequence in sequences]
            logits = prefill.run(added, prefixes, rows, self.kv).cpu()
        for sequence, prompt in zip(sequences, added, strict=True):
            sequence.length = len(prompt)
        return logits.numpy()

    def _lengthen(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self._sequences[handle].length += 1


def _bring(model: HRM, device: torch.device, matrices: bool) -> None:
    """Move a model to a device; or all but the matrices of its stacks and its head."""
    if matrices:
        model.to(device)
        return
    model.embed_tokens.to(device)
    model.z_L_init = model.z_L_init.to(device)
