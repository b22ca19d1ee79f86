"""Waiting that ends in time, or when the caller has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

Result = TypeVar("Result")


@contextlib.asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """`asyncio.timeout`, which Python 3.10 lacks; None is no limit. Raises TimeoutError."""
    task, loop, late = asyncio.current_task(), asyncio.get_running_loop(), False
    assert task is not None

    def cancel() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = None if seconds is None else loop.call_later(seconds, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise TimeoutError(f"no complete answer in {seconds} seconds") from None
        raise
    finally:
        if timer is not None:
            timer.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await work, unless the client leaves first; then raise ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        result: Result = tasks[0].result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
