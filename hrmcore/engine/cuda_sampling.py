"""Sampling on CUDA: the next token of each request, drawn where its logits lie. Kernel: csrc/decode/sampling.{h,cu}.

Shapes: B requests of a step, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C
from hrmcore.engine.sampling import Sampler
from hrmcore.engine.torch_runner import upload
from hrmcore.ops.backend import stream_of

_FIRST_SLOTS = 64


class SamplerSlots:
    """What the kernel keeps of each sampler on the device: its options, how often it has drawn, the tokens seen.

    A sampler on the device is ahead of its `Sampler`, which counts a token only when it is accepted.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._tensors = {
            "options": torch.zeros(0, 4, dtype=torch.float64, device=device),
            "counts": torch.zeros(0, 3, dtype=torch.int64, device=device),
            "seen": torch.zeros(0, -(-vocabulary // 32), dtype=torch.int32, device=device),
        }

    def put(self, samplers: Mapping[int, Sampler]) -> None:
        """Bring these samplers, by slot, to where they stand on the host."""
        if not samplers:
            return
        self._grow(max(samplers) + 1)
        self._write("options", list(samplers), [_options(sampler) for sampler in samplers.values()])
        self._write("counts", list(samplers), [_counts(sampler) for sampler in samplers.values()])
        penalising = {slot: sampler for slot, sampler in samplers.items() if sampler.sampling.repetition_penalty != 1}
        if penalising:
            self._write("seen", list(penalising), [self._bitmap(sampler) for sampler in penalising.values()])

    def draw(self, logits: Tensor, fed: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """The token (B) int32 of each request that follows its row of logits (B, V) float32; positions (B) advance.

        `fed` (B) int32 are the tokens that led to the logits, `slots` (B) int32 the requests' own. A row whose largest
        logit is NaN or infinite gives -1 - its token.
        """
        drawn = torch.empty_like(fed)
        operands = {"logits": logits, "fed": fed, "slots": slots, "drawn": drawn, "positions": positions}
        capsules = {name: to_dlpack(tensor) for name, tensor in (operands | self._tensors).items()}
        _C.cuda_draw(**capsules, stream=stream_of(logits))
        return drawn

    def _grow(self, slots: int) -> None:
        for name, tensor in self._tensors.items():
            if slots > len(tensor):
                grown = tensor.new_zeros(max(slots, 2 * len(tensor), _FIRST_SLOTS), tensor.shape[1])
                grown[: len(tensor)] = tensor
                self._tensors[name] = grown

    def _write(self, name: str, slots: list[int], rows: list[np.ndarray]) -> None:
        target, host = self._tensors[name], torch.from_numpy(np.stack(rows))
        on_cuda = target.is_cuda
        if on_cuda:
            host = host.pin_memory()
        target.index_copy_(0, upload(slots, target.device).long(), host.to(target.device, non_blocking=on_cuda))

    def _bitmap(self, sampler: Sampler) -> np.ndarray:
        ids = np.array([token for token in sampler.core.seen if 0 <= token < self._vocabulary], np.int64)
        words = np.zeros(self._tensors["seen"].shape[1], np.uint32)
        np.bitwise_or.at(words, ids // 32, np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32)))
        return words.view(np.int32)


def _options(sampler: Sampler) -> np.ndarray:
    sampling = sampler.sampling
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return np.array([sampling.temperature, top_p, sampling.min_p or 0.0, sampling.repetition_penalty], np.float64)


def _counts(sampler: Sampler) -> np.ndarray:
    top_k = min(sampler.sampling.top_k or 0, (1 << 63) - 1)
    return np.array([top_k, sampler.seed, sampler.core.draws], np.uint64).view(np.int64)
