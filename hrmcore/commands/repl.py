"""`hrmcore repl`: a conversation with a model at the terminal, or answers to what is piped in.

Every question stands for itself: a model of this kind answers an instruction, and remembers none.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from hrmcore.commands.generate import add_generation_arguments, printable, text_options
from hrmcore.engine.sampling import Sampling

if TYPE_CHECKING:
    from hrmcore.engine.engine import Engine, TextOptions

EXAMPLE = """\
examples:
  hrmcore repl
  hrmcore repl checkpoint/ --temperature 0.7
  printf 'first question\\nsecond question\\n' | hrmcore repl
  hrmcore repl < /dev/null      answers the sample questions of the model
"""

Number = TypeVar("Number", int, float)

# What a note under an answer says about an answer that the model did not end itself.
CUT = {"length": "cut at max_new_tokens", "context": "cut at the end of the context", "closed": "stopped"}


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
    for text in join_lines(sys.stdin or ()):
        questions += 1
        session.say("> " + text.replace("\n", "\n… "))
        if not session.handle(text):
            break
    if questions == 0:
        session.answer_samples()
    return 2 if session.complaints else 0


@dataclass(frozen=True)
class Sample:
    """A question that ships with a model, and the answer to expect."""

    task: str
    instruction: str
    response: str


def read_samples(folder: Path) -> list[Sample]:
    """The `samples.json` of a model, none when there is no such file. Raises ValueError on a broken one."""
    path = folder / "samples.json"
    if not path.is_file():
        return []
    try:
        return [Sample(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise ValueError(f"{path}: expected a list of objects with task, instruction and response") from None


class Session:
    """One conversation: the model, the options, what was said, and the commands that change them.

    Raises ValueError on an option out of range, a broken model, or one without a tokenizer.
    """

    def __init__(
        self, load: Callable[[str | None], Engine], name: str | None, options: TextOptions, out: TextIO | None = None
    ) -> None:
        self.options = options
        self.complaints = 0
        self.leaving = False
        self._load = load
        self._out = out or sys.stdout
        self._colors = not os.environ.get("NO_COLOR")
        self._records: list[dict[str, str]] = []
        self._saved: Path | None = None
        self._open(name)
        self.engine.stream("?", **options).close()  # runs nothing, but checks the options

    def _open(self, name: str | None) -> None:
        engine = self._load(name)
        if engine.tokenizer is None:
            raise ValueError(f"{engine.source} has no tokenizer, so it cannot take a question")
        samples = read_samples(engine.source)
        self.engine, self.samples = engine, samples
        self.name = "the embedded model" if name is None else name

    @property
    def conditions(self) -> list[str]:
        """The conditions that the model knows."""
        assert self.engine.tokenizer is not None
        return list(self.engine.tokenizer.condition_ids)

    def handle(self, text: str) -> bool:
        """Answer a question or obey a command; False to leave. What is wrong with it is said in one line."""
        try:
            if text.startswith("/"):
                self._obey(text)
            elif text.strip():
                self.ask(text.strip())
        except (ValueError, OSError) as error:
            self.complain(" ".join(str(error).split()))
        return not self.leaving

    def ask(self, question: str) -> None:
        """Stream an answer and note its speed. An interruption stops it, is noted, and goes on upwards."""
        answer = self.engine.stream(question, **self.options)
        started = time.perf_counter()
        pieces = []
        try:
            for piece in answer:
                pieces.append(piece)
                self._write(printable(piece))
        finally:
            answer.close()
            seconds = time.perf_counter() - started
            note = f"{answer.token_count} tokens, {answer.token_count / max(seconds, 1e-9):.0f} tokens/s"
            self._write("\n")
            self.note(", ".join([note, *([CUT[answer.finish]] if answer.finish in CUT else [])]))
        if response := "".join(pieces).strip():
            condition = self.options["condition"]
            self._records.append({"instruction": question, "response": response, "condition": condition})

    def introduce(self) -> None:
        """The model, what it can answer, and what to try."""
        size, context = _count(self.engine.parameters), self.engine.config.context
        self.say(f"{self.name}: {size} parameters, a context of {context} tokens")
        first_of_task: dict[str, int] = {}
        for index, sample in enumerate(self.samples):
            first_of_task.setdefault(sample.task, index)
        if first_of_task:
            self.say("It answers: " + ", ".join(task.replace("_", " ") for task in first_of_task))
            self.say("Try (/samples 1 asks the first of all):")
            for index in itertools.islice(first_of_task.values(), 3):
                self.say(f"  {index + 1:2}  {_headline(self.samples[index].instruction)}")
        self.note("Alt-Enter or a \\ at the end starts a new line. Ctrl-C stops an answer, Ctrl-D leaves. See /help.")

    def answer_samples(self) -> None:
        """Answer all sample questions, the expected answers beside, and count."""
        if not self.samples:
            self.say(f"{self.name} brings no sample questions.")
            return
        right = 0
        for number, sample in enumerate(self.samples, start=1):
            self.say(f"[{number}] {sample.task}")
            self.say("\n".join("    " + line for line in sample.instruction.splitlines()))
            answer = self.engine.generate(sample.instruction, **self.options)
            good = answer.strip() == sample.response.strip()
            right += good
            shown, expected = printable(answer).splitlines(), printable(sample.response).splitlines()
            for line in _beside(["answer", *shown], ["expected", *expected]):
                self.say("  " + line)
            self.say("  " + ("as expected" if good else "different") + "\n")
        self.say(f"{right} of {len(self.samples)} answers as expected")

    def say(self, text: str) -> None:
        """One line or several to the user."""
        self._write(printable(text) + "\n")

    def note(self, text: str) -> None:
        """A line that matters less: dim, and only at a terminal."""
        if self._out.isatty():
            self._write(f"\x1b[2m{printable(text)}\x1b[0m\n" if self._colors else f"{printable(text)}\n")

    def complain(self, text: str) -> None:
        """One line about what is wrong."""
        self.complaints += 1
        self.say(f"! {text}")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _obey(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else "see /help, or begin with a space to ask it as a question"
            raise ValueError(f"unknown command {name}: {hint}")
        COMMANDS[name].act(self, argument.strip())

    def _set_condition(self, argument: str) -> None:
        if argument:
            assert self.engine.tokenizer is not None
            self.engine.tokenizer.conditions(argument)
            self.options["condition"] = argument
        self.say(f"condition: {self.options['condition']} (known: {', '.join(self.conditions) or 'none'})")

    def _set_temperature(self, argument: str) -> None:
        if argument:
            temperature = _parse(float, argument, "temperature", "a number of 0 or more, as in /temperature 0.7")
            self.options["temperature"] = Sampling(temperature=temperature).temperature
        self.say(f"temperature: {self.options['temperature']:g}")

    def _set_seed(self, argument: str) -> None:
        if argument == "none":
            self.options["seed"] = None
        elif argument:
            seed = _parse(int, argument, "seed", "a whole number of at least 0, or none, as in /seed 1")
            self.options["seed"] = Sampling(seed=seed).seed
        seed_text = "none" if self.options["seed"] is None else str(self.options["seed"])
        self.say(f"seed: {seed_text}")

    def _set_model(self, argument: str) -> None:
        if argument:
            self._open(argument)
            self.introduce()
        else:
            self.say(f"model: {self.name} ({self.engine.source})")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("/save needs a file, as in /save answers.jsonl")
        if not self._records:
            raise ValueError("there is no answer to save yet")
        path = Path(argument).expanduser()
        if path.exists() and path != self._saved:
            raise ValueError(f"{path} exists already, and stays as it is: choose another name")
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self._records]
        path.write_text("".join(lines), encoding="utf-8")
        self._saved = path
        self.say(f"saved {len(lines)} answers to {path}")

    def _show_samples(self, argument: str) -> None:
        if not self.samples:
            self.say(f"{self.name} brings no sample questions.")
        elif argument:
            count = len(self.samples)
            number = _parse(int, argument, "sample", f"a number from 1 to {count}")
            if not 1 <= number <= count:
                raise ValueError(f"sample must be a number from 1 to {count}, got {number}")
            sample = self.samples[number - 1]
            self.say(sample.instruction)
            self.ask(sample.instruction)
            self.say("expected:\n" + sample.response)
        else:
            for number, sample in enumerate(self.samples, start=1):
                self.say(f"{number:2}  {sample.task}: {_headline(sample.instruction)}")

    def _help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            self.say(f"{name + ' ' + command.usage:20}  {command.help}")
        self.say("Anything else is a question. Begin with a space to ask one that starts with a slash.")

    def _quit(self, _: str) -> None:
        self.leaving = True


@dataclass(frozen=True)
class Command:
    """One slash command: its argument, its line in /help, and what does it."""

    usage: str
    help: str
    act: Callable[[Session, str], None]


COMMANDS = {
    "/condition": Command("[NAMES]", "show or set how to answer: direct, cot, …", Session._set_condition),
    "/temperature": Command("[T]", "show or set the temperature; 0 is greedy", Session._set_temperature),
    "/seed": Command("[N|none]", "show or set the seed of the draws", Session._set_seed),
    "/model": Command("[PATH]", "show the model, or load another", Session._set_model),
    "/save": Command("FILE", "write questions and answers as JSON lines", Session._save),
    "/samples": Command("[N]", "list the sample questions, or ask the N-th", Session._show_samples),
    "/help": Command("", "show this list", Session._help),
    "/quit": Command("", "leave; so does Ctrl-D", Session._quit),
}


def converse(session: Session, source: Input | None = None, screen: Output | None = None) -> None:
    """The loop at a terminal: until Ctrl-D or /quit. Ctrl-C only ever drops the current line or answer."""
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
    """What SIGINT does: raise KeyboardInterrupt, once, while a turn is worked on. At any other time a Ctrl-C that
    comes a moment too late must end neither the program nor the line editor."""

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
    """Earlier questions in a file; one that cannot be read or written does not matter."""

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


def _parse(kind: Callable[[str], Number], text: str, name: str, expected: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be {expected}, got {text!r}") from None


def _count(number: int) -> str:
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _headline(text: str, width: int = 90) -> str:
    lines = text.strip().splitlines()
    first = lines[0] if len(lines) == 1 else f"{lines[0]} …"
    return first if len(first) <= width else first[: width - 1] + "…"


def _beside(left: list[str], right: list[str]) -> Iterator[str]:
    width = max(map(len, left))
    for a, b in itertools.zip_longest(left, right, fillvalue=""):
        yield f"{a:{width}}   {b}".rstrip()
