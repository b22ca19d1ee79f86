"""The whole HRM as one module, readable beside the paper's figure (arXiv 2605.20613).

Shapes: B batch, T tokens (packed, all sequences one after the other), D width, H heads, d head_dim, F ffn width,
V vocabulary, S sequences. The two stacks are called L (fast) and H (slow), as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrmcore.config import RECOMPUTE, HRMConfig
from hrmcore.ops.attention import PackedMask, attention
from hrmcore.ops.backend import reference_active, require_cuda
from hrmcore.ops.cross_entropy import check_rows, cross_entropy, rows_filled, sample_targets
from hrmcore.ops.rms_norm import rms_norm
from hrmcore.ops.rms_norm_inject import rms_norm_inject
from hrmcore.ops.rope import rope, rope_table, xpos_log_decay
from hrmcore.ops.sublayers import attention_sublayer, mlp_sublayer
from hrmcore.ops.swiglu import swiglu
from hrmcore.ops.weights import SharedWeights, Weight

if TYPE_CHECKING:
    from typing_extensions import Self

    from hrmcore.data.packing import PackedBatch


_ROWS = 256  # positions whose logits `greedy_tokens` holds at once


class Cache(Protocol):
    """Where attention keeps keys and values; one slot for each (visit, layer)."""

    def extend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Append this call's k, rotated, and v (T, H, d); return q, rotated, and all keys and values, (Tk, H, d)."""
        ...

    @property
    def key_offsets(self) -> Tensor:
        """(S+1) int32: where each sequence's keys start, this call's tokens included."""
        ...


class Positions(NamedTuple):
    """A model's tables of positions."""

    table: Tensor  # (P, d) float32, as rope_table makes it
    log_decay: Tensor | None  # (d/2) float32, as xpos_log_decay makes them; None is RoPE

    @classmethod
    def of(cls, config: HRMConfig, length: int) -> Positions:
        """Of a model, for sequences of up to `length` tokens."""
        xpos = config.position_encoding == "xpos"
        table = rope_table(length, config.head_dim, config.rope_theta, exact=xpos)
        return cls(table, xpos_log_decay(config.head_dim, config.xpos_scale_base) if xpos else None)


@dataclass(frozen=True)
class Layout:
    """Where the sequences of one packed call lie.

    `PackedMask` has the formula of what each token sees. With an attention window shorter than the prefix, a token sees
    the prefix both ways within the neighbouring blocks; tokens farther away reach it through the layers and visits.
    """

    offsets: Tensor  # (S+1) int32
    prefix: Tensor  # (S) int32
    positions: Tensor  # (T) int32, counted from each sequence's first token
    longest: int | None = None  # tokens of the longest sequence, if the host knows it; else xPos reads the positions

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        prefix: Sequence[int],
        starts: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> Layout:
        """Lay out sequences of these lengths; `starts` are the tokens of each that a cache already holds."""
        starts = starts or [0] * len(lengths)
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        runs = [torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, lengths, strict=True)]
        positions = torch.cat(runs) if runs else torch.empty(0, dtype=torch.int32)
        longest = max((s + n for s, n in zip(starts, lengths, strict=True)), default=0)
        prefixes = torch.tensor(prefix, dtype=torch.int32)
        return cls(offsets.to(device), prefixes.to(device), positions.to(device), longest)


@dataclass(frozen=True)
class ForwardContext:
    """What one packed call gives the blocks beside the residual stream."""

    positions: Tensor  # (T) int32, counted from each sequence's first token
    table: Tensor  # (P, d) float32, as rope_table makes it
    mask: PackedMask
    cache: Cache | None = None
    slot: int = 0  # the cache's slot of the layer that runs next
    rows: Tensor | None = None  # (R) int64: the tokens whose final state is wanted; None: all of them
    weights: SharedWeights | None = None  # the blocks' matrices as all visits share them; None: each takes its own
    keep: bool = False  # norms and SwiGLU's output are kept for backward, not computed again

    @classmethod
    def of(
        cls,
        layout: Layout,
        tables: Positions,
        window: int = 0,
        cache: Cache | None = None,
        rows: Tensor | None = None,
    ) -> ForwardContext:
        """For the first layer of a model."""
        key_offsets = None if cache is None else cache.key_offsets
        mask = PackedMask(layout.offsets, layout.prefix, key_offsets, tables.log_decay, window)
        return cls(layout.positions, tables.table, mask, cache, rows=rows)

    def weight(self, parameter: Tensor) -> Tensor | Weight:
        """A block's matrix as its products take it."""
        return parameter if self.weights is None else self.weights.of(parameter)

    def at(self, slot: int, last: bool) -> ForwardContext:
        """For the layer, or the visit, that begins at this slot; `rows` reach the last one alone."""
        return replace(self, slot=slot, rows=self.rows if last else None)


