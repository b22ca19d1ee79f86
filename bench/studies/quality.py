"""What the smaller dtypes cost in quality: perplexity of held-out responses, and the divergence from float32.

    python -m bench.studies.quality heldout.jsonl --model CHECKPOINT --records 300

For each dtype, over the response tokens: perplexity and its change against float32; KL(float32 || dtype) in nats a
token, mean and the 99th percentile; how often the likeliest token is the same. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hrmcore
from hrmcore.data.records import Rejected, read_records, tokenize

VARIANTS = [("float32", None), ("bfloat16", None), ("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int8")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path, help="records, one JSON object a line")
    parser.add_argument("--model", help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--records", type=int, default=300, help="how many of them (300)")
    args = parser.parse_args()
    exact = hrmcore.load(args.model, dtype="float32")
    if exact.tokenizer is None:
        raise SystemExit(f"{exact.source} has no tokenizer")
    records = list(read_records(args.heldout, Rejected()))
    records = records[:: max(1, len(records) // args.records)][: args.records]
    corpus = tokenize(iter(records), exact.tokenizer, exact.config.max_position_embeddings, Rejected())
    reference = [log_probabilities(exact, *example(corpus, index)) for index in range(len(corpus))]
    lines = []
    for dtype, kv_dtype in VARIANTS:
        engine = hrmcore.load(args.model, dtype=dtype, kv_dtype=kv_dtype)
        lines.append({"dtype": dtype, "kv_dtype": kv_dtype or ("float32" if dtype == "float32" else "bfloat16")})
        lines[-1] |= compare(engine, corpus, reference)
        lines[-1]["perplexity_change"] = lines[-1]["perplexity"] / lines[0]["perplexity"] - 1
        print(row(lines[-1]), flush=True)
    print(json.dumps({"records": len(corpus), "lines": lines}))


def example(corpus: Any, index: int) -> tuple[list[int], int]:
    """One sequence, and the length of its instruction."""
    return corpus.tokens[corpus.offsets[index] : corpus.offsets[index + 1]].tolist(), int(corpus.prefix[index])


def log_probabilities(engine: Any, ids: list[int], prefix: int) -> Tensor:
    """(responses, V) float64: what the engine expects at each response token."""
    return engine.logits(ids[:-1], prefix)[prefix - 1 :].double().log_softmax(-1)


def compare(engine: Any, corpus: Any, reference: list[Tensor]) -> dict[str, float]:
    losses, divergences, agreements = [], [], []
    for index, expected in enumerate(reference):
        ids, prefix = example(corpus, index)
        ours = log_probabilities(engine, ids, prefix)
        losses.append(-ours.gather(-1, torch.tensor(ids[prefix:])[:, None])[:, 0])
        divergences.append((expected.exp() * (expected - ours)).sum(-1))
        agreements.append(ours.argmax(-1) == expected.argmax(-1))
    divergence = torch.cat(divergences)
    return {
        "tokens": len(divergence),
        "perplexity": math.exp(float(torch.cat(losses).mean())),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "same_choice": float(torch.cat(agreements).double().mean()),
    }


def row(line: dict[str, Any]) -> str:
    return (
        f"{line['dtype']:9} kv {line['kv_dtype']:9} perplexity {line['perplexity']:.5f} "
        f"({line['perplexity_change']:+.3%})"
        f"  KL {line['kl_mean']:.2e} (p99 {line['kl_p99']:.2e})  same choice {line['same_choice']:.3%}"
    )


if __name__ == "__main__":
    main()
