"""Servers on the same weights, in turns: `hrmcore serve`, llama.cpp's (llama-cpp-python's) and `transformers serve`.

    python -m bench.speed.serve CHECKPOINT --gguf model-q8_0.gguf --dtype int8 --out bench/serve
    python -m bench.speed.serve CHECKPOINT --transformers FOLDER --callers 1,4,16 --out bench/serve
    python -m bench.speed.serve CHECKPOINT --gguf model-q8_0.gguf --callers 16 --seconds 10 --out bench/serve

Callers ask in a closed loop: each sends its next question as soon as its last answer is complete. The questions are
reasoning-gym's, of 20 to 800 tokens, evenly spread over the logarithm of their length, and none comes twice before all
have come: its prefill would be there already. Answers are of 16 to 128 tokens, greedy. Each number of callers is
measured in turns: every server for so many seconds, there and back. All servers stand meanwhile, in processes of their
own, with the same number of threads; who asks shares the processors with them. The first seconds of a turn do not count
(--warm): make them long enough for all callers' first prompts to be read, or else it is their reading that is measured.

The work is the same only where no answer ends early: give a checkpoint that never answers with a control token, and a
GGUF of it that holds its tokenizer; servers that count other tokens in a prompt are refused. A piece of text counts as
one token until its answer is complete, which then says how many tokens its pieces were. llama.cpp attends causally over
the prompt, and llama-cpp-python's server answers one request after the other. transformers takes a folder with the same
weights and a tokenizer.json, in bfloat16. Needs the extras `serve`, `demo` and `bench`, llama-cpp-python[server], and
transformers[serving].

With --out, OUT.json keeps what earlier calls found for other numbers of callers; OUT.png and OUT.md are made from all.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hrmcore import _C, plots
from hrmcore.machine import processor
from hrmcore.tokenizer import Tokenizer

TASKS = (
    *("spell_backward", "chain_sum", "gcd", "letter_counting", "basic_arithmetic", "number_sorting", "countdown"),
    *("mini_sudoku", "spiral_matrix", "rotate_matrix", "binary_matrix", "family_relationships", "zebra_puzzles"),
    *("number_filtering", "word_sorting", "syllogism", "letter_jumble", "game_of_life", "string_insertion"),
)
SHORTEST, LONGEST, BINS = 20, 800, 12
ANSWERS = (16, 32, 64, 128)
FRAMED = "<boq><direct>{}<eoq>"


@dataclass
class Server:
    """One server: its name in tables, how it is started, what is put around a question, seconds until it listens."""

    name: str
    command: list[str]
    port: int
    framed: str = "{}"
    patience: float = 120.0
    environment: dict[str, str] = field(default_factory=dict)
    asked: Iterator[int] = field(default_factory=itertools.count)  # goes on from turn to turn: answers are kept

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start it, wait until it listens, end it."""
        environment = {**os.environ, **self.environment}
        with tempfile.TemporaryFile("w+") as said:  # a pipe would be full one day
            process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
            try:
                self._wait(process, said)
                yield
            finally:
                process.terminate()
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], said: IO[str]) -> None:
        end = time.perf_counter() + self.patience
        while time.perf_counter() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if process.poll() is not None:
                said.seek(0)
                raise SystemExit(f"{self.name} has ended: {said.read()[-2000:]}")
            time.sleep(0.1)
        raise SystemExit(f"{self.name} does not listen after {self.patience:.0f} seconds")


@dataclass
class Answer:
    """One answer: when it was asked for, when its pieces came, how many tokens it was to be, whether it is complete."""

    asked: float
    tokens: int
    pieces: list[float] = field(default_factory=list)
    complete: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp, with the tokenizer")
    parser.add_argument("--transformers", type=Path, help="the same weights for transformers, with a tokenizer.json")
    parser.add_argument("--dtype", default="int8", help="of hrmcore (int8)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--callers", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=10.0, help="a server and turn (10)")
    parser.add_argument("--warm", type=float, default=2.0, help="seconds before those (2)")
    parser.add_argument("--turns", type=int, default=2, help="of each server (2)")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    args = parser.parse_args()
    questions = mix(Tokenizer.load(args.checkpoint))
    report = read_report(args)
    with contextlib.ExitStack() as stack:
        servers = list(servers_of(args))
        for server in servers:
            stack.enter_context(server.running())
        check_prompts(servers, questions[:8])
        for callers in map(int, args.callers.split(",")):
            report["cells"][str(callers)] = measure(servers, questions, callers, args)
            print(json.dumps({callers: report["cells"][str(callers)]}), flush=True)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(report))
        plots.bars(picture(report), args.out.with_suffix(".png"))
    print(table(report))


