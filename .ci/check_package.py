"""Looks into the wheels and the sdist of a folder: what a user needs is there, what is for developers is not.

python .ci/check_package.py FOLDER
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ASSETS = ["config.json", "model.safetensors", "samples.json", "tokenizer.model"]
ROOT = Path(__file__).parents[1]
# Of the machine that compiled: a user has no use for it, and its owner may not want it known.
PATHS = re.compile(rb"/(?:tmp|home|root|work|Users|builds?|project|opt)/[\w.+/-]+")


def check_wheel(path: Path) -> None:
    """Exactly the package: every module of hrmcore/, its model and the compiled module, without the emulator."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        paths = {found for name in names if name.endswith(".so") for found in PATHS.findall(wheel.read(name))}
    inside = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    compiled = {name for name in inside if name.endswith(".so")}
    files = {file for file in ROOT.glob("hrmcore/**/*") if file.is_file() and file.suffix not in (".pyc", ".so")}
    sources = {file.relative_to(ROOT).as_posix() for file in files}
    assert {f"hrmcore/assets/tiny/{name}" for name in ASSETS} <= sources
    assert inside - compiled == sources, (inside - compiled) ^ sources
    modules = {re.sub(r"\..*", "", name) for name in compiled}
    assert "hrmcore/_C" in modules, compiled
    assert modules <= {"hrmcore/_C", "hrmcore/_C_cuda"}, compiled
    assert not paths, f"{path.name} has paths of the machine that compiled it: {paths}"
    assert any(name.endswith("/licenses/LICENSE") for name in names), "the license is missing"


def check_sdist(path: Path) -> None:
    """What builds the wheel, and none of the folders for developers."""
    with tarfile.open(path) as sdist:
        tops = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    assert {"hrmcore", "csrc", "cmake", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} <= tops, tops
    assert not tops & {"tests", "bench", "runs", "build"}, tops


def main(folder: str) -> None:
    wheels, sdists = sorted(Path(folder).glob("hrmcore-*.whl")), sorted(Path(folder).glob("hrmcore-*.tar.gz"))
    assert wheels or sdists, f"{folder} has neither a wheel nor an sdist"
    for wheel in wheels:
        check_wheel(wheel)
    for sdist in sdists:
        check_sdist(sdist)
    for path in (*wheels, *sdists):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
