"""A server in the test's process: on a thread of its own, on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hrmcore.engine.async_engine import AsyncEngine
from hrmcore.engine.engine import Engine
from hrmcore.serving.app import Service
from hrmcore.serving.server import Server, listen

MODEL = "small"


@dataclass
class Served:
    """A running server and the engine behind it."""

    engine: Engine
    service: Service
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content of one request over plain HTTP; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method, path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            in_json = found.get("content-type") == "application/json"
            return response.status, found, json.loads(content) if in_json else content.decode()
        finally:
            connection.close()

    def ask(self, **fields: Any) -> tuple[int, Any]:
        """Status and content of a chat completion."""
        fields = {"messages": [{"role": "user", "content": "copy"}], **fields}
        status, _, content = self.send("POST", "/v1/chat/completions", fields)
        return status, content

    def settle(self, seconds: float = 30) -> None:
        """Wait until no answer is open; it is an error when one stays so."""
        deadline = time.monotonic() + seconds
        while self.engine.open_requests or self.service.served.open_answers or self.service.handling:
            assert time.monotonic() < deadline, "requests are stuck"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(engine: Engine, *, max_queue: int = 64, grace: float = 10, **options: Any) -> Iterator[Served]:
    """A server that ends, in order, with the block."""
    service = Service(AsyncEngine(engine, max_queue), MODEL, **options)
    started = threading.Event()
    server = Server(service, grace, started.set)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert started.wait(30)
    served = Served(engine, service, server, listener.getsockname()[1])
    try:
        yield served
    finally:
        if not service.closing:
            server.end()
        thread.join(60)
        assert not thread.is_alive()
    assert engine.open_requests == 0