def servers_of(args: argparse.Namespace) -> Iterator[Server]:
    """Those that are compared."""
    port, threads = free_port(), str(args.threads)
    command = [sys.executable, "-m", "hrmcore", "serve", "--model", str(args.checkpoint), "--dtype", args.dtype]
    yield Server("hrmcore", [*command, "--threads", threads, "--port", str(port)], port)
    if args.gguf is not None:
        port = free_port()
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(args.gguf), "--port", str(port)]
        command += ["--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads]
        command += ["--interrupt_requests", "False", "--verbose", "False"]
        yield Server("llama.cpp", command, port, FRAMED)
    if args.transformers is not None:
        port = free_port()
        command = [shutil.which("transformers") or "transformers", "serve", str(args.transformers), "--device", "cpu"]
        command += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
        yield Server("transformers", command, port, FRAMED, 600.0, {"OMP_NUM_THREADS": threads})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def mix(tokenizer: Tokenizer) -> list[str]:
    """Questions whose lengths are spread evenly over bins of the logarithm, in a drawn order."""
    import reasoning_gym

    bins: list[list[str]] = [[] for _ in range(BINS)]
    for task in TASKS:
        for entry in reasoning_gym.create_dataset(task, size=60, seed=0):
            length = len(tokenizer.prompt(entry["question"]))
            if SHORTEST <= length < LONGEST:
                place = math.log(length / SHORTEST) / math.log(LONGEST / SHORTEST)
                bins[int(BINS * place)].append(entry["question"])
    chance = random.Random(0)
    for questions in bins:
        chance.shuffle(questions)
    filled = [questions for questions in bins if questions]
    return [questions[turn % len(questions)] for turn in range(60) for questions in chance.sample(filled, len(filled))]


def check_prompts(servers: Sequence[Server], questions: Sequence[str]) -> None:
    """Raise SystemExit where the servers read a question as different numbers of tokens: their work would differ."""
    for question in questions:
        counts = {server.name: prompt_tokens(server, question) for server in servers}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the servers have other tokenizers: {counts} tokens in {question[:80]!r}")


def prompt_tokens(server: Server, question: str) -> int:
    """How many tokens a server counts in a question."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    fields = {"prompt": server.framed.format(question), "temperature": 0, "max_tokens": 1}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
        count: int = json.loads(connection.getresponse().read())["usage"]["prompt_tokens"]
        return count


def measure(servers: Sequence[Server], questions: Sequence[str], callers: int, args: argparse.Namespace) -> Any:
    """What each server did for so many callers: there and back, the turns of each together."""
    turns: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for turn in range(args.turns):
        for server in servers[:: 1 if turn % 2 == 0 else -1]:
            turns[server.name].append(call(server, questions, callers, args.warm, args.seconds))
    return {name: summary(found) for name, found in turns.items()}


def call(server: Server, questions: Sequence[str], callers: int, warm: float, seconds: float) -> dict[str, Any]:
    """One turn: callers ask until the time is up; what came in its last `seconds` counts."""
    start = time.perf_counter() + warm
    end = start + seconds
    answers: list[Answer] = []

    def caller() -> None:
        while time.perf_counter() < end:
            number = next(server.asked)
            fields = {"prompt": server.framed.format(questions[number % len(questions)]), "temperature": 0}
            answer = Answer(time.perf_counter(), ANSWERS[number % len(ANSWERS)])
            answers.append(answer)
            ask(server, {**fields, "max_tokens": answer.tokens, "stream": True}, answer, end)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(server)
    return counted(answers, start, end)


def settle(server: Server) -> None:
    """Wait until the server is through with what was left, so that the next turn is another's alone."""
    fields = {"prompt": server.framed.format("?"), "temperature": 0, "max_tokens": 1, "stream": True}
    ask(server, fields, Answer(0.0, 1), time.perf_counter() + 600)


def ask(server: Server, fields: dict[str, Any], answer: Answer, end: float) -> None:
    """Read one answer until it is complete, or the time is up."""
    patience = max(0.1, end - time.perf_counter())  # one that is not begun by then is left
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=patience)
    with contextlib.suppress(TimeoutError), contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
        read(server, connection.getresponse(), answer, end)