class Opened(NamedTuple):
    """The residual stream as a block gets it, both (T, D). A visit begins with the stream z_L + z_H."""

    normed: Tensor  # rms(stream)
    stream: Tensor


class Block(nn.Module):
    """Attention with a sigmoid gate, then SwiGLU, each after a norm; the stack computes the first one."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.config = config
        width, attention_width = config.hidden_size, config.attention_width
        self.gqkv_proj = nn.Linear(width, 4 * attention_width, bias=False)  # rows gate | q | k | v
        self.o_proj = nn.Linear(attention_width, width, bias=False)
        self.gate_up_proj = nn.Linear(width, 2 * config.intermediate_size, bias=False)  # rows gate | up
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, normed: Tensor, stream: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Takes the residual stream and its norm, both (T, D); returns two tensors whose sum is the new stream.

        With `context.rows` the two are of these tokens alone, (R, D).
        """
        if context.cache is None and not reference_active():
            return self._fused(normed, stream, context)
        config = self.config
        gqkv = self.gqkv_proj(normed).view(-1, 4, config.num_attention_heads, config.head_dim)
        gate, q, k, v = gqkv.unbind(1)
        if context.cache is None:
            q, k = rope(q, k, context.table, context.positions)
        else:
            q, k, v = context.cache.extend(q, k, v, context)
        attended, rows = attention(q, k, v, gate, context.mask).flatten(1), context.rows
        if context.cache is not None:  # training has the same products as the two fused ops
            (attended, stream), rows = _chosen(attended, stream, rows), None
        normed, stream = rms_norm(self.o_proj(attended), stream, config.rms_norm_eps)
        return _chosen(self.down_proj(swiglu(self.gate_up_proj(normed))), stream, rows)

    def _fused(self, normed: Tensor, stream: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The same without a cache, in two ops that keep less for backward; of `rows` alone from the MLP on."""
        attended, stream = _chosen(self._attention(normed, stream, context), stream, context.rows)
        return self._mlp(attended, stream, context)

    def matrices(self) -> list[Tensor]:
        """Those that `ForwardContext.weights` has of this block."""
        return list(self.parameters())

    def _attention(self, normed: Tensor, stream: Tensor, context: ForwardContext) -> Tensor:
        gqkv, o = map(context.weight, (self.gqkv_proj.weight, self.o_proj.weight))
        heads, eps = self.config.num_attention_heads, self.config.rms_norm_eps
        rotation = context.table, context.positions
        return attention_sublayer(normed, stream, gqkv, o, heads, eps, rotation, context.mask, context.keep)

    def _mlp(self, x: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        gate_up, down = map(context.weight, (self.gate_up_proj.weight, self.down_proj.weight))
        return mlp_sublayer(x, residual, gate_up, down, self.config.rms_norm_eps, context.keep)


def _chosen(x: Tensor, residual: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, residual) if rows is None else (x.index_select(0, rows), residual.index_select(0, rows))


class Stack(nn.Module):
    """N blocks, a norm before each, closed by a final norm ("MagicNorm")."""

    def __init__(self, config: HRMConfig, depth: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.layers = nn.ModuleList([Block(config) for _ in range(depth)])

    def forward(
        self, opened: Opened, injection: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Opened | None]:
        """One visit: the new state (T, D), normalised, and what the next visit begins with: that state + `injection`.

        `injection` is (T, D); without it the second result is None. `context` is that of the first layer. With
        `context.rows` (R) int64 and without an injection, the state holds these tokens alone, (R, D).
        """
        normed, stream = opened
        for index, block in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x, residual = block(normed, stream, context.at(context.slot + index, last))
            if not last:
                normed, stream = rms_norm(x, residual, self.eps)
        if injection is None:
            return rms_norm(x, residual, self.eps)[0], None
        state, *following = rms_norm_inject(x, residual, injection, self.eps)
        return state, Opened(*following)


def _visit(
    stack: Stack, opened: Opened, injection: Tensor | None, context: ForwardContext, again: bool
) -> tuple[Tensor, Opened | None]:
    """One visit of a stack, of which, to be computed `again`, only what it began with is kept."""
    if not again:
        return cast(tuple[Tensor, Opened | None], stack(opened, injection, context))

    def run(normed: Tensor, stream: Tensor, injection: Tensor) -> Any:
        return stack(Opened(normed, stream), injection, context)

    return cast(
        tuple[Tensor, Opened],
        checkpoint(run, *opened, injection, use_reentrant=False, preserve_rng_state=False),
    )


def grad_visits(H_cycles: int, L_cycles: int, horizon: int | None) -> set[tuple[int, int]]:
    """The (h, l) visits that carry gradient, l = L_cycles standing for H, when the gradient horizon is `horizon`.

    H gets min(H_cycles, K − 1) of the last K visits, L the rest, each counted from the end (arXiv 2605.20613);
    None is every visit.
    """
    h_visits = [(h, L_cycles) for h in range(H_cycles)]
    l_visits = [(h, l) for h in range(H_cycles) for l in range(L_cycles)]  # noqa: E741
    if horizon is None:
        return {*h_visits, *l_visits}
    if horizon < 2:
        raise ValueError(f"horizon must be at least 2 (one H and one L step), got {horizon}")
    h_count = min(H_cycles, horizon - 1)
    return {*h_visits[-h_count:], *l_visits[-min(len(l_visits), horizon - h_count) :]}


class HRM(nn.Module):
    """A hierarchical recurrent language model: two stacks, slow H and fast L, visited in nested cycles."""

    z_L_init: Tensor
    rope_table: Tensor
    xpos_log_decay: Tensor | None

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.config = config
        self.shares_weights = True  # over the visits of a pass; not where a block's weights are gathered when it runs
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        l_layers, h_layers = config.depths
        self.L_module = Stack(config, l_layers)
        if config.shared_stacks:
            self.__dict__["H_module"] = self.L_module  # a second name, not a second module: one set of parameters
        else:
            self.H_module = Stack(config, h_layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("z_L_init", torch.empty(config.hidden_size))
        self.reset_positions(config.max_position_embeddings)
        self.reset_parameters()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `torch.nn.Module.to`. Raises RuntimeError, saying what is missing, if CUDA is not there."""
        target = kwargs.get("device", args[0] if args else None)
        if isinstance(target, int | str | torch.device) and torch.device(target).type == "cuda":
            require_cuda()
        return super().to(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast everything; the tables of positions stay float32, which the ops take them in."""
        tables = {name: getattr(self, name) for name in ("rope_table", "xpos_log_decay")}
        super()._apply(*args, **kwargs)
        for name, table in tables.items():
            if table is not None and (found := getattr(self, name)).dtype != table.dtype:
                setattr(self, name, table.to(found.device))
        return self

    def reset_parameters(self) -> None:
        """LeCun initialisation: normal truncated at 3 sigma, variance-corrected, std 1/sqrt(fan_in); z_L_init std 1."""
        for parameter in self.parameters():
            truncated_normal_(parameter, 1 / math.sqrt(parameter.shape[1]))
        truncated_normal_(self.z_L_init, 1.0)

    def _reach(self, layout: Layout) -> None:
        """Under xPos make the tables longer where a sequence is longer than they are."""
        if self.xpos_log_decay is None or len(self.rope_table) >= self.config.context:
            return
        longest = int(layout.positions.max()) + 1 if layout.longest is None else layout.longest
        if longest > len(self.rope_table):
            self.reset_positions(min(2 * longest, self.config.context))

    def reset_positions(self, length: int) -> None:
        """Make the tables for sequences of up to `length` tokens."""
        table, log_decay = Positions.of(self.config, length)
        device = self.z_L_init.device
        self.register_buffer("rope_table", table.to(device), persistent=False)
        self.register_buffer("xpos_log_decay", None if log_decay is None else log_decay.to(device), persistent=False)

    def states(
        self,
        ids: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        horizon: int | None = None,
        rows: Tensor | None = None,
        recompute: str = "sublayer",
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Run the recurrence over packed ids (T), yielding (h, l, state (T, D)) after each visit; l = L_cycles is H.

        Visits outside the gradient horizon run without autograd and keep nothing. Every visit begins with z_L + z_H and
        returns the new z_L or z_H. One op closes a visit and opens the next, except at the edge of the horizon. With
        `rows` (R) int64 the last state holds these tokens alone, (R, D). `recompute` is as in `loss`.
        """
        config = self.config
        visits = [(h, l) for h in range(config.H_cycles) for l in range(config.L_cycles + 1)]  # noqa: E741
        with_grad = grad_visits(config.H_cycles, config.L_cycles, horizon) if torch.is_grad_enabled() else set()
        self._reach(layout)
        tables = Positions(self.rope_table, self.xpos_log_decay)
        context = ForwardContext.of(layout, tables, config.attention_window, cache, rows)
        z_H = self.embed_tokens(ids) * config.embedding_scale
        if torch.is_autocast_enabled(z_H.device.type):
            z_H = z_H.to(torch.get_autocast_dtype(z_H.device.type))
        z_L = self.z_L_init.to(z_H.dtype).expand_as(z_H)
        if cache is None and not reference_active():
            weights = SharedWeights(self._matrices(), z_H.dtype) if self.shares_weights else None
            context = replace(context, mask=context.mask.with_tiles(z_H), weights=weights, keep=recompute == "none")
        elif cache is not None and cache.key_offsets is layout.offsets:  # new sequences: their keys are their tokens
            context = replace(context, mask=context.mask.with_tiles(z_H))
        opened, slot = None, 0
        for (h, l), following in zip(visits, [*visits[1:], None], strict=True):  # noqa: E741
            opens = following is not None and (following in with_grad) == ((h, l) in with_grad)
            with torch.set_grad_enabled((h, l) in with_grad):
                opened = opened or Opened(*rms_norm(z_L, z_H, config.rms_norm_eps))
                at_visit = context.at(slot, last=following is None)
                again = recompute == "visit" and opens and (h, l) in with_grad  # backward begins with the last one
                if l < config.L_cycles:
                    z_L, opened = _visit(self.L_module, opened, z_H if opens else None, at_visit, again)
                else:
                    z_H, opened = _visit(self.H_module, opened, z_L if opens else None, at_visit, again)
            slot += config.depths[l == config.L_cycles]
            yield h, l, z_L if l < config.L_cycles else z_H

    def _matrices(self) -> list[Tensor]:
        """Those that the blocks share over their visits, each once."""
        blocks = [*self.L_module.layers, *self.H_module.layers]
        return list(dict.fromkeys(matrix for block in blocks for matrix in cast(Block, block).matrices()))

    def hidden(
        self,
        ids: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        horizon: int | None = None,
        rows: Tensor | None = None,
        recompute: str = "sublayer",
    ) -> Tensor:
        """The final H state (T, D) of packed ids (T), or of `rows` (R) of them alone, (R, D)."""
        for _, _, state in self.states(ids, layout, cache, horizon, rows, recompute):
            final = state
        return final

    def forward(self, ids: Tensor, prefix_length: int | Sequence[int] | None = None) -> Tensor:
        """(B, T) int64 -> float32 logits (B, T, V).

        The first `prefix_length` tokens (one number, or one for each row) see each other both ways; None means the
        whole of `ids`. Raises ValueError on ids out of range, a wrong shape, or more than `config.context`.
        """
        batch, length = self._check_ids(ids)
        prefix = self._check_prefix(prefix_length, batch, length)
        layout = Layout.of([length] * batch, prefix, device=ids.device)
        return self.lm_head(self.hidden(ids.reshape(-1), layout)).float().view(batch, length, -1)

    def loss(
        self,
        batch: PackedBatch,
        horizon: int | None = None,
        sampler: torch.Generator | None = None,
        recompute: str = "sublayer",
    ) -> Tensor:
        """Summed cross-entropy (float32, nats) over the supervised tokens of a packed batch on any device.

        With a `sampler`, the labels are drawn from the model's own distribution: the squared gradient of that loss is
        Sophia-G's curvature. `recompute` is what backward computes again instead of finding it in memory: "none", norms
        and SwiGLU's outputs ("sublayer"), or besides these every visit but the last ("visit"); the gradients are the
        same bits. Raises ValueError on another word.
        """
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
        batch, longest = self._brought(batch)
        final, rows = self._supervised_states(batch, longest, horizon, recompute)
        head, targets = self.lm_head.weight, batch.targets
        if sampler is not None:
            targets = sample_targets(final, head, rows, sampler)
        return cross_entropy(final, head, rows, targets)

    def padded_loss(self, batch: PackedBatch, horizon: int | None = None, recompute: str = "sublayer") -> Tensor:
        """`loss` of a batch that `hrmcore.data.packing.pad` has filled up and that lies on the model's device.

        The host reads nothing of it and every shape follows from the bucket: one CUDA graph serves all such batches.
        Nothing is checked; under xPos the tables must reach as far as the sequences.
        """
        prefix = batch.prefix if self.config.prefix_lm else torch.zeros_like(batch.prefix)
        layout = Layout(batch.offsets, prefix, batch.positions, longest=0)
        states = self.hidden(batch.ids, layout, horizon=horizon, rows=batch.supervised, recompute=recompute)
        rows = torch.arange(len(batch.targets), device=batch.targets.device)
        return cross_entropy(states, self.lm_head.weight, rows, batch.targets)

    @torch.no_grad()
    def greedy_tokens(self, batch: PackedBatch) -> Tensor:
        """The most probable token (R) int64 after each supervised position of a packed batch, on any device."""
        final, supervised = self._supervised_states(*self._brought(batch))
        return torch.cat([self.lm_head(final[rows]).argmax(-1) for rows in supervised.split(_ROWS)])

    def _brought(self, batch: PackedBatch) -> tuple[PackedBatch, int | None]:
        """A batch on the model's device, and under xPos the tokens of its longest sequence.

        What must be read of it is read where it lies: a batch from the host costs no wait.
        """
        check_rows(batch.supervised, len(batch.ids))
        longest = None if self.xpos_log_decay is None else int(batch.offsets.diff().max())
        return batch.to(self.lm_head.weight.device), longest

    def _supervised_states(
        self, batch: PackedBatch, longest: int | None, horizon: int | None = None, recompute: str = "sublayer"
    ) -> tuple[Tensor, Tensor]:
        """Final states, and the rows of the supervised tokens in them; the last MLP skips the other tokens."""
        prefix = batch.prefix if self.config.prefix_lm else torch.zeros_like(batch.prefix)
        layout, rows = Layout(batch.offsets, prefix, batch.positions, longest), batch.supervised
        multiple = rows_filled(len(batch.ids) // 16)  # at most 16 row counts: oneDNN keeps some 4 MB for each
        filled = -(-max(1, len(rows)) // multiple) * multiple
        if filled >= len(batch.ids):
            return self.hidden(batch.ids, layout, horizon=horizon, recompute=recompute), rows
        # filled up with token 0, whose state is not read
        chosen = torch.cat([rows, rows.new_zeros(filled - len(rows))])
        states = self.hidden(batch.ids, layout, horizon=horizon, rows=chosen, recompute=recompute)
        return states, torch.arange(len(rows), device=rows.device)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> HRM:
        """Load an hrm_text checkpoint folder, or a hub id that is already in the local cache."""
        from hrmcore.checkpoint.hrm_text import load_model

        return load_model(path)

    def save_pretrained(self, path: str | Path, allow_xpos: bool = False) -> None:
        """Write config.json and model.safetensors in the released hrm_text format.

        That format has no xPos, no attention window and no stacks of two depths. A model with one of them is a
        ValueError, unless `allow_xpos` asks for a checkpoint that only hrmcore loads.
        """
        from hrmcore.checkpoint.hrm_text import save_model

        save_model(self, path, allow_xpos=allow_xpos)

    def _check_ids(self, ids: Tensor) -> tuple[int, int]:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise ValueError(f"ids must be a non-empty (B, T) int64 tensor, got {found}")
        self.config.check_length(ids.shape[1])
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ids must be in [0, vocab_size={self.config.vocab_size}), got {wrong}")
        return ids.shape[0], ids.shape[1]

    def _check_prefix(self, prefix_length: int | Sequence[int] | None, batch: int, length: int) -> list[int]:
        if not self.config.prefix_lm:
            return [0] * batch
        prefix_length = length if prefix_length is None else prefix_length
        prefix = list(prefix_length) if isinstance(prefix_length, Sequence) else [prefix_length] * batch
        if len(prefix) != batch or not all(type(p) is int and 0 <= p <= length for p in prefix):
            raise ValueError(
                f"prefix_length must be a number (or one for each of {batch} rows) from 0 to the {length} tokens, "
                f"got {prefix_length!r}"
            )
        return prefix


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill with normal numbers truncated at 3 sigma, variance-corrected to the standard deviation `std`."""
    kept = math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / kept  # of a unit normal cut at 3 sigma
    scale = std / math.sqrt(variance)
    with torch.no_grad():
        return nn.init.trunc_normal_(tensor, std=scale, a=-3 * scale, b=3 * scale, generator=generator)
