"""hrmcore, transformers and llama.cpp on the same checkpoint, alternating in one run: what else the machine does meets
all of them alike. Each engine runs in a process of its own, several rounds, so that a figure comes with its range and a
ratio is one within a round.

    python bench/peers.py CHECKPOINT --gguf bf16=model-bf16.gguf --gguf q8_0=model-q8_0.gguf --out bench/peers
    python bench/peers.py CHECKPOINT --gguf … --quick

--quick makes two rounds with one transformers and contexts to 1,024. A round measures, in this order: loading, the
first token of a short prompt after it, prefill of one prompt, greedy decoding after it, peak resident memory, decoding
after longer contexts (first round only), and the streaming bandwidth of the same minute. The share of the bandwidth
counts what a token must read: the weights of every visit, the head, and the keys and values of its context. llama.cpp
attends causally over the prompt, where the model was trained with a bidirectional prefix: speed is compared, not
answers. Needs the extra `bench`. The last line printed is JSON; --out writes it with a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from decode import stream_gb_s

from hrmcore import _C
from hrmcore.checkpoint import read_config
from hrmcore.config import HRMConfig

# Bits of a weight, its share of a scale included; keys and values are bfloat16 or float16 beside all but float32.
BITS = {"float32": 32, "bfloat16": 16, "bf16": 16, "int8": 8.5, "q8_0": 8.5, "int4": 4.5, "q4_0": 4.5}
HEAD_BITS = BITS | {"int4": 8.5}
PAIRS = {"hrmcore bfloat16": "llama.cpp bf16", "hrmcore int8": "llama.cpp q8_0", "hrmcore int4": "llama.cpp q4_0"}


class Opened(NamedTuple):
    """A loaded engine: `start` begins a sequence, `extend` appends tokens, `step` the likeliest one."""

    start: Callable[[list[int]], None]
    extend: Callable[[list[int]], None]
    step: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--gguf", action="append", default=[], metavar="NAME=FILE", help="for llama.cpp: bf16, q8_0 or q4_0; repeated"
    )
    parser.add_argument("--dtypes", default="bfloat16,int8,int4", help="of hrmcore")
    parser.add_argument("--transformers", help="its dtypes (bfloat16,float32); empty leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt (256)")
    parser.add_argument("--contexts", help="decode after these, too (1024,4000)")
    parser.add_argument("--context-seconds", type=float, help="reach those contexts only while it takes no longer")
    parser.add_argument("--tokens", type=int, default=8, help="decoded for each figure (8)")
    parser.add_argument("--rounds", type=int, help="(3); longer contexts are measured in the first")
    parser.add_argument("--quick", action="store_true", help="fewer of everything that is not given")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    settle(args)
    config = read_config(args.checkpoint)
    engines = [("hrmcore", dtype, str(args.checkpoint)) for dtype in args.dtypes.split(",") if dtype]
    engines += [("transformers", dtype, str(args.checkpoint)) for dtype in args.transformers.split(",") if dtype]
    engines += [("llama.cpp", *entry.split("=", 1)) for entry in args.gguf]
    spawn = multiprocessing.get_context("spawn")
    rounds: dict[str, list[dict[str, float]]] = {f"{name} {dtype}": [] for name, dtype, _ in engines}
    for number in range(args.rounds):
        for name, dtype, path in engines:
            contexts = args.contexts if number == 0 else []
            with spawn.Pool(1) as pool:
                measured = pool.apply(measure, (name, dtype, path, args, contexts))
            for key in [key for key in measured if key.startswith("decode")]:
                needed = bytes_a_token(config, dtype, measured[f"context{key[6:]}"])
                measured[f"share{key[6:]}"] = measured[key] * needed / measured["stream_gb_s"] / 1e9
            rounds[f"{name} {dtype}"].append(measured)
            print(f"round {number + 1}, {name} {dtype}: {json.dumps(measured)}", flush=True)
    report = {
        "checkpoint": args.checkpoint.name,
        "threads": args.threads,
        "prefill": args.prefill,
        "rounds": args.rounds,
        "lines": [{"engine": engine, **summary(entries)} for engine, entries in rounds.items()],
        "ratios": ratios(rounds),
    }
    print_tables(report)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        from hrmcore import plots

        plots.peers(report, args.out.with_suffix(".png"))
    print(json.dumps(report))


def settle(args: argparse.Namespace) -> None:
    """Fill in what was not given."""
    quick = {"transformers": "bfloat16", "contexts": "1024", "context_seconds": 15.0, "rounds": 2}
    full = {"transformers": "bfloat16,float32", "contexts": "1024,4000", "context_seconds": 3600.0, "rounds": 3}
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.contexts = sorted(int(length) for length in args.contexts.split(",") if length)


def measure(name: str, dtype: str, path: str, args: argparse.Namespace, contexts: list[int]) -> dict[str, float]:
    """One engine's round, in a process of its own: tokens a second, seconds, bytes."""
    _C.set_num_threads(args.threads)
    chance = random.Random(0)

    def ids(count: int) -> list[int]:
        return [chance.randrange(60) for _ in range(count)]

    opener = {"hrmcore": open_hrmcore, "transformers": open_transformers, "llama.cpp": open_llama}[name]
    room = max([args.prefill, *contexts]) + args.tokens * (len(contexts) + 1) + 16
    figures: dict[str, float] = {}
    figures["load_seconds"], engine = timed(lambda: opener(dtype, path, args.threads, room))
    figures["first_token_seconds"], _ = timed(lambda: engine.start(ids(16)))
    engine.step()  # warm: pages touched, kernels chosen
    seconds, _ = timed(lambda: engine.start(ids(args.prefill)))
    figures["prefill"] = args.prefill / seconds
    held = args.prefill
    figures["decode"], figures["context"] = decode(engine, args.tokens), held + args.tokens / 2
    held += args.tokens
    figures["peak_bytes"] = (
        peak_bytes()
    )  # of a chat's length: before the long contexts, and the measurement's own memory
    for length in contexts:
        if length <= held or (length - held) / figures["prefill"] > args.context_seconds:
            continue
        while held < length:
            piece = min(512, length - held)
            engine.extend(ids(piece))
            held += piece
        figures[f"decode_{length}"] = decode(engine, args.tokens)
        figures[f"context_{length}"] = held + args.tokens / 2
        held += args.tokens
    figures["stream_gb_s"] = stream_gb_s()
    return figures


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def decode(engine: Opened, tokens: int) -> float:
    """Tokens a second, by the median step."""
    return 1 / statistics.median(timed(engine.step)[0] for _ in range(tokens))