def read(server: Server, response: http.client.HTTPResponse, answer: Answer, end: float) -> None:
    """Note when the pieces of an answer come."""
    if response.status != 200:
        raise RuntimeError(f"{server.name}: {response.status} {response.read()[:500]!r}")
    for line in response:
        now = time.perf_counter()
        if now >= end:
            break
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            if choice.get("text"):
                answer.pieces.append(now)
            if reason := choice.get("finish_reason"):
                if reason != "length":
                    raise RuntimeError(
                        f"{server.name}: an answer ended early: {choice}; the work would not be the same"
                    )
                answer.complete = True


def counted(answers: Sequence[Answer], start: float, end: float) -> dict[str, Any]:
    """Of one turn: tokens a second, seconds to each first piece, and between pieces."""
    done = [answer for answer in answers if answer.complete and answer.pieces]
    pieces = sum(len(answer.pieces) for answer in done)
    a_piece = sum(answer.tokens for answer in done) / pieces if pieces else 1.0
    tokens = 0.0
    for answer in answers:
        inside = sum(start <= piece < end for piece in answer.pieces)
        tokens += inside * (answer.tokens / len(answer.pieces) if answer.complete and answer.pieces else a_piece)
    begun = [answer for answer in answers if answer.pieces and answer.pieces[0] >= start]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer.pieces) if a >= start]
    return {
        "tokens_a_second": tokens / (end - start),
        "first": [answer.pieces[0] - answer.asked for answer in begun],
        "gaps": gaps,
        "complete": len(done),
    }


def summary(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All turns of a server: medians, and the 99th percentiles of what was pooled."""
    speeds = [turn["tokens_a_second"] for turn in turns]
    found: dict[str, Any] = {"tokens_a_second": statistics.median(speeds), "turns": speeds}
    for name in ("first", "gaps"):
        seconds = sorted(itertools.chain.from_iterable(turn[name] for turn in turns))
        found[name] = {"n": len(seconds), "median": at(seconds, 0.5), "p99": at(seconds, 0.99)}
    return {**found, "complete": sum(turn["complete"] for turn in turns)}


def at(ordered: Sequence[float], share: float) -> float | None:
    """A quantile of ordered values: the nearest rank; None of none."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else None


def read_report(args: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls found, where they were of the same kind."""
    kind = {"checkpoint": args.checkpoint.name, "dtype": args.dtype, "threads": args.threads}
    kind |= {"gguf": args.gguf.name if args.gguf else None, "processor": processor(), "isa": _C.isa()}
    path = args.out.with_suffix(".json") if args.out else None
    if path is not None and path.is_file():
        report: dict[str, Any] = json.loads(path.read_text())
        if all(report.get(name) == value for name, value in kind.items()):
            return report
    return {**kind, "cells": {}}


def table(report: dict[str, Any]) -> str:
    """What a person reads, as markdown."""
    head = (
        "| callers | server | tokens/s | first token, ms: median (p99) | between tokens, ms: median (p99) | answers |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for callers, servers in sorted(report["cells"].items(), key=lambda cell: int(cell[0])):
        for name, found in servers.items():
            first, gaps = (f"{ms(found[key]['median'])} ({ms(found[key]['p99'])})" for key in ("first", "gaps"))
            speed = f"{found['tokens_a_second']:.0f}"
            lines.append(f"| {callers} | {name} | {speed} | {first} | {gaps} | {found['complete']} |")
    return "\n".join([*lines, ""])


def ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1000 * seconds:.3g}"


def picture(report: dict[str, Any]) -> dict[str, Any]:
    """The report as `hrmcore.plots.bars` draws it."""
    cells = sorted(report["cells"].items(), key=lambda cell: int(cell[0]))
    named = [
        (f"{callers} caller{'' if callers == '1' else 's'}, {name}", name, found)
        for callers, cell in cells
        for name, found in cell.items()
    ]

    def rows(value: Any) -> list[dict[str, Any]]:
        return [{"name": text, "median": value(found), "ours": name == "hrmcore"} for text, name, found in named]

    panels = [
        {"label": "tokens a second", "text": "{:.0f}", "rows": rows(lambda found: found["tokens_a_second"])},
        {
            "label": "ms to the first token",
            "text": "{:.0f}",
            "rows": rows(lambda f: 1000 * (f["first"]["median"] or 0)),
        },
        {"label": "ms between tokens, p99", "text": "{:.0f}", "rows": rows(lambda f: 1000 * (f["gaps"]["p99"] or 0))},
    ]
    conditions = f"{report['checkpoint']}, {report['dtype']} beside {report['gguf']}, {report['threads']} threads, "
    return {"title": "Servers on the same weights", "conditions": conditions + report["processor"], "panels": panels}


if __name__ == "__main__":
    main()
