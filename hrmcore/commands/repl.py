"""`hrmcore repl`: a conversation with a model at the terminal, or answers to what is piped in.

Every question stands for itself: a model of this kind answers an instruction, and remembers none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from hrmcore.commands.options import add_generation_arguments, text_options, typed_text
from hrmcore.commands.session import COMMANDS, Session

if TYPE_CHECKING:
    from hrmcore.engine.engine import Engine

EXAMPLE = """\
examples:
  hrmcore repl
  hrmcore repl checkpoint/ --temperature 0.7
  echo 'Spell this word backward (example: sun -> nus): tree' | hrmcore repl
  hrmcore repl < /dev/null      answers the sample questions of the model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore repl`."""
    parser.epilog = EXAMPLE
    parser.add_argument("model", nargs="?", help="checkpoint folder or cached hub id (default: the embedded model)")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Talk at a terminal; otherwise answer the lines of standard input, or the samples when there is none."""
    from hrmcore.engine.engine import load

    def load_named(name: str | None) -> Engine:
        return load(name, dtype=args.dtype, threads=args.threads)

    session = Session(load_named, args.model, text_options(args))
    if sys.stdin is not None and sys.stdin.isatty():
        session.introduce()
        converse(session)
        return 0
    questions = 0
    for text in join_lines(map(typed_text, sys.stdin or ())):
        questions += 1
        session.say("> " + text.replace("\n", "\n… "))
        if not session.handle(text):
            break
    if questions == 0:
        session.answer_samples()
    return 2 if session.complaints else 0


def converse(session: Session, source: Input | None = None, screen: Output | None = None) -> None:
    """Converse at a terminal until Ctrl-D or /quit. Ctrl-C drops the current line or answer, and nothing else."""
    prompt: PromptSession[str] = PromptSession(
        history=open_history(),
        multiline=True,
        prompt_continuation="… ",
        key_bindings=_keys(),
        completer=_SlashCompleter(session),
        reserve_space_for_menu=4,
        input=source,
        output=screen,
    )
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        while not session.leaving:
            _take_turn(session, prompt, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def _take_turn(session: Session, prompt: PromptSession[str], interrupt: _Interrupt) -> None:
    try:
        text = prompt.prompt("> ", handle_sigint=False)
    except KeyboardInterrupt:  # the key; no signal comes while a line is edited
        session.note("(Ctrl-D leaves)")
        return
    except EOFError:
        session.leaving = True
        return
    try:
        interrupt.armed = True
        session.handle(text)
        interrupt.armed = False
    except KeyboardInterrupt:
        interrupt.armed = False


class _Interrupt:
    """The handler of SIGINT: raises KeyboardInterrupt once while a turn is worked on, and does nothing at other times.

    A Ctrl-C that comes a moment too late must not end the program or the line editor.
    """

    armed = False

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def join_lines(lines: Iterable[str]) -> Iterator[str]:
    """Questions from lines: a \\ at the end of a line continues it on the next. Blank ones are left out."""
    parts: list[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        parts.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        if (text := "\n".join(parts)).strip():
            yield text
        parts = []
    if (text := "\n".join(parts)).strip():
        yield text


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _SlashCompleter(Completer):
    """Completes commands, conditions and paths."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            choices = [Completion(c, -len(name), display_meta=COMMANDS[c].help) for c in COMMANDS if c.startswith(name)]
            yield from choices
        elif name in ("/model", "/save"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name == "/condition":
            last = argument.rpartition(",")[2].lstrip()
            yield from (Completion(c, -len(last)) for c in self._session.conditions if c.startswith(last))


class _History(FileHistory):
    """Earlier questions in a file. A file that cannot be read or written is no error."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history() -> History:
    """The history in the user's state directory (XDG Base Directory Specification), or one in memory."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        folder = Path(state) / "hrmcore"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return InMemoryHistory()
    return _History(str(folder / "history"))
