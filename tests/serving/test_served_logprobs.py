"""Log probabilities and shared prefills over HTTP, read by OpenAI's own client: what Engine.generate gives."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from support.served import MODEL, Served

from hrmcore.engine.engine import Engine
from hrmcore.engine.streams import TokenLogprob, TokenScore

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "what is 3 plus 4?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


def compare(content: list[Any], expected: list[TokenLogprob]) -> None:
    assert len(content) == len(expected)

    def same(ours: TokenScore, served: Any) -> None:
        assert (served.token, served.logprob) == (ours.text, ours.logprob)
        assert served.bytes is None or bytes(served.bytes).decode() == ours.text

    for one, given in zip(expected, content, strict=True):
        same(one, given)
        assert len(given.top_logprobs) == len(one.top)
        for top, shown in zip(one.top, given.top_logprobs, strict=True):
            same(top, shown)


@pytest.mark.parametrize("top", [0, 3])
def test_a_chat_has_those_of_the_engine(client: openai.OpenAI, engine: Engine, top: int) -> None:
    expected = engine.generate(QUESTION, logprobs=top, max_new_tokens=20)
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=top).choices[0]
    assert choice.message.content == expected.text
    assert choice.logprobs is not None
    compare(choice.logprobs.content or [], expected.logprobs)
    text, content = "", []
    for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=top, stream=True):
        for part in chunk.choices:
            text += part.delta.content or ""
            if part.logprobs is not None:
                content += part.logprobs.content or []
                shown = "".join(one.token for one in content)
                assert "\ufffd" in shown or shown == text  # each chunk has those of its own text
    assert text == expected.text
    compare(content, expected.logprobs)
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_a_completion_has_those_of_the_engine(client: openai.OpenAI, engine: Engine) -> None:
    prompts = [QUESTION, "copy\n1 2"]
    expected = engine.generate(prompts, logprobs=2, max_new_tokens=12)
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompts, "max_tokens": 12, "logprobs": 2}
    for choice, scored in zip(client.completions.create(**asked).choices, expected, strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.tokens == [one.text for one in scored.logprobs]
        assert found.token_logprobs == [one.logprob for one in scored.logprobs]
        assert found.top_logprobs == [{top.text: top.logprob for top in one.top} for one in scored.logprobs]
        offsets = [len("".join(one.text for one in scored.logprobs[:count])) for count in range(len(scored.logprobs))]
        assert found.text_offset == offsets
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in client.completions.create(**asked, stream=True):
        for part in chunk.choices:
            if part.logprobs is not None:
                streamed[part.index] += zip(part.logprobs.tokens or [], part.logprobs.text_offset or [], strict=True)
    for index, scored in enumerate(expected):
        assert [text for text, _ in streamed[index]] == [one.text for one in scored.logprobs]
        assert [place for _, place in streamed[index]][1:] == [
            len("".join(one.text for one in scored.logprobs[:count])) for count in range(1, len(scored.logprobs))
        ]


@pytest.mark.parametrize("wrong", [6, -1, True, "2", 1.5])
def test_a_completion_takes_at_most_five(client: openai.OpenAI, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs must be a whole number from 0 to 5") as refused:
        client.completions.create(model=MODEL, prompt="copy", extra_body={"logprobs": wrong})
    assert refused.value.param == "logprobs"


def test_several_answers_to_one_prompt_read_it_once(client: openai.OpenAI, engine: Engine, served: Served) -> None:
    question, seed = "copy this line, and nothing else, four times", 11
    before = engine.reused_prefills
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], n=4, temperature=1.0, seed=seed, max_tokens=9
    )
    assert engine.reused_prefills == before + 3
    for index, choice in enumerate(answer.choices):
        alone = engine.generate(question, temperature=1.0, seed=seed + index, max_new_tokens=9)
        assert choice.message.content == alone
    assert engine.reused_prefills == before + 7
    metrics = served.send("GET", "/metrics")[2]
    assert f"hrmcore_prefills_reused_total {before + 7}\n" in metrics