def peak_bytes() -> int:
    """The most resident memory that this process has had; pages of mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bytes_a_token(config: HRMConfig, dtype: str, context: float) -> float:
    """Bytes that one decoded token must read: weights of every visit, head, keys and values of its context."""
    layer = config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    cached = 2 * config.cache_slots * config.attention_width * context
    return (config.cache_slots * layer * BITS[dtype] + head * HEAD_BITS[dtype]) / 8 + cached * kv_bytes(dtype)


def kv_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def summary(entries: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure over the rounds that have it, and the ranges."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    values = {key: [entry[key] for entry in entries if key in entry] for key in keys}
    medians = {key: statistics.median(found) for key, found in values.items()}
    return {**medians, "ranges": {key: [min(found), max(found)] for key, found in values.items()}}


def ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """hrmcore over llama.cpp of the same bits in decoding, and over the best peer in prefill: within each round."""
    found: dict[str, list[float]] = {}
    for ours, theirs in PAIRS.items():
        if ours in rounds and theirs in rounds:
            for mine, peer in zip(rounds[ours], rounds[theirs], strict=True):
                for key in mine.keys() & peer.keys():
                    if key.startswith("decode"):
                        found.setdefault(f"{key}: {ours} / {theirs}", []).append(mine[key] / peer[key])
    peers = [entries for engine, entries in rounds.items() if not engine.startswith("hrmcore")]
    if peers:
        best = [max(entry["prefill"] for entry in entries) for entries in zip(*peers, strict=True)]
        for engine, entries in rounds.items():
            if engine.startswith("hrmcore"):
                shares = [entry["prefill"] / top for entry, top in zip(entries, best, strict=True)]
                found[f"prefill: {engine} / best peer"] = shares
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in sorted(found.items())
    }


def print_tables(report: dict[str, Any]) -> None:
    """What a person reads."""
    columns = {
        "prefill": "prefill tok/s",
        "decode": "decode tok/s",
        "share": "of bandwidth",
        "stream_gb_s": "read GB/s",
    }
    columns |= {"load_seconds": "load s", "first_token_seconds": "first token s"}
    columns |= {key: key.replace("_", " at ") for line in report["lines"] for key in line if key.startswith("decode_")}
    for key, title in columns.items():
        print(title)
        for line in report["lines"]:
            if key in line:
                low, high = line["ranges"][key]
                print(f"  {line['engine']:24} {line[key]:9.3f}   {low:.3f} to {high:.3f}")
    print("peak memory, GB")
    for line in report["lines"]:
        print(f"  {line['engine']:24} {line['peak_bytes'] / 1e9:9.2f}")
    print("ratios within a round")
    for name, ratio in report["ratios"].items():
        print(f"  {name:52} {ratio['median']:6.2f}   {ratio['min']:.2f} to {ratio['max']:.2f}")


def open_hrmcore(dtype: str, path: str, threads: int, room: int) -> Opened:
    import numpy as np

    import hrmcore

    runner = hrmcore.load(path, dtype=dtype, threads=threads)._runner
    state: dict[str, Any] = {}

    def feed(ids: list[int]) -> None:
        logits = np.empty((1, runner.config.vocab_size), np.float32)
        runner.core.step([state["handle"]], [ids], logits, False)
        state["token"] = int(logits[0].argmax())

    def start(ids: list[int]) -> None:
        if "handle" in state:
            runner.close(state["handle"])
        state["handle"] = runner.core.open(len(ids))
        feed(ids)

    return Opened(start, feed, lambda: feed([state["token"]]))


def open_transformers(dtype: str, path: str, threads: int, room: int) -> Opened:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def forward(ids: torch.Tensor, **extra: Any) -> None:
        out = model(ids, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1, **extra)
        state["cache"], state["token"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def start(ids: list[int]) -> None:
        state.clear()
        forward(torch.tensor([ids]), token_type_ids=torch.ones(1, len(ids), dtype=torch.int64))

    return Opened(start, lambda ids: forward(torch.tensor([ids])), lambda: forward(state["token"]))


def open_llama(dtype: str, path: str, threads: int, room: int) -> Opened:
    import ctypes

    import llama_cpp
    import numpy as np

    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = room, 512, 512  # it takes the whole cache at once
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    state: dict[str, int] = {}

    def feed(ids: list[int]) -> None:
        for begin in range(0, len(ids), 512):
            piece = ids[begin : begin + 512]
            array = (llama_cpp.llama_token * len(piece))(*piece)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(piece))) != 0:
                raise RuntimeError("llama.cpp failed to decode")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        state["token"] = int(logits.argmax())

    def start(ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        feed(ids)

    return Opened(start, feed, lambda: feed([state["token"]]))


def _quiet() -> Any:
    try:
        import llama_cpp
    except ImportError:
        return None
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


_QUIET = _quiet()

if __name__ == "__main__":
    main()
