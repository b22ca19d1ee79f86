"""A session of `hrmcore repl` whose screen is a string."""

from __future__ import annotations

import io
from typing import Any

from hrmcore.commands.session import Session
from hrmcore.engine.engine import Engine


class Screen(io.StringIO):
    """What a terminal would show."""

    def isatty(self) -> bool:
        return True

    def take(self) -> str:
        """What came since the last time."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


def session_of(engine: Engine, out: io.StringIO | None = None, **options: Any) -> Session:
    return Session(lambda _: engine, None, {"condition": "direct", "max_new_tokens": 12, **options}, out or Screen())
