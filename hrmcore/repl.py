"""The prompt's old address: `hrmcore.commands.repl`."""

from hrmcore.commands.repl import Session, converse, read_samples

__all__ = ["Session", "converse", "read_samples"]
