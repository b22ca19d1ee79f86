"""hrmcore, transformers and llama.cpp on the same checkpoint, in turns of seconds: what else the machine does meets all
of them alike. Each engine is loaded in a process of its own and waits there for its turns.

    python -m bench.speed.peers CHECKPOINT --gguf bf16=model-bf16.gguf --gguf q8_0=model-q8_0.gguf --out bench/peers
    python -m bench.speed.peers CHECKPOINT --gguf … --quick

First each engine alone: loading, the first token of a short prompt after it, peak resident memory. Then turns of
prefill and turns of greedy decoding; in a turn every engine runs there and back, between two plain reads of the memory
where it decodes, and ratios are taken within a turn. Prefill turns after the first leave out a peer that takes twice as
long as the best. Last, decoding after longer contexts, once. --quick makes fewer turns, with one transformers, and
contexts to 1,024. All engines stand in memory together: some 16 GB for the 1B in three dtypes beside their peers, 6 GB
more with transformers in float32.

The share of the bandwidth counts what a token must read: the weights of every visit, the head, and the keys and values
of its context. llama.cpp attends causally over the prompt, where the model was trained with a bidirectional prefix:
speed is compared, not answers. Needs the extra `bench`. The last line printed is JSON; --out writes it with a picture
beside it.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from bench.intervals import median_with_interval
from bench.speed.decode import StreamRead, bytes_a_token
from hrmcore import _C
from hrmcore.checkpoint.hrm_text import read_config
from hrmcore.config import HRMConfig

PAIRS = {"hrmcore bfloat16": "llama.cpp bf16", "hrmcore int8": "llama.cpp q8_0", "hrmcore int4": "llama.cpp q4_0"}

Turns = dict[str, list[dict[str, float]]]  # by engine, what each turn found


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
    parser.add_argument("--tokens", type=int, default=3, help="decoded at a time (3)")
    parser.add_argument("--turns", type=int, help="(12)")
    parser.add_argument("--quick", action="store_true", help="fewer of everything that is not given")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    settle(args)
    config = read_config(args.checkpoint)
    names = [("hrmcore", dtype, str(args.checkpoint)) for dtype in args.dtypes.split(",") if dtype]
    names += [("transformers", dtype, str(args.checkpoint)) for dtype in args.transformers.split(",") if dtype]
    names += [("llama.cpp", *entry.split("=", 1)) for entry in args.gguf]
    engines = [Engine(name, dtype, path, args, config) for name, dtype, path in names]
    prefills, decodes = measure(engines, args)
    lines = []
    for engine in engines:
        line = {"engine": engine.title, **engine.alone}
        line |= summary(prefills[engine.title]) | summary(decodes[engine.title])
        lines.append(line | long_contexts(engine, args, line["prefill"]["median"]))
        engine.stop()
    report = {"checkpoint": args.checkpoint.name, "threads": args.threads, "prefill": args.prefill}
    report |= {"turns": args.turns, "lines": lines, "ratios": ratios(prefills, decodes)}
    print_tables(report)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        from hrmcore import plots

        plots.peers(report, args.out.with_suffix(".png"))
    print(json.dumps(report))


def settle(args: argparse.Namespace) -> None:
    """Fill in what was not given."""
    quick = {"transformers": "bfloat16", "contexts": "1024", "context_seconds": 15.0, "turns": 6}
    full = {"transformers": "bfloat16,float32", "contexts": "1024,4000", "context_seconds": 3600.0, "turns": 12}
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.contexts = sorted(int(length) for length in args.contexts.split(",") if length)


class Engine:
    """One engine in a process of its own, which does what it is asked and says how long it took."""

    def __init__(self, name: str, dtype: str, path: str, args: argparse.Namespace, config: HRMConfig) -> None:
        self.title, self.dtype, self.config = f"{name} {dtype}", dtype, config
        self.held = args.prefill  # tokens of its sequence
        most = max([args.prefill, *args.contexts])
        room = most + args.tokens * (2 * args.turns + len(args.contexts) + 1) + 16
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(name, dtype, path, args.threads, room, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.alone = {"load_seconds": self.ask("load"), "first_token_seconds": self.ask("start", 16)}
        self.ask("steps", 1)  # warm: pages touched, kernels chosen
        self.ask("start", args.prefill)
        self.ask("steps", args.tokens)
        self.alone["peak_bytes"] = self.ask("peak")  # of a chat's length, before the long contexts
        print(f"{self.title}: {json.dumps(self.alone)}", flush=True)

    def ask(self, request: str, tokens: int = 0) -> float:
        self.connection.send((request, tokens))
        try:
            return float(self.connection.recv())
        except EOFError:
            raise SystemExit(f"{self.title} has ended in the middle of {request!r}") from None

    def stop(self) -> None:
        self.connection.close()
        self.process.join()

    def prefill(self, tokens: int) -> dict[str, float]:
        self.held = tokens
        return {"prefill": tokens / self.ask("start", tokens)}

    def decode(self, tokens: int, stream: StreamRead) -> dict[str, float]:
        before = stream.gb_s()
        speed = 1 / self.ask("steps", tokens)
        bandwidth = (before + stream.gb_s()) / 2
        needed = bytes_a_token(self.config, self.dtype)
        needed += cached_bytes(self.config, self.dtype, self.held + tokens / 2)
        self.held += tokens
        return {"decode": speed, "stream_gb_s": bandwidth, "share": speed * needed / bandwidth / 1e9}


def serve(name: str, dtype: str, path: str, threads: int, room: int, connection: Connection) -> None:
    """Answers each request with its seconds (peak: with bytes), until the other side hangs up."""
    _C.set_num_threads(threads)
    chance = random.Random(0)
    opener = {"hrmcore": open_hrmcore, "transformers": open_transformers, "llama.cpp": open_llama}[name]
    connection.recv()
    seconds, engine = timed(lambda: opener(dtype, path, threads, room))
    connection.send(seconds)
    while True:
        try:
            request, tokens = connection.recv()
        except EOFError:
            return
        ids = [chance.randrange(60) for _ in range(tokens)]
        if request == "peak":
            connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # mapped pages count
        elif request == "steps":
            connection.send(statistics.median(timed(engine.step)[0] for _ in ids))
        else:
            call = engine.start if request == "start" else engine.extend
            connection.send(timed(lambda call=call, ids=ids: call(ids))[0])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def measure(engines: list[Engine], args: argparse.Namespace) -> tuple[Turns, Turns]:
    """The turns of prefill and of decoding."""
    prefills: Turns = {engine.title: [] for engine in engines}
    decodes: Turns = {engine.title: [] for engine in engines}
    stream = StreamRead(args.threads)
    for _ in range(args.turns):
        there_and_back(engines, lambda engine: engine.decode(args.tokens, stream), decodes)
    taking_part = engines
    for _ in range(args.turns):
        there_and_back(taking_part, lambda engine: engine.prefill(args.prefill), prefills)
        peers = [turns[0]["prefill"] for title, turns in prefills.items() if not title.startswith("hrmcore")]
        best = max(peers, default=0)
        taking_part = [
            engine
            for engine in engines
            if engine.title.startswith("hrmcore") or prefills[engine.title][0]["prefill"] > best / 2
        ]
    return prefills, decodes


def there_and_back(engines: list[Engine], call: Callable[[Engine], dict[str, float]], turns: Turns) -> None:
    """One turn: each engine twice, the second time in the reverse order; the mean of both goes to its turns."""
    there = [call(engine) for engine in engines]
    back = [call(engine) for engine in reversed(engines)]
    for engine, first, second in zip(engines, there, reversed(back), strict=True):
        turns[engine.title].append({key: (first[key] + second[key]) / 2 for key in first})
        print(f"{engine.title}: {json.dumps(turns[engine.title][-1])}", flush=True)


def long_contexts(engine: Engine, args: argparse.Namespace, prefill: float) -> dict[str, float]:
    """Tokens a second after each longer context, as far as it is reached in time."""
    found: dict[str, float] = {}
    for length in args.contexts:
        if length <= engine.held or (length - engine.held) / prefill > args.context_seconds:
            continue
        while engine.held < length:
            piece = min(512, length - engine.held)
            engine.ask("extend", piece)
            engine.held += piece
        found[f"decode_{length}"] = 1 / engine.ask("steps", args.tokens)
        engine.held += args.tokens
    return found


def cached_bytes(config: HRMConfig, dtype: str, context: float) -> float:
    """Bytes of keys and values that one decoded token must read: bfloat16 or float16 beside all but float32."""
    return 2 * config.cache_slots * config.attention_width * context * (4 if dtype == "float32" else 2)


def summary(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: median_with_interval([turn[key] for turn in turns]) for key in turns[0]}


def ratios(prefills: Turns, decodes: Turns) -> dict[str, dict[str, float]]:
    """hrmcore over llama.cpp of the same bits in decoding, and over the best peer in prefill: within each turn."""
    found: dict[str, list[float]] = {}
    for ours, theirs in PAIRS.items():
        if ours in decodes and theirs in decodes:
            pairs = zip(decodes[ours], decodes[theirs], strict=True)
            found[f"decode: {ours} / {theirs}"] = [mine["decode"] / peer["decode"] for mine, peer in pairs]
    peers = [turns for title, turns in prefills.items() if not title.startswith("hrmcore")]
    for title, turns in prefills.items():
        if peers and title.startswith("hrmcore"):
            best = [max(peer[i]["prefill"] for peer in peers if i < len(peer)) for i in range(len(turns))]
            found[f"prefill: {title} / best peer"] = [
                turn["prefill"] / top for turn, top in zip(turns, best, strict=True)
            ]
    return {name: median_with_interval(values) for name, values in sorted(found.items())}


def print_tables(report: dict[str, Any]) -> None:
    """What a person reads."""
    columns = {"prefill": "prefill tok/s", "decode": "decode tok/s", "share": "of bandwidth", "stream_gb_s": "GB/s"}
    for key, title in columns.items():
        print(f"{title}: median of the turns, its 95% interval")
        for line in report["lines"]:
            print(f"  {line['engine']:24} {spread(line[key])}")
    columns = {"load_seconds": "load s", "first_token_seconds": "first token s", "peak_bytes": "peak bytes"}
    columns |= {key: key.replace("_", " at ") for line in report["lines"] for key in line if key.startswith("decode_")}
    for key, title in columns.items():
        print(title)
        for line in report["lines"]:
            if key in line:
                print(f"  {line['engine']:24} {line[key]:9.4g}")
    print("ratios within a turn")
    for name, ratio in report["ratios"].items():
        print(f"  {name:52} {spread(ratio)}")


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:9.3f}   {found['low']:.3f} to {found['high']:.3f}"


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
