"""Imports go one way, and `import hrmcore` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hrmcore
from hrmcore.cli import COMMANDS

PACKAGE = Path(hrmcore.__file__).parent

# A room's line names all that it may import from; a package may also import from itself, but not in a circle.
GROUND = "_C config limits tokenizer durable positions ops averages"
ROOMS = {
    "_C": "",
    "_lazy": "",
    "chat": "",
    "config": "",
    "limits": "",
    "tokenizer": "",
    "durable": "",
    "plots": "",
    "gpus": "",
    "graphs": "",
    "averages": "",
    "positions": "",
    "ops": "_C positions",
    "machine": "_C",
    "microbench": "_C ops machine",
    "operands": "averages",
    "optim": f"{GROUND} operands",
    "planner": f"{GROUND} gpus",
    "data": f"_lazy chat {GROUND}",
    "model": f"{GROUND} data",
    "distributed": f"{GROUND} model optim data",
    "checkpoint": f"_lazy {GROUND} model optim distributed",
    "lora": f"{GROUND} model checkpoint",
    "growth": f"_lazy {GROUND} model optim gpus planner checkpoint",
    "train": f"_lazy {GROUND} graphs machine model optim planner data distributed checkpoint lora growth engine",
    "engine": f"_lazy chat {GROUND} graphs model checkpoint lens",
    "step_bench": "config machine model engine",
    "serving": f"{GROUND} chat engine lens_names",
    "lens_names": "config tokenizer",
    "lens": f"{GROUND} model lens_names",
    "evals": f"{GROUND} data checkpoint engine",
    "commands": f"{GROUND} model gpus planner plots microbench step_bench data checkpoint growth train engine serving "
    "lens lens_names evals",
    "repl": "commands",
    "cli": "_C commands",
    "__main__": "cli",
}
# Upward imports that run only when a function is called: a module's conveniences that need the layer above.
LATE = {("model", "checkpoint"), ("data", "engine")}
# Too slow or too rare to come along with a module of ours.
NEVER_EAGER = {
    *("transformers", "reasoning_gym", "wandb", "tensorboard", "matplotlib", "lm_eval", "openai", "gguf"),
    *("huggingface_hub", "pyarrow", "jinja2"),
}
FREE_OF_TORCH = [
    *("config", "limits", "tokenizer", "gpus", "planner", "durable", "positions", "lens_names", "repl", "cli"),
    *(
        "chat",
        "data",
        "data.records",
        "data.files",
        "data.shapes",
        "data.split",
        "data.show",
        "data.puzzles",
        "data.packing",
        "data.store",
        "data.prepare",
        "data.tokenising",
    ),
    *("checkpoint", "checkpoint.hrm_text", "checkpoint.safetensors_reader", "checkpoint.gguf_file"),
    *("growth", "train"),
    *("engine", "engine.engine", "engine.async_engine", "engine.runner", "engine.cpu_runner"),
    *("serving", "serving.protocol", "serving.metrics", "serving.app", "serving.server", "serving.lens"),
    *("engine.packed_file", "engine.streams", "engine.sampling"),
    *("evals.harness", "evals.iq", "evals.reasoning_gym", "evals.runners"),
    *(f"commands.{path.stem}" for path in (PACKAGE / "commands").glob("*.py")),
]

SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a file: a module at the top, or a package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(("hrmcore", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(nodes: Iterable[ast.AST], late: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported only when a function runs) for what runs; type-checking blocks do not."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "hrmcore":
                yield from ((f"hrmcore.{alias.name}", late) for alias in node.names)
            else:
                yield node.module or "", late
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from imports(node.orelse, late)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(ast.iter_child_nodes(node), late or inside)


def found_in(source: str) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(source).body))


def test_the_parser_of_imports_sees_what_it_should() -> None:
    assert found_in("import torch\nfrom hrmcore import _C, ops\nfrom hrmcore.model import HRM") == [
        ("torch", False),
        ("hrmcore._C", False),
        ("hrmcore.ops", False),
        ("hrmcore.model", False),
    ]
    assert found_in("def f():\n  if x:\n    import a") == [("a", True)]
    assert found_in("class C:\n  import a") == [("a", False)]
    assert found_in("if TYPE_CHECKING:\n  import a\nelse:\n  import b") == [("b", False)]
    assert found_in("try:\n  import a\nexcept ImportError:\n  import b") == [("a", False), ("b", False)]


def test_every_room_has_a_line() -> None:
    assert {room_of(path) for path in SOURCES} - {"__init__"} == set(ROOMS) - {"_C"}


def test_the_rooms_make_no_circle() -> None:
    TopologicalSorter({room: allowed.split() for room, allowed in ROOMS.items()}).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    importer = room_of(path)
    if importer == "__init__":
        return
    for module, late in found_in(path.read_text(encoding="utf-8")):
        root, _, rest = module.partition(".")
        adapter = path.name == f"{root}.py"  # it is imported for the sake of what it adapts to
        assert late or adapter or root not in NEVER_EAGER, f"{path.name} imports {module} before it is needed"
        imported = rest.split(".")[0]
        if root != "hrmcore" or not rest or imported == importer:
            continue
        allowed = imported in ROOMS[importer].split() or (late and (importer, imported) in LATE)
        assert allowed, f"hrmcore.{importer} may not import hrmcore.{imported}: see its line in ROOMS"


def test_modules_of_a_room_make_no_circle() -> None:
    modules = {module_of(path) for path in SOURCES}
    graph = {}
    for path in SOURCES:
        needed = {module for module, _ in found_in(path.read_text(encoding="utf-8"))}
        same_room = f"hrmcore.{room_of(path)}."
        graph[module_of(path)] = {module for module in needed & modules if module.startswith(same_room)}
    TopologicalSorter(graph).prepare()


def test_every_listed_exception_is_used() -> None:
    used = set()
    for path in SOURCES:
        for module, late in found_in(path.read_text(encoding="utf-8")):
            if late and module.startswith("hrmcore."):
                used.add((room_of(path), module.split(".")[1]))
    assert used >= LATE


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True)


def test_importing_the_package_is_light() -> None:
    done = run_python("-c", "import hrmcore, sys; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "argparse", "importlib.metadata"}
    assert {name for name in loaded if name.startswith("hrmcore")} == {"hrmcore"}


def test_importing_the_package_takes_a_fraction_of_the_limit() -> None:
    program = "import time; start = time.process_time(); import hrmcore; print(time.process_time() - start)"
    seconds = float(run_python("-c", program).stdout)  # of the processor, which other work does not lengthen
    assert seconds < 0.15  # it takes about 0.001


def test_modules_that_need_no_torch_import_none() -> None:
    """Those behind `hrmcore COMMAND --help` among them, which would take seconds with it."""
    assert {command.module.removeprefix("hrmcore.") for command in COMMANDS.values()} <= set(FREE_OF_TORCH)
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'hrmcore.{name}')\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    run_python("-c", program, *FREE_OF_TORCH)


def test_the_public_names_are_there_and_no_others() -> None:
    from hrmcore.config import HRMConfig
    from hrmcore.engine.engine import load
    from hrmcore.model import HRM

    assert (hrmcore.load, hrmcore.HRM, hrmcore.HRMConfig) == (load, HRM, HRMConfig)
    assert hrmcore.__version__.count(".") == 2
    assert set(hrmcore.__all__) <= set(dir(hrmcore))
    for name in hrmcore.__all__:
        getattr(hrmcore, name)
    assert hrmcore.optim.Sophia.__module__ == "hrmcore.optim"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hrmcore.nonsense  # noqa: B018
