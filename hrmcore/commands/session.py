"""A session of `hrmcore repl`: questions and slash commands in, text out. What a terminal adds is in `repl`.

Every question stands for itself: a model of this kind answers an instruction, and remembers none.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from hrmcore.commands.options import printable
from hrmcore.engine.sampling import Sampling

if TYPE_CHECKING:
    from hrmcore.engine.engine import Engine, TextOptions

Number = TypeVar("Number", int, float)

# What the note under an answer says where the model did not end the answer itself.
CUT = {"length": "cut at max_new_tokens", "context": "cut at the end of the context", "closed": "stopped"}


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
    """One conversation: the model, its options, the answers so far, and the slash commands that change them.

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
        engine.text_tokenizer()
        samples = read_samples(engine.source)
        self.engine, self.samples = engine, samples
        self.name = "the embedded model" if name is None else name

    @property
    def conditions(self) -> list[str]:
        """The conditions that the model knows."""
        return list(self.engine.text_tokenizer().condition_ids)

    def handle(self, text: str) -> bool:
        """Answer a question or run a slash command; False when the user leaves. A mistake is told in one line."""
        try:
            if text.startswith("/"):
                self._run_command(text)
            elif text.strip():
                self.ask(text.strip())
        except (ValueError, OSError) as error:
            self.complain(" ".join(str(error).split()))
        return not self.leaving

    def ask(self, question: str) -> None:
        """Stream an answer, then note its speed. KeyboardInterrupt stops the answer, and is raised again."""
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
        """Answer every sample question, with the expected answer beside it, and count those that agree."""
        if not self.samples:
            self.say(f"{self.name} has no sample questions.")
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
        """A line of lesser importance: dim, and only at a terminal."""
        if self._out.isatty():
            self._write(f"\x1b[2m{printable(text)}\x1b[0m\n" if self._colors else f"{printable(text)}\n")

    def complain(self, text: str) -> None:
        """One line about what is wrong."""
        self.complaints += 1
        self.say(f"! {text}")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _run_command(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else "see /help, or begin with a space to ask it as a question"
            raise ValueError(f"unknown command {name}: {hint}")
        COMMANDS[name].act(self, argument.strip())

    def _set_condition(self, argument: str) -> None:
        if argument:
            self.engine.text_tokenizer().conditions(argument)
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
            raise ValueError(f"{path} exists already and is not overwritten: choose another name")
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self._records]
        path.write_text("".join(lines), encoding="utf-8")
        self._saved = path
        self.say(f"saved {len(lines)} answers to {path}")

    def _show_samples(self, argument: str) -> None:
        if not self.samples:
            self.say(f"{self.name} has no sample questions.")
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
