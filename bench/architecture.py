"""HRM against its baselines, and the training objectives, at matched training FLOPs on the same data.

    python bench/architecture.py --out architecture/ --tokens 1e6
    python bench/architecture.py --out architecture/            # goes on where it stopped, then prints the tables

The baselines are configurations of HRM's recurrence: a Transformer that passes each layer once, the same looped, and
TRM (one stack shared by L and H, of as many parameters). `--tokens` are HRM's; every other cell gets the steps that
cost as many FLOPs (hrmcore.planner). A cell is one architecture, objective, data set and seed; it is written as soon as
it is done, so a run may be stopped and started again. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hrmcore.config import HRMConfig
from hrmcore.data import Corpus, Record, Rejected, epoch_batches, pack, tokenize
from hrmcore.evals import iq
from hrmcore.model import HRM
from hrmcore.optim import AdamAtan2
from hrmcore.planner import parameters, training_flops
from hrmcore.tokenizer import train_tokenizer
from hrmcore.validation import exact_matches, mean_loss

HORIZON = 5
NOISE = 4  # irrelevant facts in the anti-interference questions
HELDOUT_SHARE = 0.05

# Layers of a stack and cycles, so that all have HRM's parameters; TRM's one stack is as deep as HRM's two together.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HRM": {"H_cycles": 2, "L_cycles": 3},
    "Transformer": {"H_cycles": 1, "L_cycles": 1},
    "looped": {"H_cycles": 4, "L_cycles": 1},
    "TRM": {"H_cycles": 2, "L_cycles": 3, "shared_stacks": True},
}
# Whether the instruction is read both ways, and whether its tokens carry loss.
OBJECTIVES = {
    "all tokens, causal": (False, True),
    "response only, causal": (False, False),
    "response only, PrefixLM": (True, False),
}
PUBLISHED = "response only, PrefixLM"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    architecture: str
    objective: str
    data: str
    seed: int

    @property
    def file(self) -> str:
        """Where its result lies."""
        words = f"{self.data} {self.architecture} {self.objective} {self.seed}".replace(",", "")
        return words.replace(" ", "-").lower() + ".json"


def cells(seeds: int) -> Iterator[Cell]:
    """Every architecture with the published objective, then every objective with HRM; each once."""
    pairs = [(name, PUBLISHED) for name in ARCHITECTURES] + [("HRM", name) for name in OBJECTIVES]
    for seed, (architecture, objective), data in itertools.product(range(seeds), dict.fromkeys(pairs), DATA):
        yield Cell(architecture, objective, data, seed)


def sudoku(count: int) -> list[Record]:
    """Mini sudokus of reasoning-gym, as bare grids."""
    import reasoning_gym

    def grid(rows: list[list[int]]) -> str:
        return "\n".join(" ".join(str(cell or "_") for cell in row) for row in rows)

    dataset = reasoning_gym.create_dataset("mini_sudoku", size=count, seed=0)
    entries = enumerate((entry["metadata"] for entry in dataset), start=1)
    return [Record(grid(e["puzzle"]), grid(e["solution"]), "direct", f"mini_sudoku:{i}") for i, e in entries]


def iq_records(count: int) -> list[Record]:
    """All tasks of the IQ suite in turn."""
    each = -(-count // len(iq.TASKS))
    made = [iq.questions(name, each, 0, NOISE if task.noisy else 0) for name, task in iq.TASKS.items()]
    asked = enumerate(itertools.chain(*zip(*made, strict=True)), start=1)
    return [Record(q.prompt, q.answer, "direct", f"iq:{i}") for i, q in asked]


DATA = {"mini_sudoku": sudoku, "iq": iq_records}


def corpora(data: str, count: int) -> tuple[Corpus, Corpus, int]:
    """Training and held-out records as tokens (a vocabulary of characters), and the size of the vocabulary."""
    records = list({r.instruction: r for r in DATA[data](count)}.values())
    texts = [f"{r.instruction}\n{r.response}" for r in records]
    size = 10 + 256 + len(set("".join(texts)))  # framing, bytes, characters
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(iter(texts), folder, vocab_size=size)
    cut = max(1, round(HELDOUT_SHARE * len(records)))
    heldout, train = (tokenize(iter(part), tokenizer, 1024, Rejected()) for part in (records[:cut], records[cut:]))
    return train, heldout, tokenizer.vocab_size


def model_config(cell: Cell, vocabulary: int, width: int, layers: int) -> HRMConfig:
    """The cell's architecture; `layers` are those of one of HRM's stacks."""
    chosen = ARCHITECTURES[cell.architecture]
    return HRMConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers_per_stack=layers * (2 if chosen.get("shared_stacks") else 1),
        num_attention_heads=width // 32,
        head_dim=32,
        max_position_embeddings=1024,
        prefix_lm=OBJECTIVES[cell.objective][0],
        **chosen,
    )


def flops_per_token(config: HRMConfig, corpus: Corpus) -> float:
    """Training FLOPs of a mean token of the corpus, head and attention included."""
    tokens = float(corpus.lengths.sum())
    prefix = corpus.prefix.astype(float) if config.prefix_lm else np.zeros(len(corpus))
    lengths = corpus.lengths.astype(float)
    pairs = prefix * lengths + ((lengths - prefix) * (lengths - prefix + 1)) / 2
    supervised = float((corpus.lengths - corpus.prefix + 1).sum())
    return training_flops(config, HORIZON, tokens, supervised, float(pairs.sum())).total / tokens


def run(cell: Cell, settings: dict[str, Any], train: Corpus, heldout: Corpus, vocabulary: int) -> dict[str, Any]:
    """Train and measure one cell."""
    torch.manual_seed(cell.seed)
    model = HRM(model_config(cell, vocabulary, settings["width"], settings["layers"]))
    if OBJECTIVES[cell.objective][1]:  # with a prefix of one token, all others carry loss
        train = dataclasses.replace(train, prefix=np.ones_like(train.prefix))
    budget = settings["tokens"] * flops_per_token(
        model_config(Cell("HRM", PUBLISHED, cell.data, 0), vocabulary, settings["width"], settings["layers"]), train
    )
    steps = max(1, round(budget / (flops_per_token(model.config, train) * settings["batch_tokens"])))
    started, spent, seen = time.perf_counter(), 0.0, 0
    optimizer = AdamAtan2(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    batches = itertools.chain.from_iterable(
        epoch_batches(train.lengths, settings["batch_tokens"], cell.seed, epoch) for epoch in itertools.count()
    )
    for step, chosen in zip(tqdm(range(steps), desc=cell.file, leave=False, disable=None), batches, strict=False):
        for group in optimizer.param_groups:  # warm up over a tenth, then linearly down to a tenth
            group["lr"] = settings["learning_rate"] * min(10 * (step + 1) / steps, 1 - 0.9 * step / steps)
        batch = pack(train, chosen, 64)
        loss = model.loss(batch, horizon=HORIZON) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = int(train.lengths[list(chosen)].sum())
        seen, spent = seen + tokens, spent + tokens * flops_per_token(model.config, train)
    model.eval()
    return {
        **dataclasses.asdict(cell),
        "settings": settings,
        "parameters": parameters(model.config),
        "steps": steps,
        "tokens": seen,
        "flops": spent,
        "budget": budget,
        "heldout_loss": mean_loss(model, heldout, settings["batch_tokens"]),
        "exact": exact_matches(model, heldout, min(len(heldout), 500), settings["batch_tokens"]),
        "n": min(len(heldout), 500),
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(results: list[dict[str, Any]], key: str, names: list[str]) -> str:
    """Right answers on held-out records, mean and range over seeds: a row a name, a column a data set."""
    head = ["", *DATA, "parameters", "FLOPs", "tokens"]
    rows = [head, ["---"] * len(head)]
    for name in names:
        chosen = [r for r in results if r[key] == name]
        if not chosen:
            continue
        shown = [name]
        for data in DATA:
            found = [100 * r["exact"] for r in chosen if r["data"] == data]
            spread = f"{statistics.fmean(found):.1f}% ({min(found):.1f} to {max(found):.1f}, {len(found)} seeds)"
            shown.append(spread if found else "not run")
        shown += [f"{statistics.fmean(r[k] for r in chosen):.3g}" for k in ("parameters", "flops", "tokens")]
        rows.append(shown)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells' results")
    parser.add_argument("--tokens", type=float, default=1e6, help="tokens of each HRM run (1e6)")
    parser.add_argument("--records", type=int, default=50_000, help="records of each data set (50000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of one of HRM's stacks (2)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args(arguments)
    names = ("tokens", "records", "width", "layers", "batch_tokens", "learning_rate")
    settings = {name: getattr(args, name) for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    loaded: dict[str, tuple[Corpus, Corpus, int]] = {}
    for cell in cells(args.seeds):
        path = args.out / cell.file
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["settings"] != settings:
                raise SystemExit(f"{path} was made with other settings: {result['settings']}; choose another --out")
        else:
            if cell.data not in loaded:
                loaded[cell.data] = corpora(cell.data, args.records)
            result = run(cell, settings, *loaded[cell.data])
            staged = path.with_suffix(".tmp")
            staged.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            staged.replace(path)
            print(f"{cell.file}: {result['exact']:.1%} of {result['n']}, {result['seconds']} s", flush=True)
        results.append(result)
    print("\n## Architectures, response only, PrefixLM\n")
    print(table([r for r in results if r["objective"] == PUBLISHED], "architecture", list(ARCHITECTURES)))
    print("\n## Objectives, HRM\n")
    print(table([r for r in results if r["architecture"] == "HRM"], "objective", list(OBJECTIVES)))


if __name__ == "__main__":
    main()
