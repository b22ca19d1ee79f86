"""The lens on the page, in a real Chromium: what is drawn is what the model says, and it can be read, used and kept."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import CONTRASTS, Browser
from support.served import Served

from hrmcore.engine.engine import Engine
from hrmcore.lens import look
from hrmcore.lens_names import token_name
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "what is 3 plus 4?"
DRAWN = "!!document.querySelector('figure svg') && !document.querySelector('.state').textContent"
CHECKED = "[...document.querySelectorAll('.tokens button')].findIndex((one) => one.ariaChecked === 'true')"
# Where the answer's stream ends at each step, as a share of the river's width.
SHARES = """(() => {
  const bed = document.querySelectorAll('figure svg rect')[1], path = document.querySelector('figure svg path');
  const [x0, width] = ['x', 'width'].map((name) => +bed.getAttribute(name));
  const right = path.getAttribute('d').split('L').at(-2);
  const points = [...right.matchAll(/(?:^|C\\S+ \\S+ )([\\d.]+),/g)].map((found) => +found[1]).reverse();
  return points.map((x) => (x - x0) / width);
})()"""


def answered(browser: Browser, served: Served, width: int, dark: bool = False) -> None:
    """An answer of eight tokens, its lens open on the first."""
    browser.errors.clear()
    browser.open(f"http://127.0.0.1:{served.port}/?{width}{dark}", width, 900, dark)
    browser.wait("document.getElementById('condition').children.length")
    browser.run("document.forms[0].elements.max_tokens.value = 8")
    browser.type(QUESTION)
    browser.press("Enter", 13)
    browser.wait("!!document.querySelector('.look')")
    browser.run("document.querySelector('.look').click()")
    browser.wait(DRAWN)


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Browser]:
    answered(browser, served, 900)
    yield browser
    assert not browser.errors


def test_the_river_is_the_torch_lens(page: Browser, engine: Engine, checkpoint: Path) -> None:
    tokenizer, prompt = engine.text_tokenizer(), engine.prompt_ids(QUESTION)
    ids = list(engine.tokens(prompt, max_new_tokens=8))
    names = [token_name(tokenizer, index) for index in ids]
    assert page.run("[...document.querySelectorAll('.tokens button')].map((one) => one.textContent)") == [
        *names,
        "next",
    ]
    model = HRM.from_pretrained(checkpoint)
    for token in (0, 5):
        page.run(f"document.querySelectorAll('.tokens button')[{token}].click()")
        page.wait(f"{DRAWN} && {CHECKED} === {token}")
        seen = look(model, [*prompt, *ids[:token]], len(prompt))
        expected = seen.logits.double().softmax(-1)[:, ids[token]].tolist()
        # Drawn to a tenth of a pixel, on a river of some 400.
        assert page.run(SHARES) == pytest.approx(expected, abs=1e-3)
        cells = "[...row.cells].map((cell) => cell.textContent)"
        rows = page.run(f"[...document.querySelectorAll('.lens tbody tr')].map((row) => {cells})")
        assert [row[0] for row in rows] == ["L1.1", "L1.2", "H1", "L2.1", "L2.2", "H2"]
        assert rows[-1][1] == names[token]
        said = page.run("document.querySelector('figure svg').getAttribute('aria-label')")
        assert said.startswith(f"How the answer formed: “{names[token]}” leads from ")


def test_tokens_are_chosen_by_keyboard(page: Browser) -> None:
    page.run("document.querySelector('.tokens [aria-checked=true]').focus()")
    chosen = []
    for key, code in (("ArrowRight", 39), ("ArrowLeft", 37), ("ArrowLeft", 37), ("Home", 36), ("End", 35)):
        page.press(key, code)
        page.wait(f"{DRAWN} && document.activeElement === document.querySelectorAll('.tokens button')[{CHECKED}]")
        chosen.append(page.run(CHECKED))
    assert chosen == [1, 0, 8, 0, 8]
    assert page.run("[...document.querySelectorAll('.tokens button')].filter((one) => one.tabIndex === 0).length") == 1
    page.run("document.querySelector('.look').click()")
    assert page.run("document.querySelector('.lens').hidden") is True
    assert page.run("document.querySelector('.look').getAttribute('aria-expanded')") == "false"


@pytest.mark.parametrize("name", ["7", "<direct>", "Solve this 4x4 Mini Sudoku puzzle"])
@pytest.mark.parametrize("leads", [False, True])
def test_the_title_is_inside_however_long_the_answer(page: Browser, name: str, leads: bool) -> None:
    answer = {"token": 1, "text": name, "probabilities": [0.1, 0.9]}
    steps = [
        {"visit": f"H{n}", "stack": "H", "token": int(leads and n == 2), "text": "x", "probability": 0.5}
        for n in (1, 2)
    ]
    report = {"answer": answer, "contenders": [], "steps": steps, "tokens": [name], "token": 0, "model": "m"}
    over = page.run(f"""import('/picture.js').then(({{ draw }}) => {{
      const svg = draw({json.dumps(report)}, "a question", 290, false);
      document.body.append(svg);
      const [title, frame] = [svg.querySelector('text'), svg].map((one) => one.getBoundingClientRect());
      svg.remove();
      return title.right - frame.right;
    }})""")
    assert over <= 0


@pytest.mark.parametrize("width", [360, 900])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read(browser: Browser, served: Served, tmp_path: Path, width: int, dark: bool) -> None:
    answered(browser, served, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('.lens details').open = true")
    ratios = browser.run(CONTRASTS)
    assert any(name.startswith("text.") for name, _ in ratios)
    assert min(ratio for _, ratio in ratios) >= 4.5, sorted(ratios, key=lambda pair: pair[1])[:5]
    inside = """(() => { const frame = document.querySelector('figure svg').getBoundingClientRect();
      return [...document.querySelectorAll('figure svg text')].filter((text) => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left || box.right > frame.right + 1 || box.bottom > frame.bottom;
      }).map((text) => text.textContent) })()"""
    assert browser.run(inside) == []
    assert not browser.errors
    browser.picture(tmp_path / "lens.png")


def test_the_picture_is_kept_as_png_and_svg(page: Browser) -> None:
    """Both show it without the page: the PNG has the colours of the river, the SVG no style from elsewhere."""
    from PIL import Image

    saved = "document.querySelector('figure svg')"
    encoded = page.run(f"""import('/picture.js').then(({{ png }}) => png({saved}, 2)).then((blob) => blob.arrayBuffer())
      .then((bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes))))""")
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    width, height = (page.run(f"{saved}.{name}.baseVal.value") for name in ("width", "height"))
    assert image.size == (int(2 * width), int(2 * height))
    colours: list[Any] = image.getcolors(1 << 24)
    most = {colour for _, colour in sorted(colours, reverse=True)[:6]}
    fill = page.run(f"{saved}.querySelector('path').getAttribute('fill')")
    assert tuple(bytes.fromhex(fill[1:])) in most
    text = page.run(f"new XMLSerializer().serializeToString({saved})")
    assert text.startswith("<svg xmlns")
    assert "class=" not in text
    assert "style=" not in text
    names = page.run("""(() => { const names = [];
      HTMLAnchorElement.prototype.click = function () { names.push(this.download + ' ' + this.protocol); };
      document.querySelectorAll('.saving button').forEach((one) => one.click());
      return new Promise((done) => setTimeout(() => done(names.sort()), 1000)); })()""")
    assert names == ["lens.png blob:", "lens.svg blob:"]


def test_a_refusal_is_told_in_the_panel(browser: Browser, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(browser, served, 900)
    monkeypatch.setattr(served.service.looks, "closing", True)
    browser.run("document.querySelectorAll('.tokens button')[3].click()")
    browser.wait("document.querySelector('.state').textContent === 'the engine is shutting down'")
    [error] = browser.errors
    assert "503" in error
