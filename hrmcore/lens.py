"""The recurrence made visible: the logit lens over every cycle and layer.

Shapes: T tokens, D width, V vocabulary, S steps. A step is one layer of one visit of a stack; there are
H_cycles · (L_cycles + 1) visits. What a step would answer is what the head reads from its residual stream through the
final norm, as if the recurrence ended there (nostalgebraist 2020, "interpreting GPT: the logit lens").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hrmcore.lens_names import places
from hrmcore.model import HRM, Layout
from hrmcore.ops.rms_norm import rms_norm


@dataclass(frozen=True)
class Step:
    """One layer of one visit. `l` is the L cycle within the H cycle `h`, L_cycles for H; both count from 0.

    `token` is the most probable token and `probability` its probability; `answer_probability` is that of the final
    answer's token. `kl` is the divergence (nats) of the final distribution from this step's. `norm` is the norm of the
    residual stream. `change` is the distance between the head's inputs at this step and at the last step of the same
    stack, divided by the norm of the latter.
    """

    h: int
    l: int  # noqa: E741
    stack: str
    layer: int
    token: int
    probability: float
    answer_probability: float
    kl: float
    norm: float
    change: float


@dataclass(frozen=True)
class Lens:
    """All steps of one position, in order, and the logits (S, V) float32 of each; the last row is the model's."""

    steps: tuple[Step, ...]
    logits: Tensor

    @property
    def answer(self) -> int:
        """The token that the model answers."""
        return self.steps[-1].token


@torch.inference_mode()
def look(model: HRM, ids: Sequence[int], prefix_length: int | None = None) -> Lens:
    """The tokens that every step would answer after ids (T).

    The first `prefix_length` ids see each other both ways; None means all. The last step's logits are bit-identical to
    those of `model(ids, prefix_length)`.
    """
    known, layout = _layout(model, ids, prefix_length)
    streams: list[Tensor] = []
    reads: list[Tensor] = []

    def record(_: nn.Module, __: Any, halves: tuple[Tensor, Tensor]) -> None:
        x, residual = (half[-1:] for half in halves)
        streams.append((x + residual).float())
        reads.append(rms_norm(x, residual, model.config.rms_norm_eps)[0])

    blocks = dict.fromkeys([*model.L_module.layers, *model.H_module.layers])  # each once, where the stacks are one
    hooks = [block.register_forward_hook(record) for block in blocks]
    try:
        final = model.hidden(known, layout)
    finally:
        for hook in hooks:
            hook.remove()
    logits = model.lm_head(torch.cat(reads)).float()
    logits[-1] = model.lm_head(final).float()[-1]  # of all rows: a GEMM of a single row may round differently
    return Lens(_steps(model, known, streams, reads, logits), logits)


def _layout(model: HRM, ids: Sequence[int], prefix_length: int | None) -> tuple[Tensor, Layout]:
    prefix = len(ids) if prefix_length is None else prefix_length
    if not ids or not 0 <= prefix <= len(ids):
        raise ValueError(f"prefix_length must be from 0 to the {len(ids)} ids given (at least one), got {prefix}")
    seen_both_ways, device = prefix if model.config.prefix_lm else 0, model.embed_tokens.weight.device
    return torch.tensor(list(ids), device=device), Layout.of([len(ids)], [seen_both_ways], device=device)


def _steps(model: HRM, ids: Tensor, streams: list[Tensor], reads: list[Tensor], logits: Tensor) -> tuple[Step, ...]:
    config = model.config
    logs = logits.log_softmax(-1)
    final = logs[-1].exp()
    kl = (final * (logs[-1] - logs)).nan_to_num(0.0).sum(-1)  # a token of probability 0 adds nothing
    tokens = logits.argmax(-1)
    before = {
        "L": rms_norm(model.z_L_init[None], None, config.rms_norm_eps)[0],
        "H": rms_norm(model.embed_tokens(ids[-1:]) * config.embedding_scale, None, config.rms_norm_eps)[0],
    }
    steps = []
    for index, (h, l, stack, layer) in enumerate(places(config)):  # noqa: E741
        read = reads[index].float()
        step = Step(
            h=h,
            l=l,
            stack=stack,
            layer=layer,
            token=int(tokens[index]),
            probability=float(logs[index, tokens[index]].exp()),
            answer_probability=float(logs[index, tokens[-1]].exp()),
            kl=max(0.0, float(kl[index])),
            norm=float(streams[index].norm()),
            change=float((read - before[stack]).norm() / before[stack].norm()),
        )
        before[stack] = read
        steps.append(step)
    return tuple(steps)


@torch.inference_mode()
def visits(model: HRM, ids: Sequence[int], prefix_length: int | None = None) -> Iterator[tuple[int, int, int, float]]:
    """(h, l, token, probability) after each visit, as soon as it is computed: the answer if the model stopped there.

    `l` and `prefix_length` are as in `look`.
    """
    known, layout = _layout(model, ids, prefix_length)
    for h, l, state in model.states(known, layout):  # noqa: E741
        probabilities = model.lm_head(state).float()[-1].softmax(-1)
        token = int(probabilities.argmax())
        yield h, l, token, float(probabilities[token])
