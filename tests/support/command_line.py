"""The command line, run in the test's process."""

from __future__ import annotations

from hrmcore import cli


def hrmcore(*arguments: str) -> int:
    """The exit status of `hrmcore ARGUMENTS`."""
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)
