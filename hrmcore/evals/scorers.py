"""Named rules that say whether a response gives the expected answer. `hrmcore eval --scorer` chooses one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

_MARKED = (  # what stands before an answer; its last occurrence counts, up to the end of the line
    re.compile(r"####[ \t]*(.+)"),
    re.compile(r"\b(?i:answer)(?:[ \t]+is\b[ \t]*:?|[ \t*_]*[:=])[ \t*_]*(.+)"),
)
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "`": "`", "$": "$", "_": "_"}
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def exact(response: str, expected: str) -> bool:
    """The whole response is the answer; white space around it does not count."""
    return response.strip() == expected.strip()


def first_line(response: str, expected: str) -> bool:
    """The first line of the response is the answer; what follows does not count."""
    first, *_ = response.strip().splitlines() or [""]
    return first.strip() == expected


def answer(response: str, expected: str) -> bool:
    """The response, or the answer that is found in it, is the expected one.

    Found is what the last \\boxed{} holds, else what follows the last "####" or "answer is" (or "answer:") in its
    line, else all of the response. Punctuation at its end, and brackets, quotes, $ and * around it, do not count, nor
    do commas between thousands; numbers are compared by value, texts in Unicode's normal form C. Upper case does count.
    """
    return _normal(expected) in (_normal(response), _normal(_found(response)))


SCORERS: dict[str, Callable[[str, str], bool]] = {"exact": exact, "first_line": first_line, "answer": answer}


def _found(response: str) -> str:
    if (boxed := _last_boxed(response)) is not None:
        return boxed
    for mark in _MARKED:
        if found := mark.findall(response):
            return str(found[-1])
    return response


def _last_boxed(text: str) -> str | None:
    """What the last \\boxed{…} holds, braces within it balanced; None without a whole one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return None


def _normal(text: str) -> str | Decimal:
    text = unicodedata.normalize("NFC", text).strip()
    before = None
    while text != before:
        before = text
        text = text.rstrip(".,;:! ").strip("* ") or text
        text = re.sub(r"^\\text\{(.*)\}$", r"\1", text)
        if len(text) > 2 and _PAIRS.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
            text = text[1:-1].strip()
    number = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    try:
        return Decimal(number) if _NUMBER.fullmatch(number) else text
    except InvalidOperation:
        return text
