"""Eight threads, an event loop and the main thread share one engine, and close each other's answers.

    python tests/soak/crowd.py SECONDS

Answers are closed by whoever reads them, by other threads, by the garbage collector wherever it runs, and by a signal's
handler, which runs inside the main thread's steps. Every token must be the one that its request gets alone. Prints
JSON: how often each kind of thing was done, and `wrong`; the exit status is 1 when an answer was wrong or something is
still held. It goes on, up to a minute, until everything has happened once; two minutes later
every thread's stack is printed and it ends. tests/engine/test_stress.py
runs some seconds of it, `make tsan` five minutes under ThreadSanitizer, for which this file stays clear of torch.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import faulthandler
import gc
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hrmcore.checkpoint.hrm_text import key_table
from hrmcore.config import HRMConfig
from hrmcore.engine.async_engine import AsyncAnswer, AsyncEngine
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import EMBEDDED_MODEL, Engine
from hrmcore.engine.streams import Tokens
from hrmcore.tokenizer import Tokenizer

THREADS = 8
CALLERS = 6  # tasks on the event loop
LONG = 400  # tokens: a prefill that a signal comes into
KINDS = {
    *("whole", "text", "half", "closed by another", "close of another's", "with signals"),
    *("close by a handler", "closed by the collector", "awaited", "cancelled", "late", "abandoned"),
}
MOST_LONGER = 60  # seconds that a busy machine gets for the first of each kind


class Crowd:
    """One engine, what each request gets alone, and the answers that are on their way."""

    def __init__(self) -> None:
        tokenizer = Tokenizer.load(EMBEDDED_MODEL)
        config = HRMConfig(tokenizer.vocab_size, 40, 56, 1, 2, 16, H_cycles=2, L_cycles=2, max_position_embeddings=512)
        self.runner = CpuRunner(config, "int8", "int8", 2, cache_bytes=1 << 26)
        self.runner.core.allocate_weights()
        draw = np.random.default_rng(0)
        for key in key_table(config):
            self.runner.core.set_weight(key.name, draw.normal(scale=0.2, size=key.shape).astype(np.float32))
        self.engine = Engine(self.runner, tokenizer, EMBEDDED_MODEL)
        chance = random.Random(1)
        self.requests: list[dict[str, Any]] = []
        for seed in range(24):
            ids = [chance.randrange(config.vocab_size) for _ in range(LONG if seed < 4 else chance.randint(1, 70))]
            prefix = chance.choice([0, len(ids), len(ids) // 2])
            sampling = chance.choice(
                [{}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "top_p": 0.9, "seed": seed}]
            )
            self.requests.append({"ids": ids, "prefix_length": prefix, "max_new_tokens": 1 + seed % 12, **sampling})
        self.texts = [f"Spell this word backward: {'lantern ' * (1 + n)}" for n in range(8)]
        self.alone = [list(self.engine.tokens(**request)) for request in self.requests]
        self.spoken = [self.engine.generate(text, max_new_tokens=8) for text in self.texts]
        self.count: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.under_way: list[Tokens] = []  # appended and popped by anyone: one operation each
        self._until = 0.0

    def over(self) -> bool:
        """Whether the time is up, and everything has happened at least once."""
        late = time.monotonic() - self._until
        return late > 0 and (late > MOST_LONGER or set(self.count) >= KINDS or bool(self.wrong))

    def check(self, kind: str, good: bool, found: object = None) -> None:
        self.count[kind] += 1
        if not good:
            self.wrong.append(f"{kind}: {found}")

    def whole(self, chance: random.Random) -> None:
        """An answer that nobody disturbs."""
        index = chance.randrange(len(self.requests))
        found = list(self.engine.tokens(**self.requests[index]))
        self.check("whole", found == self.alone[index], (index, found))

    def text(self, chance: random.Random) -> None:
        """Several texts in one batch."""
        picked = chance.sample(range(len(self.texts)), 3)
        found = self.engine.generate([self.texts[index] for index in picked], max_new_tokens=8)
        self.check("text", found == [self.spoken[index] for index in picked], found)

    def half(self, chance: random.Random) -> None:
        """An answer whose reader leaves."""
        index = chance.randrange(len(self.requests))
        tokens, found = self.engine.tokens(**self.requests[index]), []
        for token in tokens:
            found.append(token)
            if chance.random() < 0.3:
                break
        tokens.close()
        self.check("half", found == self.alone[index][: len(found)], (index, found))

    def disturbed(self, chance: random.Random) -> None:
        """An answer that others may close."""
        index = chance.randrange(len(self.requests))
        tokens = self.engine.tokens(**self.requests[index])
        self.under_way.append(tokens)
        found = list(tokens)
        closed = tokens.request.finish == "closed"
        expected = self.alone[index][: len(found)] if closed else self.alone[index]
        self.check("closed by another" if closed else "disturbed", found == expected, (index, found))

    def close_one(self, kind: str) -> None:
        """Close an answer of somebody else."""
        with contextlib.suppress(IndexError):
            self.under_way.pop(0).close()
            self.count[kind] += 1

    def handle(self) -> None:
        """The signal's handler; one answer is left for the threads to close."""
        if len(self.under_way) > 1:
            self.close_one("close by a handler")

    def forget(self, chance: random.Random) -> None:
        """Drop an answer that has begun, in a cycle that only the garbage collector frees."""
        cycle: list[object] = []
        tokens = self.engine.tokens(**self.requests[chance.randrange(len(self.requests))])
        next(tokens, None)
        cycle += [cycle, tokens, Finalised(self.count)]

    def call(self, seed: int) -> None:
        """What one thread does until the time is up."""
        chance = random.Random(seed)
        kinds: list[Callable[[random.Random], None]] = [self.whole, self.text, self.half, self.disturbed, self.forget]
        while not self.over():
            try:
                chance.choice(kinds)(chance)
                if chance.random() < 0.3:
                    self.close_one("close of another's")
            except BaseException as error:
                self.wrong.append(repr(error))
                return

    def loop(self) -> None:
        """The event loop's thread."""
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.wrong.append(f"loop: {error!r}")

    async def _serve(self) -> None:
        async with AsyncEngine(self.engine, max_queue=64) as served:
            await asyncio.gather(*(self._ask(served, random.Random(seed)) for seed in range(CALLERS)))
            while served.open_answers:
                gc.collect()
                await asyncio.sleep(0.01)

    async def _ask(self, served: AsyncEngine, chance: random.Random) -> None:
        while not self.over():
            index = chance.randrange(len(self.texts))
            kind = chance.choice(["awaited", "cancelled", "late", "abandoned"])
            task = asyncio.ensure_future(self._read(served, index, kind, chance))
            if kind == "cancelled":
                await asyncio.sleep(chance.random() / 20)
                task.cancel()
            try:
                found = await task
                whole = self.spoken[index]
                self.check(kind, found == whole if kind == "awaited" else whole.startswith(found), found)
            except (asyncio.CancelledError, TimeoutError):
                self.check(kind, kind in ("cancelled", "late"))

    async def _read(self, served: AsyncEngine, index: int, kind: str, chance: random.Random) -> str:
        timeout = chance.uniform(0.001, 0.1) if kind == "late" else None
        answer: AsyncAnswer = served.stream(self.texts[index], max_new_tokens=8, timeout=timeout)
        found = ""
        async for piece in answer:
            found += piece
            if kind == "abandoned":
                cycle: list[object] = []
                cycle += [cycle, answer, Finalised(self.count)]
                break
        return found

    def run(self, seconds: float) -> dict[str, Any]:
        """All of them at once; the main thread makes long prefills, into which signals come."""
        self._until = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, lambda *_: self.handle())
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        gc.set_threshold(200, 2, 2)
        threads = [threading.Thread(target=self.call, args=(seed,)) for seed in range(THREADS)]
        threads.append(threading.Thread(target=self.loop))
        for thread in threads:
            thread.start()
        chance = random.Random(99)
        while not self.over():
            index = chance.randrange(4)
            found = list(self.engine.tokens(**self.requests[index]))
            self.check("with signals", found == self.alone[index], (index, found))
        for thread in threads:
            thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.under_way.clear()
        gc.collect()
        self.engine._prefills.shrink(0)
        held = (self.engine.open_requests, self.runner.core.cache_pages_used)
        if held != (0, 0):
            self.wrong.append(f"{held[0]} requests and {held[1]} pages are still held")
        self.wrong += [f"never happened: {kind}" for kind in sorted(KINDS - set(self.count))]
        return {"counts": dict(self.count), "wrong": self.wrong[:10]}


class Finalised:
    """Counts what the garbage collector freed together with it."""

    def __init__(self, count: collections.Counter[str]) -> None:
        self._count = count

    def __del__(self) -> None:
        self._count["closed by the collector"] += 1


def main(seconds: float) -> int:
    """Run, and print the report."""
    faulthandler.dump_traceback_later(seconds + MOST_LONGER + 120, exit=True)
    report = Crowd().run(seconds)
    print(json.dumps(report))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
