"""The server's connections: pieces go at once, and bytes that are no HTTP keep no one waiting."""

from __future__ import annotations

import contextlib
import random
import socket
import time

import pytest
from support.served import Served, serving

from hrmcore.engine.engine import Engine
from hrmcore.serving import server
from hrmcore.serving.server import listen

GOOD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
BROKEN = [
    b"\0" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no host
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\na\0b: c\r\n\r\n",
    GOOD.replace(b": 2", b": -2"),
    GOOD.replace(b": 2", b": 2, 3"),
    GOOD.replace(b": 2", b": 99999999999999999999999"),
    GOOD.replace(b"Content-Length: 2", b"Transfer-Encoding: gzip"),
    GOOD.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").replace(b"{}", b"zz\r\n{}\r\n0\r\n\r\n"),
]


@pytest.fixture(scope="module")
def served(engine: Engine) -> object:
    with serving(engine) as running:
        yield running


def answer_to(served: Served, data: bytes) -> bytes:
    """What comes back for these bytes and the end of all bytes, until the server closes."""
    found = b""
    with socket.create_connection(("127.0.0.1", served.port), 30) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            found += piece
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_send_at_once(host: str) -> None:
    try:
        listener = listen(host, 0)
    except OSError:
        assert host == "::1"  # a machine without IPv6
        return
    with listener, socket.create_connection((host, listener.getsockname()[1])):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_bytes_that_are_no_request_are_refused(served: Served, data: bytes) -> None:
    assert answer_to(served, data).startswith(b"HTTP/1.1 4")
    assert served.ask(max_tokens=1)[0] == 200


@pytest.mark.parametrize("head", [b"GET /%s HTTP/1.1\r\nHost: x", b"GET / HTTP/1.1\r\nHost: x\r\na: %s"])
def test_a_head_without_end_is_cut_off(served: Served, head: bytes) -> None:
    """The connection may be gone before all is sent, and the answer with it."""
    found = answer_to(served, head % (b"a" * 1_000_000))
    assert not found or found.startswith(b"HTTP/1.1 4")
    assert served.ask(max_tokens=1)[0] == 200


@pytest.mark.parametrize("seed", range(4))
def test_broken_bytes_leave_the_server_well(served: Served, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(25):
        data = bytearray(GOOD * chance.randrange(1, 3))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        found = answer_to(served, bytes(data))
        assert not found or found.startswith(b"HTTP/1.1 4"), data
    assert served.ask(max_tokens=1)[0] == 200
    served.settle()


def test_a_head_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    for begun in (b"", b"GET / HTTP/1.1\r\nHo", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"):
        with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
            connection.sendall(begun)
            ends = time.monotonic() + 30
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    assert time.monotonic() < ends


def test_an_answer_may_take_longer_than_its_head(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.01)
    status, content = served.ask(max_tokens=400)
    assert status == 200
    assert content["choices"][0]["message"]["content"] is not None
