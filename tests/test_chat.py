"""A conversation becomes one instruction, as docs/serving.md says."""

from __future__ import annotations

from typing import Any

import pytest

from hrmcore.chat import render
from hrmcore.engine.engine import Engine


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_lone_question_stays_itself() -> None:
    assert render(said(("user", " what is 3 plus 4?\n\nUser: x "))) == " what is 3 plus 4?\n\nUser: x "


def test_turns_are_paragraphs() -> None:
    first = said(("system", "Be brief."), ("user", "Two?"))
    assert render(first) == "Be brief.\n\nUser: Two?"
    assert render([*first, *said(("assistant", "2"), ("user", "Three?"))]) == (
        "Be brief.\n\nUser: Two?\n\nAssistant: 2\n\nUser: Three?"
    )
    assert render(said(("user", "a"), ("user", "b"))) == "User: a\n\nUser: b"
    assert render(said(("user", "a"), ("assistant", ""), ("user", "b"))) == "User: a\n\nAssistant: \n\nUser: b"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "messages must be a list"),
        (["hello"], r"messages\[0\]: must be an object"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"content": "x"}], r"messages\[0\]: role is missing"),
        (said(("function", "x")), r"messages\[0\]: role must be one of system, user, assistant, got 'function'"),
        (said(("tool", "x")), r"messages\[0\]: tools need a model that brings a chat template"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role must be one of"),
        ([{"role": "user", "content": 7}], r"messages\[0\]: content must be text, got 7"),
        ([{"role": "user", "content": "x", "name": "y"}], r"messages\[0\]: unknown field 'name'"),
        (said(("user", " \n")), r"messages\[0\]: content is blank"),
        (said(("user", "x"), ("system", "y"), ("user", "z")), r"messages\[1\]: a system message must be the first"),
        (said(("user", "x"), ("assistant", "y")), r"messages\[1\]: the last message must be the user's"),
        (said(("system", "x")), r"messages\[0\]: the last message must be the user's"),
    ],
)
def test_what_is_wrong_is_named(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(messages)


def test_an_engine_answers_a_conversation(engine: Engine) -> None:
    turns = said(("user", "what is 1 plus 2?"), ("assistant", "3"), ("user", "copy\n1 2"))
    answer = engine.generate(render(turns), max_new_tokens=8)
    assert engine.chat(turns, max_new_tokens=8) == answer
    assert "".join(engine.stream_chat(turns, max_new_tokens=8)) == answer
    with pytest.raises(ValueError, match=r"messages\[0\]: role is missing"):
        engine.chat([{"content": "x"}])
