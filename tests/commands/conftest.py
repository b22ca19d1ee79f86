"""A session that answers with the random model, and the screen that it writes to."""

from __future__ import annotations

import pytest
from support.screen import Screen, session_of

from hrmcore.commands.session import Session
from hrmcore.engine.engine import Engine


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def session(engine: Engine, screen: Screen) -> Session:
    return session_of(engine, screen, temperature=0.0, seed=None)
