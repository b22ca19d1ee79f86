"""Jinja as a checkpoint's chat template may use it: sandboxed, and for a limited time. Needs jinja2.

Jinja's sandbox keeps a template from the interpreter, not from looping for ever. Here each turn of a loop and each call
looks at the time that the thread has worked, and a product or power is refused before it fills the memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 1.0  # of a processor; the templates of released models take some milliseconds
MOST_BUILT = 1 << 24  # characters, entries or bits of a product or a power

_TURNS = "each_turn_in_time"


class Sandbox(ImmutableSandboxedEnvironment):
    """For one rendering, whose time begins with `render`. Raises TemplateRuntimeError beyond a limit."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters[_TURNS] = self._turns
        self._ends = math.inf

    def render(self, text: str, variables: dict[str, Any]) -> str:
        """The text that a template makes of the variables."""
        self._ends = time.thread_time() + SECONDS
        return self.from_string(_LoopsInTime().visit(self.parse(text))).render(variables)

    def call(__self, __context: Context, __obj: Any, *given: Any, **named: Any) -> Any:  # noqa: N805 - Jinja's
        __self._look()
        return super().call(__context, __obj, *given, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = _size(left) * right if operator == "**" and isinstance(right, int) else _product(left, right)
        if size > MOST_BUILT:
            raise TemplateRuntimeError(f"a {operator} of the chat template is larger than {MOST_BUILT}")
        return super().call_binop(context, operator, left, right)

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._look()
            yield value

    def _look(self) -> None:
        if time.thread_time() > self._ends:
            raise TemplateRuntimeError(f"the chat template worked for more than {SECONDS:g} s")


class _LoopsInTime(NodeTransformer):
    """Loops over the same values, through the filter that looks at the time."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _TURNS, [], [], None, None, lineno=node.lineno)
        return node


def _size(value: Any) -> int:
    """Bits of a whole number, or the length of what has one; else 1."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if hasattr(value, "__len__") else 1


def _product(left: Any, right: Any) -> int:
    """The size of a product: a number of times something long, or of two numbers."""
    if isinstance(left, int) and isinstance(right, int):
        return _size(left) + _size(right)
    times = right if isinstance(right, int) else left
    return _size(left if times is right else right) * times if isinstance(times, int) else 1
