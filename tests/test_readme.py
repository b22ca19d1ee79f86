"""README and docs/ tell the truth: the tree is the tree, links and paths lead somewhere, README's example runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
HISTORY = (ROOT / "CHANGELOG.md", *(ROOT / "docs" / "log").glob("*.md"))  # names what was there
PAGES_OF_TODAY = [page for page in PAGES if page not in HISTORY]
ROOMY = ("hrmcore", "csrc")  # folders whose own folders README lists
CODE = re.compile(r"```.*?```", re.DOTALL)


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in names.splitlines()]


def rooms() -> set[str]:
    """The folders at the top level, and one level down in `ROOMY`."""
    folders = {file.parts[0] for file in tracked() if len(file.parts) > 1}
    folders |= {"/".join(file.parts[:2]) for file in tracked() if file.parts[0] in ROOMY and len(file.parts) > 2}
    return {folder for folder in folders if not folder.startswith(".")}


def listed() -> dict[str, str]:
    """README's tree: the folder of each line, and what the line says of it."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert block
    found, top = {}, ""
    for line in block[1].splitlines():
        name, _, described = line.strip().partition(" ")
        if not line.startswith(" "):
            top = name
        found[(top + name if line.startswith(" ") else name).rstrip("/")] = described.strip()
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links and pictures of a page that lead to no file, or to no heading of one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    return broken


def lost_paths(page: Path) -> list[str]:
    """The paths in `code` that name no file or folder of the repository. `X` is any op; libraries are built."""
    spans = re.findall(r"`([\w./-]+)`", CODE.sub("", page.read_text(encoding="utf-8")))
    starts = tuple(f"{room}/" for room in rooms())
    paths = [span.replace("X.", "rms_norm.") for span in spans if span.startswith(starts)]
    return [path for path in paths if not path.endswith(".so") and not (ROOT / path).exists()]


def test_the_tree_is_true() -> None:
    assert set(listed()) == rooms()
    assert all(listed().values()), "each room is described"


def test_the_modules_of_the_tree_exist() -> None:
    for name in listed()["hrmcore"].split(", "):
        assert (ROOT / "hrmcore" / f"{name}.py").is_file(), name


def test_readme_takes_a_minute() -> None:
    assert len(README.splitlines()) <= 120


def test_the_finders_see_what_they_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: two-part\n[a](page.md#a-heading-two-part) [b](page.md#none) [c](none.md) [d](https://x.org)\n"
        "```\n[e](none.md) `csrc/none.cpp`\n```\n`csrc/ops/X.h` `csrc/none.cpp` `none/none.py`",
        encoding="utf-8",
    )
    assert broken_links(page) == ["page.md#none", "none.md"]
    assert lost_paths(page) == ["csrc/none.cpp"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


@pytest.mark.parametrize("page", PAGES_OF_TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_lead_somewhere(page: Path) -> None:
    assert not lost_paths(page)


def test_the_example_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["logits"].shape[0] == 4  # type: ignore[attr-defined]
