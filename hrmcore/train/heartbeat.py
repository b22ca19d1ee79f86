"""A line now and then while something takes long, so that nobody has to guess whether a run is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

FIRST = 5.0  # seconds until the first line; the next comes after twice the time, and so on


class Heartbeat:
    """Says what a run has been at, and for how long, from a thread of its own. `say` takes a line."""

    def __init__(self, say: Callable[[str], None], first: float = FIRST) -> None:
        self._say, self._first = say, first
        self._doing: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, doing: str) -> None:
        """What is begun now."""
        self._doing = (doing, time.monotonic())

    def rest(self) -> None:
        """Nothing is under way."""
        self._doing = None

    def _beat(self) -> None:
        seen: tuple[str, float] | None = None
        due = self._first
        while not self._ended.wait(min(0.5, self._first / 2)):
            if self._doing is not seen:
                seen, due = self._doing, self._first
            if seen is not None and (taken := time.monotonic() - seen[1]) >= due:
                self._say(f"{seen[0]}: {taken:.0f} s so far")
                due *= 2
