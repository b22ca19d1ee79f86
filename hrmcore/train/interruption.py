"""How a run ends when it is asked to: after its step, or in the middle of one that takes long."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

LONG_STEP = 1.0  # seconds


class StepAbandoned(Exception):  # noqa: N818 - not an error: someone asked for it
    """A step ended before it changed anything."""


class Interruption:
    """Ctrl-C and SIGTERM set `asked`, once: after that they do what they usually do.

    Inside `abandonable`, the first one raises StepAbandoned as well.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._abandonable = False

    @contextlib.contextmanager
    def abandonable(self, step_seconds: float) -> Iterator[None]:
        """Around what may end half-way. A step of less than a second, as the last one was, is not worth it."""
        try:
            self._abandonable = step_seconds > LONG_STEP
            yield
        finally:
            self._abandonable = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """The signals come here; only in the main thread, which alone receives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(*_: object) -> None:
            self.asked.set()
            for number, handler in previous.items():
                signal.signal(number, handler)
            when = "now, before this step" if self._abandonable else "after this step, with a state"
            # Not through sys.stderr, which may be in the middle of a line.
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nending {when}\n".encode())
            if self._abandonable:
                raise StepAbandoned

        for number in previous:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
