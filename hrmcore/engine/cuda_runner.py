"""The engine on CUDA: prefill in torch, decoding in the fused decode step, one KV cache for both.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hrmcore.checkpoint.hrm_text import CONFIG_FILE
from hrmcore.engine.cuda_decode import CudaStep, Form
from hrmcore.engine.mma_layout import MMA_DTYPES
from hrmcore.engine.runner import Rows
from hrmcore.engine.torch_runner import TorchRunner, one_at_a_time
from hrmcore.model import HRM
from hrmcore.ops.backend import require_cuda


class CudaRunner(TorchRunner):
    """Sequences over a model in bfloat16 on a CUDA device; the decode step's weights are `dtype`.

    Prefill multiplies with the bfloat16 weights, whatever the dtype: int8 and int4 save time, but no memory. `form` and
    `blocks` are those of CudaStep.
    """

    def __init__(self, model: HRM, dtype: str = "bfloat16", form: Form = "persistent", blocks: int = 0) -> None:
        model = model.to(torch.bfloat16)
        model.reset_positions(len(model.rope_table))  # angles stay float32
        super().__init__(model)
        self.dtype = dtype
        self._decode_step = CudaStep(model, form, blocks, dtype)

    @classmethod
    def from_checkpoint(cls, folder: Path, dtype: str, device: str, attention_window: int | None) -> CudaRunner:
        """Load a checkpoint; dtype auto is bfloat16.

        Raises ValueError on another dtype, on a packed checkpoint, and where there is no CUDA: it says what is missing.
        """
        try:
            require_cuda()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        if dtype not in ("auto", *MMA_DTYPES):
            raise ValueError(f"dtype must be auto, {', '.join(MMA_DTYPES)} on {device}, got {dtype!r}")
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder}: a packed checkpoint is for the CPU; give the one that it was made from")
        model = HRM.from_pretrained(folder).requires_grad_(False)
        if attention_window is not None:
            windowed = HRM(model.config.replace(attention_window=attention_window))
            windowed.load_state_dict(model.state_dict())
            model = windowed.requires_grad_(False)
        return cls(model.to(device), "bfloat16" if dtype == "auto" else dtype)

    @one_at_a_time
    @torch.inference_mode()
    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Append one token to each of these sequences, 32 at a time or as many as the device takes.

        Returns the logits (S, V) float32 that follow.
        """
        self.reserve(handles, 1)
        sequences = [self._sequences[handle] for handle in handles]
        logits = []
        most = self._decode_step.most_requests(max(len(sequence.pages) for sequence in sequences))
        for first in range(0, len(handles), most):
            group = slice(first, first + most)
            lengths = [sequence.length for sequence in sequences[group]]
            ids, positions = (
                torch.tensor(numbers, dtype=torch.int32, device=self._device) for numbers in (tokens[group], lengths)
            )
            logits.append(self._decode_step(ids, positions, self.page_tables(handles[group]), self.kv))
        for sequence in sequences:
            sequence.length += 1
        return torch.cat(logits).cpu().numpy()
