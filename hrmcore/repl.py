"""The prompt's old address: `hrmcore.commands.repl` and `hrmcore.commands.session`."""

from hrmcore.commands.repl import converse
from hrmcore.commands.session import Session, read_samples

__all__ = ["Session", "converse", "read_samples"]
