"""The server's connections: no piece of an answer waits for the last one's acknowledgement."""

from __future__ import annotations

import socket

import pytest

from hrmcore.serving.server import listen


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
