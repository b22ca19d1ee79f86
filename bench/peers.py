"""hrmcore, transformers and llama.cpp on the same checkpoint, alternating in one run: what else the machine does meets
all of them alike. Prefill of one prompt and greedy decoding of one sequence; the median of the rounds.

    python bench/peers.py CHECKPOINT --gguf bf16=model-bf16.gguf --gguf q8_0=model-q8_0.gguf --rounds 3

llama.cpp attends causally over the prompt, where the model was trained with a bidirectional prefix: its speed is
compared, not its answers. Engines are loaded and released in turn, because two copies of the weights may not fit.
Needs the extra `bench`. The last line printed is JSON; with --out it is written there, with a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import stream_gb_s

import hrmcore
from hrmcore import _C

Prefill = Callable[[list[int]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--gguf", action="append", default=[], metavar="NAME=FILE", help="for llama.cpp; may be repeated"
    )
    parser.add_argument("--dtypes", default="bfloat16,int8,int4", help="of hrmcore")
    parser.add_argument("--transformers", default="bfloat16,float32", help="its dtypes; empty leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt (256)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded after it (8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    engines = [("hrmcore", dtype, str(args.checkpoint)) for dtype in args.dtypes.split(",") if dtype]
    engines += [("transformers", dtype, str(args.checkpoint)) for dtype in args.transformers.split(",") if dtype]
    engines += [("llama.cpp", *entry.split("=", 1)) for entry in args.gguf]
    context = multiprocessing.get_context("spawn")
    rounds: dict[str, list[dict[str, float]]] = {f"{name} {dtype}": [] for name, dtype, _ in engines}
    for _ in range(args.rounds):
        for name, dtype, path in engines:
            with context.Pool(1) as pool:
                measured = pool.apply(measure, (name, dtype, path, args.threads, args.prefill, args.tokens))
            rounds[f"{name} {dtype}"].append(measured)
            print(f"{name} {dtype}: {measured}", flush=True)
    lines = [
        {"engine": engine, **{key: statistics.median(entry[key] for entry in entries) for key in entries[0]}}
        for engine, entries in rounds.items()
    ]
    print(f"{'engine':24} {'prefill tok/s':>14} {'decode tok/s':>13} {'read GB/s':>10}")
    for line in lines:
        print(f"{line['engine']:24} {line['prefill']:14.2f} {line['decode']:13.3f} {line['stream_gb_s']:10.1f}")
    report = {"checkpoint": args.checkpoint.name, "prefill": args.prefill, "threads": args.threads, "lines": lines}
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        from hrmcore import plots

        plots.peers(report, args.out.with_suffix(".png"))
    print(json.dumps(report))


def measure(name: str, dtype: str, path: str, threads: int, prefill: int, tokens: int) -> dict[str, float]:
    """Tokens a second of one engine, and the bandwidth of the same minute."""
    torch.set_num_threads(threads)
    _C.set_num_threads(threads)
    bandwidth = stream_gb_s()
    start, step = {"hrmcore": open_hrmcore, "transformers": open_transformers, "llama.cpp": open_llama}[name](
        dtype, path, threads
    )
    chance = random.Random(0)
    start([chance.randrange(1000) for _ in range(32)])  # warm: pages touched, kernels chosen
    step()
    prompt = [chance.randrange(1000) for _ in range(prefill)]
    started = time.perf_counter()
    start(prompt)
    prefilled = time.perf_counter()
    times = []
    for _ in range(tokens):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {
        "prefill": prefill / (prefilled - started),
        "decode": 1 / statistics.median(times),
        "stream_gb_s": bandwidth,
    }


def open_hrmcore(dtype: str, path: str, threads: int) -> tuple[Prefill, Callable[[], None]]:
    runner = hrmcore.load(path, dtype=dtype, threads=threads)._runner
    state: dict[str, Any] = {}

    def start(ids: list[int]) -> None:
        if "handle" in state:
            runner.close(state["handle"])
        (state["handle"],), logits = runner.open([ids], [len(ids)])
        state["token"] = int(logits[0].argmax())

    def step() -> None:
        state["token"] = int(runner.step([state["handle"]], [state["token"]])[0].argmax())

    return start, step


def open_transformers(dtype: str, path: str, threads: int) -> tuple[Prefill, Callable[[], None]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def forward(ids: torch.Tensor, **extra: Any) -> None:
        out = model(ids, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1, **extra)
        state["cache"], state["token"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def start(ids: list[int]) -> None:
        state.clear()
        forward(torch.tensor([ids]), token_type_ids=torch.ones(1, len(ids), dtype=torch.int64))

    def step() -> None:
        forward(state["token"])

    return start, step


def open_llama(dtype: str, path: str, threads: int) -> tuple[Prefill, Callable[[], None]]:
    import ctypes

    import llama_cpp
    import numpy as np

    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    state: dict[str, int] = {}

    def feed(ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))) != 0:
            raise RuntimeError("llama.cpp failed to decode")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        state["token"] = int(logits.argmax())

    def start(ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        feed(ids)

    def step() -> None:
        feed([state["token"]])

    return start, step


def _quiet() -> Any:
    try:
        import llama_cpp
    except ImportError:
        return None
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


_QUIET = _quiet()

if __name__ == "__main__":
    main()
