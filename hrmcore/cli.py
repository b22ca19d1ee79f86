"""The `hrmcore` command: finds the module of a subcommand, runs it, and turns errors into exit codes.

0 is success, 2 a mistake in what was given (one line says which), 1 a failure, 130 an interruption. A subcommand's
module has `add_arguments(parser)` and `run(args) -> int`, and is imported only when it is used.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_TRAINING = "take a smaller batch_tokens or model, or a narrower precision; `hrmcore plan` estimates a run's peak"


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in `hrmcore --help`, where it lives, and what helps when memory runs out."""

    help: str
    module: str
    memory: str = "take a smaller model or a shorter prompt, or a narrower --dtype where the command has it"


# As `hrmcore --help` groups them.
GROUPS = {
    "answer questions": {
        "generate": Command("answer one question", "hrmcore.commands.generate"),
        "repl": Command("talk to a model at the terminal", "hrmcore.commands.repl"),
        "serve": Command("put a model behind an address", "hrmcore.commands.serve"),
        "eval": Command("ask a model questions and score its answers", "hrmcore.commands.eval"),
        "convert": Command("pack a checkpoint for the CPU engine, or write it as GGUF", "hrmcore.commands.convert"),
    },
    "train a model": {
        "init": Command("propose a run file for records and a time budget", "hrmcore.commands.init"),
        "prepare": Command("tokenise records into a store to train from", "hrmcore.commands.prepare"),
        "plan": Command("estimate what a training run costs", "hrmcore.commands.plan", _TRAINING),
        "train": Command("train a model as a run file says", "hrmcore.commands.train", _TRAINING),
        "sweep": Command("train a run file with several values of its keys", "hrmcore.commands.sweep", _TRAINING),
        "export": Command("write a training state as a checkpoint", "hrmcore.commands.export"),
        "grow": Command("make a larger model that computes the same", "hrmcore.commands.grow"),
    },
    "look at results": {
        "plot": Command("draw the curves of a training run", "hrmcore.commands.plot"),
        "inspect": Command("show which token each cycle and layer would answer", "hrmcore.commands.inspect"),
        "bench": Command("check and time the ops", "hrmcore.commands.bench"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Raises SystemExit as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        _let_threads_sleep()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a narrow encoding must not end an answer
    args = _parser(arguments).parse_args(arguments)
    try:
        status = importlib.import_module(COMMANDS[args.command].module).run(args)
        sys.stdout.flush()
        return int(status)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `hrmcore generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"hrmcore {args.command}: {explain(error).removeprefix(f'{args.command}: ')}", file=sys.stderr)
        return 2
    except ArithmeticError as error:  # a training run or an answer is no number any more, whatever was given
        if isinstance(error, (OverflowError, ZeroDivisionError)):
            raise  # those are mistakes of ours
        print(f"hrmcore {args.command}: {explain(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"hrmcore {args.command}: {_memory(error)}; {COMMANDS[args.command].memory}", file=sys.stderr)
        return 1


def _let_threads_sleep() -> None:
    """Have torch's threads sleep while they wait for each other, unless the user has said how they are to wait.

    They would spin for milliseconds, and keep a thread that another program has driven from its processor from getting
    theirs: half of the speed that is due beside one busy process (bench/speed/busy.py). The OpenMP runtime reads the
    variable when torch is imported, which no module has done yet.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out in Python, the engine or torch, which raises a plain RuntimeError on the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)


def _memory(error: Exception) -> str:
    """What ran out. The engine says which memory and how much; torch's text is of many lines."""
    own = isinstance(error, MemoryError) and type(error).__name__ == "MemoryError" and str(error)
    return explain(error) if own else "out of memory"


def explain(error: Exception) -> str:
    """An exception as one line for a person."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hrmcore",
        description="Train, grow and run hierarchical recurrent language models.",
        usage="hrmcore [-h] [--version] COMMAND ...",
        epilog=_listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = "print the version, the instruction set and whether CUDA is built in"
    parser.add_argument("--version", action=_Version, nargs=0, help=version)
    hidden = argparse.SUPPRESS  # argparse cannot group subcommands: the epilog lists them
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=hidden, prog="hrmcore")
    for name, command in COMMANDS.items():
        described = f"{command.help[0].upper()}{command.help[1:]}."
        formatter = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=command.help, description=described, formatter_class=formatter)
        if arguments[:1] == [name]:
            importlib.import_module(command.module).add_arguments(sub)
    return parser


def _listed() -> str:
    """The commands, a group after the other, and where to read on."""
    lines = []
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<10} {command.help}" for name, command in commands.items()), ""]
    return "\n".join([*lines, "hrmcore COMMAND --help explains a command and shows an example."])


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import hrmcore

        try:
            from hrmcore import _C
        except ImportError as error:  # HRMCORE_ISA names no instruction set of this processor
            parser.exit(2, f"hrmcore: {explain(error)}\n")
        cuda = Path(_C.__file__).with_name("_C_cuda.so").exists()
        print(f"hrmcore {hrmcore.__version__}, instruction set {_C.isa()}, {'with' if cuda else 'without'} CUDA")
        parser.exit()
