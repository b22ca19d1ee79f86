"""Real clients against the server: OpenAI's package, our own evaluator, lm-eval, LangChain."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from support.served import MODEL, Served, serving

from hrmcore.chat import render
from hrmcore.engine.engine import Engine, load

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [f"what is {number} plus {number}?" for number in range(6)]


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
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        client.chat.completions.create(model=MODEL, messages=user("copy"), logit_bias={"5": 1})
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
    model = ChatOpenAI(base_url=served.url, api_key="none", model=MODEL, max_tokens=6, temperature=0)
    assert model.invoke(QUESTIONS[0]).content == engine.generate(QUESTIONS[0], max_new_tokens=6)
    assert "".join(piece.content for piece in model.stream(QUESTIONS[0])) == model.invoke(QUESTIONS[0]).content


def test_langchain_leaves_in_the_middle(served: Served) -> None:
    model = ChatOpenAI(base_url=served.url, api_key="none", model=MODEL, max_tokens=1900, temperature=0)
    pieces = model.stream("copy")
    assert next(pieces) is not None
    pieces.close()
    served.settle()


TOOL_TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls | tojson }};{% endfor %}"
)


def test_tools_of_the_clients_reach_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """A tool that LangChain derives from a function, and a call of it in the history, as the template sees them."""
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    def weather(place: str) -> str:
        """Tell the weather of a place."""
        return place

    folder = tmp_path / "tools"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    engine = load(folder)
    call = {"name": "weather", "args": {"place": "copy"}, "id": "call_1"}
    turns = [HumanMessage("what is 3?"), AIMessage("", tool_calls=[call]), ToolMessage("12", tool_call_id="call_1")]
    described = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    function = {"name": "weather", "description": "Tell the weather of a place.", "parameters": described}
    parsed = [
        {"role": "user", "content": "what is 3?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"place": "copy"}}}]},
        {"role": "tool", "content": "12", "tool_call_id": "call_1"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": function}]
    with serving(engine) as served:
        model = ChatOpenAI(base_url=served.url, api_key="none", model=MODEL, max_tokens=6, temperature=0)
        answer = model.bind_tools([weather]).invoke(turns)
    assert answer.content == engine.chat(parsed, tools, max_new_tokens=6)
    assert answer.usage_metadata["input_tokens"] == len(engine.prompt_ids(engine.conversation(parsed, tools)))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(served: Served, engine: Engine) -> None:
    def curl(*arguments: str, body: object) -> str:
        command = ["curl", "--silent", "--show-error", "--json", json.dumps(body), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    url = f"{served.url}/chat/completions"
    body = {"messages": user(QUESTIONS[0]), "max_tokens": 6}
    expected = engine.generate(QUESTIONS[0], max_new_tokens=6)
    assert json.loads(curl(url, body=body))["choices"][0]["message"]["content"] == expected
    lines = curl("--no-buffer", url, body={**body, "stream": True}).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert curl("--output", "/dev/null", "--write-out", "%{http_code}", url, body={}) == "400"


@pytest.mark.slow
def test_the_command_of_lm_eval(served: Served, engine: Engine, tmp_path: Path) -> None:
    """`lm_eval --model local-chat-completions`, on a task whose first answer is the model's own."""
    said = engine.generate(QUESTIONS[0], max_new_tokens=6, stop="\n\n")
    documents = [{"question": QUESTIONS[0], "answer": said}, {"question": QUESTIONS[1], "answer": "no such answer"}]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "toy.yaml").write_text(f"""task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "documents.jsonl"}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 6, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match}}]
""")
    arguments = ["--model", "local-chat-completions", "--apply_chat_template", "--tasks", "toy"]
    arguments += [
        "--model_args",
        f"model={MODEL},base_url={served.url}/chat/completions,num_concurrent=2,max_retries=1",
    ]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=quiet)
    [results] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["toy"]["exact_match,none"] == 0.5
