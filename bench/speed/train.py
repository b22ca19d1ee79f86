"""How fast a training step is: hrmcore (its ops and its fused AdamW) beside transformers' HrmTextForCausalLM with
torch's AdamW(fused=True), on the same weights and the same records, in turns, float32.

    python -m bench.speed.train --rounds 10

Two cases. `full`: sequences of one length, so that they too have no padding. `mix`: the lengths of five reasoning-gym
tasks; a packed batch of ours, and for them the same records as rows padded on the right, with the mask inputs that they
expect; only real tokens count. Both sides carry gradient through the same visits: our horizon K is stated to
transformers as L_bp_cycles, which for K = 5 of H_cycles 2 and L_cycles 3 is [0, 3]. (Its own default, [2], also grades
five visits but takes the first cycle's last L visit in place of the second cycle's first.) Before anything is timed,
losses and gradients of the two must agree. Peak memory is that of three steps in a process of its own, less what the
process held before the model was made.

Needs the extras `demo` and `bench`. The last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HrmTextForCausalLM

from bench import mix
from hrmcore import _C, optim
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch, epoch_batches, pack
from hrmcore.data.records import Corpus, Rejected, read_records, tokenize
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

SHAPES = {  # width, ffn, blocks of a stack, heads of 64
    "1M": (128, 384, 2, 2),
    "6M": (256, 768, 3, 4),
}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
IGNORED = -100
FULL_LENGTH = 256  # tokens of each sequence of the case `full`, half of them the instruction
SIDES = ("hrmcore", "transformers")

Step = Callable[[int], None]


@dataclass(frozen=True)
class Padded:
    """A batch as transformers takes it: rows of one length, (B, L) each."""

    ids: Tensor
    attention: Tensor  # 1 on real tokens
    kinds: Tensor  # 1 on the instruction, the bidirectional prefix
    targets: Tensor  # the next token where it is supervised, IGNORED elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1M,6M", help=f"of {', '.join(SHAPES)} (1M,6M)")
    parser.add_argument("--cases", default="full,mix", help="(full,mix)")
    parser.add_argument("--horizon", type=int, default=5, help="visits that carry gradient (5); 8 is all of them")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a packed batch (4096)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side (10)")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with rounds for as long (0)")
    parser.add_argument("--threads", type=int, help="default: every processor that this process may use")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        mix.write(Path(folder), records=1500, heldout=1)
        for size in arguments.sizes.split(","):
            for case in arguments.cases.split(","):
                lines.append(measure(size, case, Path(folder), arguments))
                print(row(lines[-1]), flush=True)
    report = {
        "threads": _C.num_threads(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "horizon": arguments.horizon,
        "L_bp_cycles": bp_cycles(arguments.horizon, 2, 3),
        "lines": lines,
    }
    print(json.dumps(report))


def use_threads(threads: int | None) -> None:
    if threads:
        _C.set_num_threads(threads)
    torch.set_num_threads(_C.num_threads())


def measure(size: str, case: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    corpus, vocabulary = corpus_of(case, folder)
    batches = batches_of(corpus, arguments.batch_tokens)
    models = models_of(size, vocabulary, arguments.horizon, int(corpus.lengths.max()))
    padded = [pad(corpus, batch.records) for batch in batches]
    agree(models, batches[0], padded[0], arguments.horizon)
    steps = steps_of(models, batches, padded, arguments.horizon)
    times = in_turns(steps, [real_tokens(batch) for batch in batches], arguments.rounds, arguments.seconds)
    each = [ours / theirs for ours, theirs in zip(*(times[side] for side in SIDES), strict=True)]
    low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else 3 * each
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for side in SIDES:
        with context.Pool(1) as pool:
            peaks[side] = pool.apply(peak_memory, (side, size, case, folder, arguments))
    return {
        "size": size,
        "parameters": sum(p.numel() for p in models["hrmcore"].parameters()),
        "case": case,
        "real_tokens_a_step": statistics.mean(real_tokens(batch) for batch in batches),
        "slots_used_by_transformers": statistics.mean(float(p.attention.float().mean()) for p in padded),
        "rounds": len(each),
        **{f"{side}_tokens_a_second": statistics.median(times[side]) for side in SIDES},
        **{f"{side}_best_tokens_a_second": max(times[side]) for side in SIDES},
        "speed": statistics.median(each),
        "speed_lower_quartile": low,
        "speed_upper_quartile": high,
        "speed_of_best": max(times["hrmcore"]) / max(times["transformers"]),
        **{f"{side}_peak_bytes": peaks[side] for side in SIDES},
        "memory": peaks["hrmcore"] / peaks["transformers"],
    }


# Data


def corpus_of(case: str, folder: Path) -> tuple[Corpus, int]:
    """The records of a case, and the vocabulary's size."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if case == "mix":
        rejected = Rejected()
        records = read_records(folder / "train.jsonl", rejected, strict=True)
        return tokenize(records, tokenizer, 1024, rejected, strict=True), tokenizer.vocab_size
    if case != "full":
        raise SystemExit(f"--cases: no case is called {case!r}; choose from full, mix")
    count, length = 256, FULL_LENGTH + 1  # the last token is only a target
    tokens = np.random.default_rng(0).integers(tokenizer.vocab_size, size=count * length, dtype=np.int32)
    return (
        Corpus(tokens, np.arange(count + 1) * length, np.full(count, FULL_LENGTH // 2, np.int32)),
        tokenizer.vocab_size,
    )


def batches_of(corpus: Corpus, batch_tokens: int, most: int = 8) -> list[PackedBatch]:
    batches = list(epoch_batches(corpus.lengths, batch_tokens, 0, 0))
    return [pack(corpus, records) for records in batches[:-1][:most]]  # the last one may be far from full


def real_tokens(batch: PackedBatch) -> int:
    return int(batch.offsets[len(batch.records)])


def pad(corpus: Corpus, records: tuple[int, ...]) -> Padded:
    rows = [corpus.tokens[corpus.offsets[r] : corpus.offsets[r + 1]].astype(np.int64) for r in records]
    shape = (len(rows), max(map(len, rows)) - 1)
    ids, attention, kinds = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    targets = torch.full(shape, IGNORED)
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        length, prefix = len(row) - 1, int(corpus.prefix[record])
        ids[index, :length] = torch.from_numpy(row[:-1])
        attention[index, :length] = 1
        kinds[index, :prefix] = 1
        targets[index, prefix - 1 : length] = torch.from_numpy(row[prefix:])
    return Padded(ids, attention, kinds, targets)


# The two sides


def bp_cycles(horizon: int, h_cycles: int, l_cycles: int) -> list[int]:
    """transformers' L_bp_cycles for our horizon; it grades every H visit, so ours must too."""
    if not h_cycles < horizon <= h_cycles * (l_cycles + 1):
        raise SystemExit(f"--horizon must be from {h_cycles + 1} to {h_cycles * (l_cycles + 1)} to compare the two")
    left, cycles = horizon - h_cycles, []
    for _ in range(h_cycles):
        cycles.insert(0, min(l_cycles, left))
        left -= cycles[0]
    return cycles


def models_of(size: str, vocabulary: int, horizon: int, context: int) -> dict[str, Any]:
    """The same weights on both sides."""
    if size not in SHAPES:
        raise SystemExit(f"--sizes: no size is called {size!r}; choose from {', '.join(SHAPES)}")
    width, ffn, blocks, heads = SHAPES[size]
    config = HRMConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers_per_stack=blocks,
        num_attention_heads=heads,
        head_dim=64,
        max_position_embeddings=max(1024, context),
    )
    torch.manual_seed(0)
    ours = HRM(config)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = HrmTextForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.model.L_bp_cycles_padded = bp_cycles(horizon, config.H_cycles, config.L_cycles)
    theirs.train()
    return {"hrmcore": ours, "transformers": theirs}


def our_loss(model: HRM, batch: PackedBatch, horizon: int) -> Tensor:
    return model.loss(batch, horizon=horizon) / len(batch.targets)


def their_loss(model: Any, batch: Padded) -> Tensor:
    logits = model(
        input_ids=batch.ids, attention_mask=batch.attention, token_type_ids=batch.kinds, use_cache=False
    ).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def agree(models: dict[str, Any], batch: PackedBatch, padded: Padded, horizon: int) -> None:
    """Raises SystemExit when loss or gradients of the two differ."""
    ours, theirs = models["hrmcore"], models["transformers"]
    losses = [our_loss(ours, batch, horizon), their_loss(theirs, padded)]
    for loss in losses:
        loss.backward()
    block, other = ours.L_module.layers[0], theirs.model.L_module.layers[0]
    pairs = [
        (losses[0].detach(), losses[1].detach()),
        (ours.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad),
        (ours.lm_head.weight.grad, theirs.lm_head.weight.grad),
        (block.o_proj.weight.grad, other.self_attn.o_proj.weight.grad),
        (block.down_proj.weight.grad, other.mlp.down_proj.weight.grad),
    ]
    for a, b in pairs:
        if not float((a - b).norm()) <= 1e-4 * float(b.norm()):
            raise SystemExit("hrmcore and transformers differ in loss or gradients: not timed")
    for model in models.values():
        model.zero_grad(set_to_none=True)


def steps_of(models: dict[str, Any], batches: list[PackedBatch], padded: list[Padded], horizon: int) -> dict[str, Step]:
    ours, theirs = models["hrmcore"], models["transformers"]
    fused = optim.AdamW(ours.parameters(), **ADAMW)
    torchs = torch.optim.AdamW(theirs.parameters(), fused=True, **ADAMW)

    def our_step(index: int) -> None:
        our_loss(ours, batches[index % len(batches)], horizon).backward()
        fused.step()
        fused.zero_grad(set_to_none=True)

    def their_step(index: int) -> None:
        their_loss(theirs, padded[index % len(padded)]).backward()
        torchs.step()
        torchs.zero_grad(set_to_none=True)

    return {"hrmcore": our_step, "transformers": their_step}


def in_turns(steps: dict[str, Step], tokens: list[int], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Real tokens a second of each side in every round; one step each goes before, untimed."""
    for step in steps.values():
        step(0)
    times: dict[str, list[float]] = {side: [] for side in steps}
    end = time.perf_counter() + seconds
    for index in endless():
        if index >= rounds and time.perf_counter() >= end:
            break
        for side, step in steps.items():
            started = time.perf_counter()
            step(index)
            times[side].append(tokens[index % len(tokens)] / (time.perf_counter() - started))
    return times


def endless() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1


def peak_memory(side: str, size: str, case: str, folder: Path, arguments: argparse.Namespace) -> int:
    """Bytes that three steps of one side hold at most; runs in a process of its own."""
    use_threads(arguments.threads)
    corpus, vocabulary = corpus_of(case, folder)
    batches = batches_of(corpus, arguments.batch_tokens, most=3)
    padded = [pad(corpus, batch.records) for batch in batches]
    torch.zeros(64, 64) @ torch.zeros(64, 64)  # the matrix library's own buffers
    before = status_bytes("VmRSS")
    models = models_of(size, vocabulary, arguments.horizon, int(corpus.lengths.max()))
    del models[next(other for other in SIDES if other != side)]
    models |= {other: torch.nn.Linear(1, 1) for other in SIDES if other != side}
    step = steps_of(models, batches, padded, arguments.horizon)[side]
    for index in range(3):
        step(index)
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most that it has held; getrusage would count the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def row(line: dict[str, Any]) -> str:
    return (
        f"{line['size']} ({line['parameters'] / 1e6:.2f} M) {line['case']:4}  "
        f"hrmcore {line['hrmcore_tokens_a_second']:7.0f}, transformers {line['transformers_tokens_a_second']:7.0f} "
        f"tok/s (slots used {line['slots_used_by_transformers']:.0%}): {line['speed']:.2f}x "
        f"({line['speed_lower_quartile']:.2f} to {line['speed_upper_quartile']:.2f}, of best "
        f"{line['speed_of_best']:.2f}) in {line['rounds']} rounds; peak memory "
        f"{line['hrmcore_peak_bytes'] / 2**20:.0f} and {line['transformers_peak_bytes'] / 2**20:.0f} MiB: "
        f"{line['memory']:.2f}x"
    )


if __name__ == "__main__":
    main()
