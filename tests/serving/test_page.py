"""The page, in a real Chromium where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import CONTRASTS, Browser
from support.served import Served, serving

from hrmcore.engine.engine import Engine
from hrmcore.serving.app import PAGE

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = [
    {"task": "chain_sum", "instruction": "what is 3 plus 4?"},
    {"task": "chain_sum", "instruction": "what is 1 plus 1?"},
    {"task": "grid", "instruction": "copy\n1 2\n3 4"},
]
ANSWER = "document.querySelectorAll('article.assistant p')"
NOTE = "document.querySelector('article:last-child footer').textContent"
DONE = "document.getElementById('send').hidden === false && !document.querySelector('article.waiting')"


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, samples=SAMPLES) as served:
        yield served
        served.settle()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Browser]:
    browser.errors.clear()
    browser.open(f"http://127.0.0.1:{served.port}/", 360, 700)
    browser.wait("document.getElementById('condition').children.length")
    yield browser
    assert not browser.errors


def test_nothing_of_the_page_comes_from_elsewhere(served: Served) -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "://" not in text.replace("http://www.w3.org", "")
    status, headers, content = served.send("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "<main" in content
    about = served.send("GET", "/page.json")[2]
    assert (about["model"], about["keyed"], about["samples"]) == ("small", False, SAMPLES)


def test_a_question_by_keyboard(page: Browser, engine: Engine) -> None:
    page.run("document.forms[0].elements.max_tokens.value = 12")
    page.type("what is 3 plus 4?")
    page.press("Enter", 13)
    page.wait(DONE)
    assert page.run(f"{ANSWER}[0].textContent") == engine.generate("what is 3 plus 4?", max_new_tokens=12)
    assert page.run(NOTE).startswith("12 tokens, ")
    assert page.run("document.activeElement.id") == "question"
    assert page.run("document.getElementById('question').value") == ""


def test_a_sample_and_earlier_turns(page: Browser, engine: Engine) -> None:
    assert page.run("document.querySelectorAll('#sample-list button').length") == 2
    page.run("document.forms[0].elements.max_tokens.value = 5; document.getElementById('remember').checked = true")
    page.run("document.querySelectorAll('#sample-list button')[1].click()")
    page.wait(DONE)
    first = engine.generate(SAMPLES[2]["instruction"], max_new_tokens=5)
    assert page.run(f"{ANSWER}[0].textContent") == first
    page.type("again")
    page.run("document.getElementById('send').click()")
    page.wait(f"{ANSWER}.length === 2 && {DONE}")
    turns = [("user", SAMPLES[2]["instruction"]), ("assistant", first), ("user", "again")]
    said = engine.chat([{"role": role, "content": text} for role, text in turns], max_new_tokens=5)
    assert page.run(f"{ANSWER}[1].textContent") == said


def test_an_answer_is_stopped(page: Browser, served: Served) -> None:
    page.run("document.forms[0].elements.max_tokens.value = 1900")
    for stop in ("document.getElementById('stop').click()", None):
        page.type("copy")
        page.press("Enter", 13)
        page.wait(f"[...{ANSWER}].at(-1).textContent.length > 3")
        page.run(stop) if stop else page.press("Escape", 27)
        page.wait(DONE)
        assert page.run(NOTE) == "stopped"
        served.settle()
    page.run("document.getElementById('clear').click()")
    assert page.run(f"{ANSWER}.length") == 0
    assert page.run("document.getElementById('samples').hidden") is False


def test_an_error_is_told(page: Browser) -> None:
    page.type("copy " * 3000)
    page.press("Enter", 13)
    page.wait(DONE)
    assert "it must leave room in the context" in page.run(NOTE)
    [refused] = page.errors
    assert "400 (Bad Request)" in refused
    page.errors.clear()


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read(page: Browser, served: Served, tmp_path: Path, dark: bool) -> None:
    """Nothing is wider than a phone, every field has a label, every text stands out from what is behind it."""
    page.open(f"http://127.0.0.1:{served.port}/?{dark}", 360, 700, dark)
    page.wait("document.querySelectorAll('#sample-list button').length")
    page.run("document.getElementById('settings').open = true; document.forms[0].elements.max_tokens.value = 8")
    page.type("copy")
    page.press("Enter", 13)
    page.wait(DONE)
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run("[...document.querySelectorAll('input,select,textarea')].every(field => field.labels.length)")
    ratios = page.run(CONTRASTS)
    assert ratios
    assert min(ratio for _, ratio in ratios) >= 4.5, sorted(ratios, key=lambda pair: pair[1])[:5]
    page.picture(tmp_path / "page.png")
