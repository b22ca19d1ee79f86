"""torch.optim.Muon in the trainer's shape: Muon for the stacks' matrices, hrmcore's AdamW for embedding and head.

Muon keeps no average of the weights, which the trainer validates: it is kept here, after each step, as the other
optimizers keep theirs. Rates are matched to AdamW's (adjust_lr_fn "match_rms_adamw"), so that one rate serves both
parts. The fused gate, q, k, v and gate, up matrices are orthogonalised whole. Source: torch.optim.Muon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hrmcore import optim
from hrmcore.config import HRMConfig
from hrmcore.model import HRM

ITERATIONS = 5  # of Newton and Schulz


class MuonBeside(torch.optim.Optimizer):
    """Muon for matrices of the stacks, AdamW for the rest, with an average of both."""

    def __init__(self, model: HRM, lr: float, momentum: float, weight_decay: float, ema: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"this torch, {torch.__version__}, has no Muon; 2.9 has it")
        named = dict(model.named_parameters())
        self._matrices = [p for name, p in named.items() if p.ndim == 2 and "_module." in name]
        chosen = {id(p) for p in self._matrices}
        self._others = [p for p in named.values() if id(p) not in chosen]
        super().__init__([{"params": [*self._matrices, *self._others], "lr": lr, "ema": ema}], {})
        options = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(self._matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **options)
        self._adamw = optim.AdamW(self._others, ema=ema, **options)
        for matrix in self._matrices:  # at once, since a resumed run's state has to find its places
            state = self._muon.state[matrix]
            state["momentum_buffer"] = torch.zeros_like(matrix)
            state["ema"] = matrix.detach().clone()
            self.state[matrix] = state
        for other in self._others:
            self.state[other] = self._adamw.state[other]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> None:
        """One step of both; gradients count as if multiplied by `grad_scale`."""
        if closure is not None:
            raise ValueError("MuonBeside takes no closure")
        [group] = self.param_groups
        for part in (self._muon, self._adamw):
            part.param_groups[0]["lr"] = group["lr"]
        self._adamw.param_groups[0]["ema"] = group["ema"]
        if grad_scale is not None:
            torch._foreach_mul_([p.grad for p in self._matrices if p.grad is not None], grad_scale.reshape(()))
        self._muon.step()
        self._adamw.step(grad_scale=grad_scale)
        for matrix in self._matrices:
            self.state[matrix]["ema"].lerp_(matrix, 1 - group["ema"])

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """The weights are their averages inside this context."""
        pairs = [(matrix, self.state[matrix]["ema"]) for matrix in self._matrices]
        with self._adamw.swap_ema():
            _exchange(pairs)
            try:
                yield
            finally:
                _exchange(pairs)


@torch.no_grad()
def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for weight, average in pairs:
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)


def flops(config: HRMConfig) -> float:
    """Of the orthogonalisation of all matrices in a step: an iteration over m × n, m <= n, is 4·m²·n + 2·m³."""
    width, attention, ffn = config.hidden_size, config.attention_width, config.intermediate_size
    shapes = ((4 * attention, width), (width, attention), (2 * ffn, width), (width, ffn))
    each = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in shapes)
    return float(ITERATIONS * each * sum(config.depths))
