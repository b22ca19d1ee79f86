"""A server with the tests' checkpoint, a client of it, and a real Chromium, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support.browser import CHROMIUM, Browser
from support.served import Served, serving

from hrmcore.engine.engine import Engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as served:
        yield served
        served.settle()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
