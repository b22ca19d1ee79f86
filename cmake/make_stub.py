"""Print hrmcore/_C.pyi: the signatures that pybind11 writes into the docstrings of the built module.

usage: python cmake/make_stub.py > hrmcore/_C.pyi   (`make stub`); tests/test_stub.py compares the two
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HEAD = '''\
# Written by cmake/make_stub.py from the built module (`make stub`); the signatures are stated in csrc/bindings/.
from collections.abc import Sequence
from typing import Protocol

class Tensor(Protocol):
    """Any DLPack producer, or a capsule of one."""

    def __dlpack__(self) -> object: ...

Output = Tensor  # written
'''
# pybind11's spelling depends on its version; what it accepts does not.
SPELLINGS = [
    (r"(typing\.)?SupportsInt( \| (typing\.)?SupportsIndex)?", "int"),
    (r"(typing\.)?SupportsFloat( \| (typing\.)?SupportsIndex)?", "float"),
    (r"collections\.abc\.(\w+)", r"\1"),
    (r"(?:typing\.)?Annotated\[((?:list|Sequence)\[\w+\]), [^\]]*\]", r"\1"),
    (r"\bList\b", "list"),
    (r"hrmcore\._C\.", ""),
]
LIMIT = 120  # columns, as in pyproject.toml


def signature(function: Any) -> str:
    """(arguments) -> result, as a stub has it."""
    text = function.__doc__.splitlines()[0]
    text = text[text.index("(") :]
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return text


def wrapped(name: str, arguments: str, indent: str) -> Iterator[str]:
    line = f"{indent}def {name}{arguments}: ..."
    if len(line) <= LIMIT:
        yield line
        return
    inside, _, result = arguments[1:].rpartition(") ->")
    yield f"{indent}def {name}("
    for argument in re.split(r", (?![^\[]*\])", inside):
        yield f"{indent}    {argument},"
    yield f"{indent}) ->{result}: ..."


def is_init(name: str, member: Any) -> bool:
    """Whether it is a constructor: a class that only the module makes has an __init__ that is none."""
    return name == "__init__" and (member.__doc__ or "").startswith("__init__(")


def members(scope: Any, indent: str = "") -> Iterator[str]:
    """Constants, then classes, then functions."""
    public = [(name, member) for name, member in sorted(vars(scope).items()) if name[0] != "_" or is_init(name, member)]
    for name, member in public:
        if isinstance(member, int):
            yield f"{indent}{name}: int"
    for name, member in public:
        if isinstance(member, type):
            yield f"\nclass {name}:"
            yield from members(member, "    ")
    yield ""
    for name, member in public:
        if isinstance(member, property):
            yield f"{indent}@property"
            yield f"{indent}def {name}(self){signature(member.fget).partition(')')[2]}: ..."
        elif callable(member) and not isinstance(member, type):
            yield from wrapped(name, re.sub(r"^\(self: \w+", "(self", signature(member)), indent)


def stub() -> str:
    from hrmcore import _C

    text = "\n".join([HEAD, *members(_C)])
    return re.sub(r":\n\n( +)", r":\n\1", re.sub(r"\n{3,}", "\n\n", text)).rstrip() + "\n"


if __name__ == "__main__":
    print(stub(), end="")
