"""Callers at a server for a while: a third hang up, some read slowly, some send what is wrong.

usage: PYTHONPATH=tests python -m soak.serving [SECONDS [CALLERS]]

Prints JSON: how many requests of each kind, wrong answers, and the process's memory in MB after each fifth of the time.
Leaves with status 1 when an answer was wrong or a request is stuck.
"""

from __future__ import annotations

import collections
import http.client
import json
import random
import resource
import sys
import threading
import time
from typing import Any

from support.served import Served, serving

import hrmcore
from hrmcore.serving.app import MOST_BODY

CHAT = "/v1/chat/completions"
QUESTIONS = [f"Spell this word backward (example: sun -> nus): {word}" for word in ("lantern", "tree", "stone")]
QUESTIONS += ["State the final answer to the following arithmetic problem: 29 + 36 =", "<eoq> what <eoa> is <boq>"]
LONG = "Spell this word backward (example: sun -> nus): " + "lantern " * 60


def resident() -> float:
    """MB of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return round(int(file.read().split()[1]) * resource.getpagesize() / 1e6, 1)


class Caller:
    """One caller, who asks until the time is up."""

    def __init__(self, served: Served, expected: list[str], seed: int, until: float) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._served, self._expected, self._until = served, expected, until
        self._draw = random.Random(seed)

    def run(self) -> None:
        kinds = [self.ask, self.hang_up, self.mistake, self.ask, self.hang_up, self.read_slowly]
        while time.monotonic() < self._until:
            kind = self._draw.choice(kinds)
            try:
                kind()
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
            self.count[kind.__name__] += 1

    def ask(self) -> None:
        number = self._draw.randrange(len(QUESTIONS))
        status, content = self._served.ask(messages=[{"role": "user", "content": QUESTIONS[number]}], max_tokens=20)
        self.check(status, [200, 429], content)
        if status == 200 and content["choices"][0]["message"]["content"] != self._expected[number]:
            self.wrong.append(f"{QUESTIONS[number]}: {content}")

    def hang_up(self) -> None:
        fields = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 500, "temperature": 1.0}
        connection = self.begin({**fields, "stream": self._draw.random() < 0.5, "n": self._draw.randrange(1, 3)})
        time.sleep(self._draw.random() / 2)
        connection.close()

    def read_slowly(self) -> None:
        fields = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 60, "stream": True}
        connection = self.begin(fields)
        response = connection.getresponse()
        self.check(response.status, [200, 429], None)
        while response.read(400):
            time.sleep(0.02)
        connection.close()

    def mistake(self) -> None:
        body, statuses = self._draw.choice(
            [
                (b"{", [400]),
                (b"x" * 100_000, [400]),
                (b" " * (MOST_BODY + 1), [413]),
                (b'{"messages": []}', [400]),
                (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', [400]),
            ]
        )
        status, _, content = self._served.send("POST", CHAT, body)
        self.check(status, statuses, content)

    def begin(self, fields: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._served.port, timeout=120)
        connection.request("POST", CHAT, json.dumps(fields), {"Content-Type": "application/json"})
        return connection

    def check(self, status: int, expected: list[int], content: Any) -> None:
        self.count[str(status)] += 1
        if status not in expected or (status != 200 and content is not None and set(content) != {"error"}):
            self.wrong.append(f"{status}: {content}")


def main(seconds: float = 600, callers: int = 64) -> int:
    """Call for so many seconds."""
    engine = hrmcore.load()
    expected = engine.generate(QUESTIONS, max_new_tokens=20)
    started = time.monotonic()
    with serving(engine, max_queue=256) as served:
        crowd = [Caller(served, expected, seed, started + seconds) for seed in range(callers)]
        threads = [threading.Thread(target=caller.run) for caller in crowd]
        for thread in threads:
            thread.start()
        memory = []
        for _ in range(5):
            time.sleep(seconds / 5)
            memory.append(resident())
        for thread in threads:
            thread.join()
        served.settle(60)
    wrong = [line for caller in crowd for line in caller.wrong]
    counts = sum((caller.count for caller in crowd), collections.Counter())
    print(json.dumps({"counts": dict(counts), "wrong": len(wrong), "memory_mb": memory}))
    print(*wrong[:5], sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3])))
