"""The HTTP server itself: a socket, uvicorn, and an end in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hrmcore.serving.app import Service, make_app

HEAD_SECONDS = 30.0


def listen(host: str, port: int) -> socket.socket:
    """A socket on which a server may listen. Raises OSError, on one line, when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Its connections inherit it. Else a piece of an answer waits up to 40 ms for the last one's acknowledgement;
        # asyncio would see to it, but takes sockets of create_server for something else than TCP.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class Connection(H11Protocol):
    """A connection that ends when HEAD_SECONDS go by without a whole request.

    uvicorn gives up an idle connection after its first answer only; one whose head never comes would be kept for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answered: object = self.cycle
        self._watch = self.loop.call_later(HEAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._answered is self.cycle:
            self.transport.close()
            return
        self._answered = self.cycle if waits else None
        self._watch = self.loop.call_later(HEAD_SECONDS, self._look)


class Server(uvicorn.Server):
    """uvicorn over a Service. The first signal ends it in order, a second at once.

    In order: new requests get 503, those that wait do too, those that run have `grace` seconds.
    """

    def __init__(self, service: Service, grace: float, ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            make_app(service),
            loop="asyncio",
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._ready = ready
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT and SIGTERM."""
        if not self.started:
            self.should_exit = True
        elif self._service.closing:
            self._grace = 0.0
            self._loop.call_soon_threadsafe(self._start_to_end)
        else:
            self.end()

    def end(self) -> None:
        """End in order; from any thread."""
        self._service.closing = self._service.looks.closing = True
        self._loop.call_soon_threadsafe(self._start_to_end)

    def _start_to_end(self) -> None:
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.served.close(self._grace)
        for _ in range(100):  # what is answered is yet to be sent
            if not self._service.handling:
                break
            await asyncio.sleep(0.02)
        self.should_exit = True
