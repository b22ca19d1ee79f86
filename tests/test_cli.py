"""The command line: answers, exit codes, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import hrmcore

from hrmcore import _C, cli
from hrmcore.commands.options import printable
from hrmcore.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(checkpoint: Path) -> list[str]:
    """Options of a short answer from the random model."""
    return ["--model", str(checkpoint), "--max-new-tokens", "12"]


def test_generate_prints_the_answer(quick: list[str], engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    expected = engine.generate("what is 3 plus 4?", max_new_tokens=12)
    for form in ("--stream", "--no-stream"):
        assert hrmcore("generate", "what is 3 plus 4?", *quick, form) == 0
        assert capsys.readouterr() == (expected + "\n", "")


def test_every_option_reaches_the_engine(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 7,
        "condition": "cot",
        "stop": ["end"],
    }
    given = []
    original = Engine.stream

    def recorded(self: Engine, prompt: str, **options: Any) -> Any:
        given.append((prompt, options))
        return original(self, prompt, **options)

    monkeypatch.setattr(Engine, "stream", recorded)
    options = [
        text
        for name, value in values.items()
        for text in (f"--{name.replace('_', '-')}", value[0] if name == "stop" else str(value))
    ]
    assert hrmcore("generate", "é", *quick, *options) == 0
    assert given == [("é", {**values, "max_new_tokens": 12})]


def test_generate_as_json(quick: list[str], engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    full = engine.generate("é", max_new_tokens=12)
    assert hrmcore("generate", "é", *quick, "--json", "--stop", full[4:6], "--stop", "no such") == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") > 0
    assert 0 < result.pop("tokens") <= 12
    assert result == {
        "instruction": "é",
        "response": full[: full.index(full[4:6])],
        "condition": "direct",
        "finish": "stop",
    }


def test_a_dash_reads_the_prompt(
    quick: list[str], engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("copy\n1 2\n"))
    assert hrmcore("generate", "-", *quick) == 0
    assert capsys.readouterr().out == engine.generate("copy\n1 2", max_new_tokens=12) + "\n"


def test_bench_checks_and_times_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert hrmcore("bench", "rms_norm", "--threads", "1", "--seconds", "0.001", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {line["op"] for line in report["ops"]} == {"rms_norm"}


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)], ids=lambda words: " ".join(words) or "-")
def test_help_explains_and_shows_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert hrmcore(*command, "--help") == 0
    out, err = capsys.readouterr()
    assert err == ""
    if command:
        assert f"examples:\n  hrmcore {command[0]}" in out
    else:
        listed = [re.findall(r"^  (\w+) +\w", part, re.MULTILINE) for part in re.split(r"^(?=\w.*:$)", out, flags=re.M)]
        assert [names for names in listed if names] == [list(group) for group in cli.GROUPS.values()]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_examples_are_commands(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore(name, "--help") == 0
    examples = re.findall(r"^  hrmcore (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        example = re.split(r" [|<] |   ", example)[0]  # without the pipe or the remark behind it
        words = shlex.split(re.sub(r"\$\(python .*\)", "checkpoint/", example))
        with monkeypatch.context() as patch:
            patch.setattr(f"{cli.COMMANDS[words[0]].module}.run", lambda _: 0)
            assert hrmcore(*words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "20"}, None)],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], policy: str | None) -> None:
    """Set before torch is imported, for the OpenMP runtime looks only then."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    code = (
        "import contextlib, os, sys; from hrmcore import cli; loaded = 'torch' in sys.modules\n"
        "with contextlib.suppress(SystemExit): cli.main(['train', '--help'])\n"
        "print(loaded, os.environ.get('OMP_WAIT_POLICY'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == f"False {policy}"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import hrmcore as package

    assert hrmcore("--version") == 0
    built = Path(_C.__file__).with_name("_C_cuda.so").exists()
    cuda = "with CUDA" if built else "without CUDA"
    assert capsys.readouterr().out == f"hrmcore {package.__version__}, instruction set {_C.isa()}, {cuda}\n"


