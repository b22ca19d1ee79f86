"""Callers at `hrmcore serve` for a while: a third hang up, some read slowly, some send what is wrong.

usage: PYTHONPATH=tests python -m soak.serving [SECONDS [CALLERS [CHECKPOINT]]]

The server is a process of its own, as a user starts it, with a key. Prints JSON: how many requests of each kind, wrong
answers, the server's resident memory in MB every tenth of the time, and by how much it grew from the end of the second
tenth to the last: the medians of the samples of those tenths. Leaves with status 1 when an answer was wrong, a request
is stuck, or that growth is above 2%.
"""

from __future__ import annotations

import collections
import http.client
import json
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hrmcore
from hrmcore.serving.app import MOST_BODY

CHAT = "/v1/chat/completions"
KEY = "the-key-of-the-soak"
QUESTIONS = [f"Spell this word backward (example: sun -> nus): {word}" for word in ("lantern", "tree", "stone")]
QUESTIONS += ["State the final answer to the following arithmetic problem: 29 + 36 =", "<eoq> what <eoa> is <boq>"]
LONG = "Spell this word backward (example: sun -> nus): " + "lantern " * 60
MOST_GROWTH = 0.02
SAMPLES = 20  # of the memory, in a tenth of the time


class Child:
    """A server of its own."""

    def __init__(self, checkpoint: str | None) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
            print(KEY, file=keys, flush=True)
            command = [sys.executable, "-m", "hrmcore", "serve", "--port", "0", "--api-key-file", keys.name]
            command += ["--model", checkpoint] if checkpoint else []
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self.process.stdout is not None
            lines = [self.process.stdout.readline() for _ in range(3)]
        found = re.search(r":(\d+)/v1", lines[2])
        assert found, lines
        self.port = int(found[1])

    def resident(self) -> float:
        """MB of memory that it holds."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * resource.getpagesize() / 1e6

    def send(self, method: str, path: str, body: object = None, key: str = KEY) -> http.client.HTTPConnection:
        """A connection on which a request has been sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        return connection

    def answer(self, method: str, path: str, body: object = None, key: str = KEY) -> tuple[int, Any]:
        """Status and content of one request."""
        connection = self.send(method, path, body, key)
        try:
            response = connection.getresponse()
            content = response.read()
            in_json = response.getheader("Content-Type") == "application/json"
            return response.status, json.loads(content) if in_json else content.decode()
        finally:
            connection.close()

    def open_answers(self) -> int:
        """How many are on their way, by its own count."""
        text = self.answer("GET", "/metrics")[1]
        return sum(int(n) for n in re.findall(r"^hrmcore_(?:answers|sequences)_open (\d+)$", text, re.MULTILINE))


@contextmanager
def child(checkpoint: str | None) -> Iterator[Child]:
    """A server that must end in order."""
    server = Child(checkpoint)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


class Caller:
    """One caller, who asks until the time is up."""

    def __init__(self, server: Child, expected: list[str], seed: int, until: float) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._server, self._expected, self._until = server, expected, until
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
        fields = {"messages": [{"role": "user", "content": QUESTIONS[number]}], "max_tokens": 20}
        status, content = self._server.answer("POST", CHAT, fields)
        self.check(status, [200, 429], content)
        if status == 200 and content["choices"][0]["message"]["content"] != self._expected[number]:
            self.wrong.append(f"{QUESTIONS[number]}: {content}")

    def hang_up(self) -> None:
        fields = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 500, "temperature": 1.0}
        fields |= {"stream": self._draw.random() < 0.5, "n": self._draw.randrange(1, 3)}
        path = CHAT
        if self._draw.random() < 0.2:
            path, fields = "/v1/lens", {"messages": fields["messages"]}
        connection = self._server.send("POST", path, fields)
        time.sleep(self._draw.random() / 2)
        connection.close()

    def read_slowly(self) -> None:
        fields = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 60, "stream": True}
        connection = self._server.send("POST", CHAT, fields)
        response = connection.getresponse()
        self.check(response.status, [200, 429], None)
        while response.read(400):
            time.sleep(0.02)
        connection.close()

    def mistake(self) -> None:
        body, key, expected = self._draw.choice(
            [
                (b"{", KEY, 400),
                (b"x" * 100_000, KEY, 400),
                (b" " * (MOST_BODY + 1), KEY, 413),
                (b'{"messages": []}', KEY, 400),
                (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', KEY, 400),
                (b"{}", "another-key", 401),
            ]
        )
        status, content = self._server.answer("POST", CHAT, body, key)
        self.check(status, [expected], content)

    def check(self, status: int, expected: list[int], content: Any) -> None:
        self.count[str(status)] += 1
        if status not in expected or (status != 200 and content is not None and set(content) != {"error"}):
            self.wrong.append(f"{status}: {content}")


def main(seconds: float = 600, callers: int = 64, checkpoint: str | None = None) -> int:
    """Call for so many seconds."""
    expected = hrmcore.load(checkpoint).generate(QUESTIONS, max_new_tokens=20)
    with child(checkpoint) as server:
        started = time.monotonic()
        crowd = [Caller(server, expected, seed, started + seconds) for seed in range(callers)]
        threads = [threading.Thread(target=caller.run) for caller in crowd]
        for thread in threads:
            thread.start()
        tenths = []
        for _ in range(10):
            samples = []
            for _ in range(SAMPLES):
                time.sleep(seconds / 10 / SAMPLES)
                samples.append(server.resident())
            tenths.append(statistics.median(samples))
            print(f"{tenths[-1]:.1f} MB", file=sys.stderr, flush=True)
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while (stuck := server.open_answers()) and time.monotonic() < deadline:
            time.sleep(0.1)
    wrong = [line for caller in crowd for line in caller.wrong]
    counts = sum((caller.count for caller in crowd), collections.Counter())
    growth = tenths[-1] / tenths[1] - 1
    memory = [round(tenth, 1) for tenth in tenths]
    print(json.dumps({"counts": counts, "wrong": len(wrong), "stuck": stuck, "memory_mb": memory, "growth": growth}))
    print(*wrong[:5], sep="\n", file=sys.stderr)
    return 1 if wrong or stuck or growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]), *sys.argv[3:4]))
