"""The interactive prompt: at a simulated terminal, at a real one, and without any."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from support.screen import Screen, session_of

from hrmcore.commands import repl
from hrmcore.commands.options import printable
from hrmcore.commands.session import Session
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


# --- without a terminal ------------------------------------------------------------------------------------------


def run_repl(checkpoint: Path, text: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hrmcore", "repl", str(checkpoint), "--threads", "1", *arguments]
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **source)


def test_without_input_the_samples_are_answered(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    samples = json.loads((copy / "samples.json").read_text())
    real = engine.generate(samples[1]["instruction"], max_new_tokens=12)
    samples[1]["response"] = real  # so that one is as expected
    (copy / "samples.json").write_text(json.dumps(samples))
    done = run_repl(copy, None, "--max-new-tokens", "12")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, tally = done.stdout.split("\n\n")
    noise = printable(engine.generate(samples[0]["instruction"], max_new_tokens=12)).splitlines()[0]
    assert first.startswith("[1] chain_sum\n    what is 3 plus 4?\n  answer")
    assert re.search(re.escape(noise) + " +7\n", first)
    assert first.endswith("\n  different")
    assert second.startswith("[2] grid\n    copy\n    1 2\n    3 4\n  answer")
    assert second.endswith("\n  as expected")
    assert tally == "1 of 2 answers as expected\n"


def test_piped_lines_are_answered(engine: Engine, checkpoint: Path) -> None:
    done = run_repl(checkpoint, "é\n\ncopy\\\n1 2\n/condition cot\né", "--max-new-tokens", "12")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [
        printable(engine.generate(prompt, max_new_tokens=12, condition=condition))
        for prompt, condition in [("é", "direct"), ("copy\n1 2", "direct"), ("é", "cot")]
    ]
    assert done.stdout == (
        f"> é\n{answers[0]}\n> copy\n… 1 2\n{answers[1]}\n"
        f"> /condition cot\ncondition: cot (known: direct, cot, synth, noisy)\n> é\n{answers[2]}\n"
    )


def test_a_piped_mistake_is_told_in_the_exit_code(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hrmcore import cli

    monkeypatch.setattr(sys, "stdin", io.StringIO("/seed x\n/temperature 1\n/quit\n/seed 1\n"))
    assert cli.main(["repl", str(checkpoint)]) == 2
    assert capsys.readouterr().out == (
        "> /seed x\n! seed must be a whole number of at least 0, or none, as in /seed 1, got 'x'\n"
        "> /temperature 1\ntemperature: 1\n> /quit\n"
    )


def test_lines_are_joined_at_backslashes() -> None:
    assert list(repl.join_lines(["a\n", "\n", "b\\\r\n", "c\n", " \n", "d\\"])) == ["a", "b\nc", "d"]


# --- at a simulated terminal -------------------------------------------------------------------------------------


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"


def typed(
    monkeypatch: pytest.MonkeyPatch,
    keyboard: PipeInput,
    engine: Engine,
    *keys: str,
    as_it_starts: Callable[[], None] = lambda: None,
) -> list[str]:
    """What a session is handed when these keys are typed, one group at each prompt."""
    session = session_of(engine)
    handed: list[str] = []
    groups = iter([*keys, CTRL_D])

    def handle(text: str) -> bool:
        handed.append(text)
        session.leaving = text == "/quit"
        return not session.leaving

    class Typist(PromptSession[str]):
        """Types a group once the history is there; a person is never so fast, but a test is."""

        def prompt(self, *arguments: Any, **options: Any) -> str:
            async def type_when_ready() -> None:
                self.default_buffer.load_history_if_not_yet_loaded()
                assert self.default_buffer._load_history_task is not None
                await self.default_buffer._load_history_task
                keyboard.send_text(next(groups))

            def start() -> None:
                as_it_starts()
                self.app.create_background_task(type_when_ready())

            return super().prompt(*arguments, pre_run=start, **options)

    monkeypatch.setattr(session, "handle", handle)
    monkeypatch.setattr(repl, "PromptSession", Typist)
    repl.converse(session)
    return handed


@pytest.mark.parametrize(
    ("keys", "handed"),
    [
        (["one" + ENTER, "two" + ENTER], ["one", "two"]),
        (["one" + ALT_ENTER + "two" + ENTER], ["one\ntwo"]),
        (["one\\" + ENTER + "two" + ENTER], ["one\ntwo"]),
        (["\x1b[200~1 2\r\n3 4\r\n\x1b[201~" + ENTER], ["1 2\n3 4\n"]),
        (["abandoned" + CTRL_C, "kept" + ENTER], ["kept"]),
        ([CTRL_C, CTRL_C, "kept" + ENTER], ["kept"]),
        (["one" + ENTER, UP + " more" + ENTER], ["one", "one more"]),
        (["1\\" + ENTER + "2" + ENTER, "x" + ENTER, UP + UP + ENTER], ["1\n2", "x", "1\n2"]),
        (["/quit" + ENTER, "never" + ENTER], ["/quit"]),
        ([], []),
    ],
)
def test_keys(
    monkeypatch: pytest.MonkeyPatch, keyboard: PipeInput, engine: Engine, keys: list[str], handed: list[str]
) -> None:
    assert typed(monkeypatch, keyboard, engine, *keys) == handed


def test_history_outlives_the_program(
    monkeypatch: pytest.MonkeyPatch, keyboard: PipeInput, engine: Engine, tmp_path: Path
) -> None:
    assert typed(monkeypatch, keyboard, engine, "1 2\\" + ENTER + "3 4" + ENTER) == ["1 2\n3 4"]
    assert (tmp_path / "state" / "hrmcore" / "history").is_file()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert typed(monkeypatch, keyboard, engine, UP + ENTER) == ["1 2\n3 4"]


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file", "no home"])
def test_history_that_cannot_be_kept_is_no_obstacle(
    keyboard: PipeInput, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "a file for a folder":
        (tmp_path / "state").write_text("")
        assert isinstance(repl.open_history(), InMemoryHistory)
    elif obstacle == "a folder for a file":
        (tmp_path / "state" / "hrmcore" / "history").mkdir(parents=True)
    else:
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert isinstance(repl.open_history(), InMemoryHistory)
    assert typed(monkeypatch, keyboard, engine, "one" + ENTER, UP + ENTER) == ["one", "one"]


@pytest.mark.parametrize(
    ("text", "completions"),
    [
        ("/s", ["/seed", "/save", "/samples"]),
        ("/condition d", ["direct"]),
        ("/condition direct, s", ["synth"]),
        ("/temperature ", []),
        ("s", []),
        ("one\n/s", []),
    ],
)
def test_completion(session: Session, text: str, completions: list[str]) -> None:
    found = repl._SlashCompleter(session).get_completions(Document(text), None)  # type: ignore[arg-type]
    assert [completion.text for completion in found] == completions


def test_paths_are_completed(session: Session, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    found = repl._SlashCompleter(session).get_completions(Document(f"/model {tmp_path}/che"), None)  # type: ignore[arg-type]
    assert [completion.text for completion in found] == ["ckpoint"]


def test_an_interruption_that_comes_too_late_does_nothing(
    monkeypatch: pytest.MonkeyPatch, keyboard: PipeInput, engine: Engine
) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert typed(monkeypatch, keyboard, engine, "1" + ENTER, "2" + ENTER, as_it_starts=interrupt) == ["1", "2"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interruption_stops_the_answer_and_not_the_program(
    keyboard: PipeInput, engine: Engine, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CpuRunner.from_checkpoint(engine.source, "auto", None, 1, 0)
    session = session_of(Engine(runner, engine.tokenizer, engine.source), screen, max_new_tokens=50)
    steps = iter(range(1000))
    step = runner.step

    def interrupted_step(*arguments: Any) -> Any:
        if next(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(runner, "step", interrupted_step)
    keyboard.send_text("é" + ENTER + "copy" + ENTER + "/quit" + ENTER)
    repl.converse(session)
    monkeypatch.undo()
    shown = screen.take()
    assert re.search(r"6 tokens, \d+ tokens/s, stopped", shown)
    assert re.search(r"50 tokens, \d+ tokens/s, cut at max_new_tokens", shown)
    assert session.engine.open_requests == 0
    assert [record["instruction"] for record in session._records] == ["copy"]


# --- at a real terminal ------------------------------------------------------------------------------------------


PROMPT = r"\x1b\[\?2004h"  # the line editor asks for bracketed paste whenever it is ready


class Terminal:
    """A program at a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hrmcore", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        )
        os.close(slave)
        self.shown = ""

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Wait until the pattern shows after what was expected before; returns what led up to it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not show; there was: {self.shown!r}"
            self.shown += os.read(self._master, 65536).decode(errors="replace")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_conversation_at_a_real_terminal(checkpoint: Path, tmp_path: Path) -> None:
    terminal = Terminal("repl", str(checkpoint), "--threads", "1", "--max-new-tokens", "2000")
    try:
        terminal.expect(r"parameters, a context of 2048 tokens")
        terminal.expect(PROMPT)
        terminal.send("é" + ENTER)
        terminal.expect(r"\x1b\[\?2004l.")  # the first character of the answer
        terminal.send(CTRL_C * 3)
        terminal.expect(r"\x1b\[2m\d+ tokens, \d+ tokens/s, stopped\x1b\[0m")
        terminal.expect(PROMPT)
        terminal.send(CTRL_C)  # at the prompt
        terminal.expect(r"Ctrl-D leaves")
        terminal.send("/temperature 0.5" + ENTER)
        terminal.expect(r"temperature: 0\.5\r\n")
        terminal.expect(PROMPT)
        assert terminal.process.poll() is None
        terminal.send(CTRL_D)
        assert terminal.process.wait(timeout=60) == 0
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()
    assert "é" in (tmp_path / "state" / "hrmcore" / "history").read_text(encoding="utf-8")