VERSION = """
import sys
from hrmcore.cli import main
try:
    main(["--version"])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("isa", "status"), [("", 0), ("generic", 0), ("mmx", 2)])
def test_the_version_is_one_line_and_imports_no_torch(isa: str, status: int) -> None:
    environment = os.environ | {"HRMCORE_ISA": isa}
    done = subprocess.run([sys.executable, "-c", VERSION], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    line, silent = (done.stdout, done.stderr) if status == 0 else (done.stderr, done.stdout)
    assert silent == ""
    assert line.count("\n") == 1
    expected = f"instruction set {isa}" if status == 0 else "hrmcore: the environment variable HRMCORE_ISA is wrong"
    assert expected in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate"], "required: prompt"),
        (["generate", "x", "--nonsense"], "--nonsense"),
        (["generate", "x", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["generate", "x", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["generate", "", "--model", "MODEL"], "the prompt is empty"),
        (["generate", "1 " * 3000, "--model", "MODEL"], "context of 2048 tokens"),
        (["generate", "\udcff", "--model", "MODEL"], "surrogate"),
        (["generate", "x", "--model", "MODEL", "--condition", "shout"], "unknown condition 'shout'"),
        (["generate", "x", "--model", "MODEL", "--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["generate", "x", "--model", "MODEL", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["generate", "x", "--model", "MODEL", "--stop", ""], "stop must be"),
        (
            ["generate", "x", "--model", "MODEL", "--dtype", "int2"],
            "dtype must be auto, float32, bfloat16, int8 or int4",
        ),
        (["generate", "x", "--model", "MODEL", "--threads", "0"], "threads must be"),
        (["bench", "nonsense"], "no op is called 'nonsense'"),
        (["bench", "rms_norm", "--seconds", "0"], "seconds must be positive"),
        (["repl", "no/such/folder"], "no/such/folder: no such folder"),
        (["repl", "MODEL", "--top-p", "2"], "top_p must be"),
        (["repl", "MODEL", "--condition", "shout"], "unknown condition 'shout'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hrmcore(*(str(checkpoint) if word == "MODEL" else word for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hrmcore")
    assert message in err


def test_broken_model_files_are_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert hrmcore("generate", "x", "--model", str(tmp_path)) == 2
    assert str(tmp_path / "config.json") in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert hrmcore("generate", "x", "--model", str(tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failure_is_not_taken_for_a_mistake(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        monkeypatch.setattr("hrmcore.engine.scheduler.sample", lambda *_: (_ for _ in ()).throw(error))

    fail(ArithmeticError("NaN"))
    assert hrmcore("generate", "x", *quick) == 1
    assert capsys.readouterr().err == "hrmcore generate: NaN\n"
    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):  # Python prints it and exits 1
        hrmcore("generate", "x", *quick)


# --- as a process of its own -------------------------------------------------------------------------------------


def start(*arguments: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hrmcore", *arguments, "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_process_answers_whatever_the_encoding(quick: list[str], engine: Engine) -> None:
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    out, err = start("generate", "é", *quick, stdin=subprocess.DEVNULL, env=narrow).communicate(timeout=120)
    expected = engine.generate("é", max_new_tokens=12)
    assert not expected.isascii()
    assert (out.decode("ascii"), err) == (expected.encode("ascii", "replace").decode() + "\n", b"")


@pytest.mark.parametrize("way", ["argument", "standard input", "repl"])
def test_a_prompt_is_utf8_in_the_c_locale(way: str, quick: list[str], engine: Engine) -> None:
    """Without Python's own repairs of that locale, which hide it on most machines."""
    prompt = "é 日 😀"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    environment = {**plain, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    expected = engine.generate(prompt, max_new_tokens=12)
    if way == "repl":
        expected = printable(expected)
        process = start("repl", *quick[1:], stdin=subprocess.PIPE, env=environment)
    else:
        given = prompt.encode() if way == "argument" else b"-"
        process = start("generate", given, *quick, stdin=subprocess.PIPE, env=environment)
    out, err = process.communicate(prompt.encode() + b"\n", timeout=120)
    assert err == b""
    assert expected.encode("ascii", "replace") in out


def test_a_failure_is_exit_1(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import hrmcore.engine.sampling as sampling\n"
        "def fail(*_): raise ArithmeticError('not finite')\n"
        "sampling.sample = fail\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = start("generate", "x", "--model", str(checkpoint), stdin=subprocess.DEVNULL, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == b"hrmcore generate: not finite\n"


def exhaust_torch(_: object) -> int:
    return len(torch.empty(1 << 50))


def exhaust_python(_: object) -> int:
    return len(bytearray(1 << 62))


@pytest.mark.parametrize("exhaust", [exhaust_torch, exhaust_python])
def test_want_of_memory_is_one_line_and_exit_1(
    exhaust: Callable[[object], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hrmcore.commands.plan.run", exhaust)
    assert hrmcore("plan", "--size", "XL", "--tokens", "1e9") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hrmcore plan: out of memory; take a smaller batch_tokens")
    assert err.count("\n") == 1


def test_interrupting_generate_is_exit_130(checkpoint: Path) -> None:
    process = start("generate", "é", "--model", str(checkpoint), "--max-new-tokens", "2000", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, b"")


def test_a_reader_that_leaves_is_no_error(checkpoint: Path) -> None:
    process = start("generate", "é", "--model", str(checkpoint), "--max-new-tokens", "2000", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
