"""Real clients against the server: OpenAI's package, our own evaluator, lm-eval, LangChain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.served import MODEL, Served, serving

from hrmcore.chat import render
from hrmcore.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [f"what is {number} plus {number}?" for number in range(6)]


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as served:
        yield served
        served.settle()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_the_openai_client_gets_the_engine_s_answer(client: openai.OpenAI, engine: Engine) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = client.chat.completions.create(model=MODEL, messages=user(QUESTIONS[0]), max_tokens=9)
    [choice] = answer.choices
    assert choice.message.content == engine.generate(QUESTIONS[0], max_new_tokens=9)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert engine.tokenizer is not None
    assert answer.usage.prompt_tokens == len(engine.tokenizer.prompt(QUESTIONS[0]))
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (9, answer.usage.prompt_tokens + 9)


def test_a_conversation_is_rendered_as_in_python(client: openai.OpenAI, engine: Engine) -> None:
    turns: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "copy"}, {"type": "text", "text": " 1"}]},
        {"role": "assistant", "content": "1", "refusal": None},
        {"role": "user", "content": "again"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "copy 1"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "again"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=turns, max_completion_tokens=5)
    assert answer.choices[0].message.content == engine.generate(render(plain), max_new_tokens=5)


def test_streamed_chunks_make_the_same_answer(client: openai.OpenAI, engine: Engine) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=user(QUESTIONS[1]),
            max_tokens=12,
            temperature=0.8,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == engine.generate(QUESTIONS[1], max_new_tokens=12, temperature=0.8, seed=3)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_seeds_one_after_the_other(client: openai.OpenAI, engine: Engine, stream: bool) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 5, "n": 3}
    got: Any = client.chat.completions.create(model=MODEL, messages=user("copy"), stream=stream, **options)
    texts = ["", "", ""]
    if stream:
        for chunk in got:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in got.choices]
    assert texts == [engine.generate("copy", max_new_tokens=8, temperature=1.0, seed=seed) for seed in (5, 6, 7)]


def test_our_own_fields_and_stops(client: openai.OpenAI, engine: Engine) -> None:
    own = {"condition": "cot", "repetition_penalty": 1.3, "min_p": 0.01, "top_k": 40}
    whole = engine.generate("copy", max_new_tokens=20, temperature=0.9, seed=1, **own)  # type: ignore[arg-type]
    stop = whole[4:6]
    answer = client.chat.completions.create(
        model=MODEL, messages=user("copy"), max_tokens=20, temperature=0.9, seed=1, stop=[stop], extra_body=own
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model=MODEL, prompt=QUESTIONS[:3], max_tokens=6)
    assert [choice.text for choice in answer.choices] == engine.generate(QUESTIONS[:3], max_new_tokens=6)
    chunks = client.completions.create(model=MODEL, prompt=QUESTIONS[0], max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_errors_are_the_client_s_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.chat.completions.create(model=MODEL, messages=user("copy"), logprobs=True)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=user("copy"))


def test_a_stream_that_the_client_leaves_is_cancelled(served: Served, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=user("copy"), max_tokens=1900, stream=True) as stream:
        assert next(iter(stream)).choices
        assert served.service.served.open_answers == 1
    served.settle()


def test_the_async_client_many_at_once_and_some_cancelled(served: Served, engine: Engine) -> None:
    async def body() -> None:
        client = openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0)

        async def ask(number: int) -> str | None:
            answer = await client.chat.completions.create(model=MODEL, messages=user(QUESTIONS[number]), max_tokens=10)
            return answer.choices[0].message.content

        async def leave() -> None:
            task = asyncio.ensure_future(
                client.chat.completions.create(model=MODEL, messages=user("copy"), max_tokens=1900)
            )
            await asyncio.sleep(0.3)
            task.cancel()
            stream = await client.chat.completions.create(
                model=MODEL, messages=user("copy"), max_tokens=1900, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

        answers, *_ = await asyncio.gather(asyncio.gather(*map(ask, range(6))), leave(), leave())
        assert answers == engine.generate(QUESTIONS, max_new_tokens=10)
        await client.close()

    asyncio.run(body())
    served.settle()


def test_our_own_evaluator(served: Served, engine: Engine) -> None:
    from hrmcore.evals.runners import EndpointRunner

    runner = EndpointRunner(served.url, MODEL, max_new_tokens=7, seed=0)
    assert runner.answer(QUESTIONS, "direct") == engine.generate(QUESTIONS, max_new_tokens=7)


def test_lm_eval(served: Served, engine: Engine) -> None:
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(
        base_url=f"{served.url}/chat/completions", model=MODEL, num_concurrent=1, max_retries=1, tokenizer_backend=None
    )
    requests = []
    for index, question in enumerate(QUESTIONS[:2]):
        prompt = model.apply_chat_template([{"role": "user", "content": question}])
        arguments = (prompt, {"until": ["\n\n"], "max_gen_toks": 6, "temperature": 0})
        requests.append(Instance("generate_until", {}, arguments, index, ("task", index, 1)))
    expected = [engine.generate(question, max_new_tokens=6, stop="\n\n") for question in QUESTIONS[:2]]
    assert model.generate_until(requests) == expected


def test_langchain(served: Served, engine: Engine) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=served.url, api_key="none", model=MODEL, max_tokens=6, temperature=0)
    assert model.invoke(QUESTIONS[0]).content == engine.generate(QUESTIONS[0], max_new_tokens=6)
    assert "".join(piece.content for piece in model.stream(QUESTIONS[0])) == model.invoke(QUESTIONS[0]).content
