"""Load a model and generate; the public names. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrmcore._lazy import lazy

if TYPE_CHECKING:
    from hrmcore.engine.async_engine import AsyncAnswer as AsyncAnswer
    from hrmcore.engine.async_engine import AsyncEngine as AsyncEngine
    from hrmcore.engine.async_engine import EngineClosed as EngineClosed
    from hrmcore.engine.async_engine import QueueFull as QueueFull
    from hrmcore.engine.engine import EMBEDDED_MODEL as EMBEDDED_MODEL
    from hrmcore.engine.engine import Engine as Engine
    from hrmcore.engine.engine import TextOptions as TextOptions
    from hrmcore.engine.engine import load as load
    from hrmcore.engine.streams import Answer as Answer
    from hrmcore.engine.streams import Finish as Finish
    from hrmcore.engine.streams import Request as Request
    from hrmcore.engine.streams import Scored as Scored
    from hrmcore.engine.streams import StopFilter as StopFilter
    from hrmcore.engine.streams import TokenLogprob as TokenLogprob
    from hrmcore.engine.streams import Tokens as Tokens

__getattr__, __dir__ = lazy(
    __name__,
    {
        "async_engine": ["AsyncAnswer", "AsyncEngine", "EngineClosed", "QueueFull"],
        "engine": ["EMBEDDED_MODEL", "Engine", "TextOptions", "load"],
        "streams": ["Answer", "Finish", "Request", "Scored", "StopFilter", "TokenLogprob", "Tokens"],
    },
)
