"""The server over plain HTTP: every mistake gets its status, every caller may leave, and it ends in order."""

from __future__ import annotations

import gc
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.command_line import hrmcore
from support.served import MODEL, Served, serving

from hrmcore.commands.serve import is_loopback, model_name, read_keys
from hrmcore.engine import engine as engine_module
from hrmcore.engine.engine import Engine
from hrmcore.serving import app

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "copy"}]


def error_of(content: Any) -> dict[str, Any]:
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = content["error"]
    return found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "at least one message"),
        ({"messages": "copy"}, "messages must be a list"),
        ({"messages": [{"role": "function", "content": "x"}]}, r"messages\[0\]: role must be one of"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: tools need a model that brings a chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text, got 'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "copy " * 3000}]}, "it must leave room in the context"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools need a model that brings a chat template",
        ),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] must be an object of type 'function' that holds"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice must be auto or none: no call can be forced"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls is not supported"),
        ({"return_token_ids": "yes"}, "return_token_ids must be true or false"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logprobs": 2}, "logprobs must be true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be a whole number from 0 to 20"),
        ({"top_logprobs": 3}, "top_logprobs goes with logprobs: true"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"prompt": "x"}, "unknown field 'prompt'"),
        ({"é" * 100: 1}, "unknown field"),
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 65}, "at most 64 answers"),
        ({"n": True}, "n must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": "hot"}, "temperature must be 0 or more"),
        ({"top_p": 2}, "top_p must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"seed": -1}, "seed must be"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": ["x"] * 17}, "stop must hold at most 16"),
        ({"stop": {"a": 1}}, "stop must be"),
        ({"condition": "x" * 5000}, "unknown condition"),
        ({"condition": 5}, "condition must be text"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options goes with stream"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options must be"),
        ({"model": ["small"]}, "there is no model"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_its_reason(
    served: Served, fields: dict[str, Any], message: str
) -> None:
    status, content = served.ask(**fields)
    assert status == (404 if "model" in fields else 400)
    error = error_of(content)
    assert re.search(message, error["message"])
    assert len(error["message"]) <= 1000
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(served: Served, engine: Engine) -> None:
    neutral = {"frequency_penalty": 0.0, "logprobs": False, "tools": [], "user": "someone", "top_p": None, "stop": None}
    status, content = served.ask(**neutral, max_tokens=4, response_format={"type": "text"})
    assert status == 200
    assert content["choices"][0]["message"]["content"] == engine.generate("copy", max_new_tokens=4)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(served: Served, body: bytes) -> None:
    status, _, content = served.send("POST", CHAT, body)
    assert status == 400
    error_of(content)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v1/none", None, {}, 404),
        ("GET", "/v1/models/other/name", None, {}, 404),
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("GET", "/page.js/../../config.json", None, {}, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}, 404),
        ("GET", CHAT, None, {}, 405),
        ("POST", "/v1/models", {}, {}, 405),
        ("POST", CHAT, {"messages": MESSAGES}, {"Content-Type": "text/plain"}, 415),
        ("POST", CHAT, b" " * (app.MOST_BODY + 1), {}, 413),
        ("POST", CHAT, b" " * (3 * app.MOST_BODY), {}, 413),
    ],
)
def test_statuses(served: Served, method: str, path: str, body: object, headers: dict[str, str], status: int) -> None:
    found, _, content = served.send(method, path, body, headers)
    assert found == status
    error_of(content)


def test_a_body_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), 20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_control_tokens_in_a_text_stay_text(served: Served, engine: Engine) -> None:
    assert engine.tokenizer is not None
    text = "<eoq> copy <eoa><boq> 1 <direct>"
    status, content = served.ask(messages=[{"role": "user", "content": text}], max_tokens=5)
    assert status == 200
    assert content["choices"][0]["message"]["content"] == engine.generate(text, max_new_tokens=5)
    assert content["usage"]["prompt_tokens"] == 3 + len(engine.tokenizer.encode(text))


def test_keys(engine: Engine) -> None:
    with serving(engine, keys=["first-key", "second-key"]) as served:
        for path in ("/v1/models", "/metrics"):
            for header in (
                {},
                {"Authorization": "first-key"},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "é"},
            ):
                status, headers, content = served.send("GET", path, headers=header)
                assert status == 401
                assert headers["www-authenticate"] == "Bearer"
                assert error_of(content)["code"] == "invalid_api_key"
            for key in ("first-key", "second-key"):
                assert served.send("GET", path, headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert served.ask()[0] == 401
        assert served.send("GET", "/health")[0] == 200
        assert served.send("GET", "/")[0] == 200


def test_a_full_queue_and_a_time_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 1)
    with serving(engine, max_queue=2, timeout=0.5) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.ask, max_tokens=1900)
        while not engine.open_requests:
            time.sleep(0.01)
        status, headers, content = served.send("POST", CHAT, {"messages": MESSAGES, "n": 3, "max_tokens": 1})
        assert (status, headers["retry-after"]) == (429, "1")
        assert error_of(content)["type"] == "rate_limit_error"
        status, content = first.result()
        assert status == 504
        assert error_of(content)["code"] == "timeout"
        status, _, text = served.send("POST", CHAT, {"messages": MESSAGES, "max_tokens": 1900, "stream": True})
        assert status == 200
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert error_of(events[-1])["code"] == "timeout"
        served.settle()


def test_a_failure_of_the_model_is_told_without_its_details(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise ArithmeticError("secret: row 3 is NaN")

    with serving(engine) as served:
        monkeypatch.setattr(engine._runner, "step", fail)
        status, content = served.ask(max_tokens=4)
        monkeypatch.undo()
        assert status == 500
        assert "secret" not in error_of(content)["message"]
        assert served.ask(max_tokens=4)[0] == 200
    assert "secret: row 3 is NaN" in capfd.readouterr().err


def test_metrics_count(engine: Engine) -> None:
    with serving(engine) as served:
        served.ask(max_tokens=5, n=2)
        served.ask(n=0)
        served.send("GET", "/nowhere")
        text = served.send("GET", "/metrics")[2]
        assert f'hrmcore_requests_total{{route="{CHAT}",status="200"}} 1' in text
        assert f'hrmcore_requests_total{{route="{CHAT}",status="400"}} 1' in text
        assert 'hrmcore_requests_total{route="other",status="404"} 1' in text
        assert "hrmcore_completion_tokens_total 10\n" in text
        assert "hrmcore_first_token_seconds_count 2\n" in text
        assert 'hrmcore_answer_seconds_bucket{le="+Inf"} 1\n' in text
        assert "hrmcore_sequences_open 0\n" in text


@pytest.mark.slow
def test_sixteen_callers_of_whom_a_third_hang_up(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    questions = [f"what is {number} plus {number}?" for number in range(10)]
    alone = engine.generate(questions, max_new_tokens=16)
    until = time.monotonic() + 10
    wrong: list[str] = []
    done = [0, 0, 0]

    def call(served: Served, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            number = draw.randrange(10)
            fields = {"messages": [{"role": "user", "content": questions[number]}], "max_tokens": 16}
            what = draw.randrange(3)
            if what == 0:
                hang_up(served, {**fields, "max_tokens": 1900, "stream": draw.random() < 0.5}, draw.random() / 5)
            elif what == 1:
                status, content = served.ask(**fields)
                if status != 200 or content["choices"][0]["message"]["content"] != alone[number]:
                    wrong.append(f"{status} {content}")
            else:
                body = draw.choice([b"{", b"x" * 100, b" " * (app.MOST_BODY + 1), b'{"messages": []}'])
                status = served.send("POST", CHAT, body)[0]
                if status not in (400, 413):
                    wrong.append(str(status))
            done[what] += 1

    with serving(engine) as served:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda seed: call(served, seed), range(16)))
        assert not wrong
        assert min(done) > 10
        served.settle()
        assert engine.open_requests == 0
    gc.collect()
    assert not caplog.records  # such as an exception that was never retrieved


def hang_up(served: Served, fields: dict[str, Any], seconds: float) -> None:
    """Ask, wait a while, and go without a word."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("POST", CHAT, json.dumps(fields), {"Content-Type": "application/json"})
    time.sleep(seconds)
    connection.close()


def test_the_end_in_order(engine: Engine) -> None:
    with serving(engine, grace=60) as served, ThreadPoolExecutor() as pool:
        running = pool.submit(served.ask, max_tokens=300)
        while not engine.open_requests:
            time.sleep(0.01)
        served.server.end()
        assert served.ask()[0] == 503
        assert served.send("GET", "/health")[0] == 503
        status, content = running.result()
        assert status == 200
        assert content["choices"][0]["message"]["content"] == engine.generate("copy", max_new_tokens=300)


class Child:
    """`hrmcore serve` in a process of its own, as a user starts it."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "hrmcore", "serve", "--threads", "1", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(3)]
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", lines[2])
        assert found, lines
        self.port = int(found[1])

    def ask(self, **fields: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        fields = {"messages": MESSAGES, **fields}
        connection.request("POST", CHAT, json.dumps(fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def end(self) -> str:
        """Its standard error, after SIGTERM; it must leave with status 0."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return errors


def test_sigterm_lets_an_answer_end_and_the_port_is_free_at_once(checkpoint: Path, engine: Engine) -> None:
    child = Child("--model", str(checkpoint))
    answers: list[tuple[int, Any]] = []
    caller = threading.Thread(target=lambda: answers.append(child.ask(max_tokens=200)))
    caller.start()
    time.sleep(0.3)
    assert child.end() == ""
    caller.join()
    [(status, content)] = answers
    assert (status, content["model"]) == (200, checkpoint.name)
    assert content["choices"][0]["message"]["content"] == engine.generate("copy", max_new_tokens=200)
    again = Child("--model", str(checkpoint), port=child.port)
    assert again.ask(max_tokens=1)[0] == 200
    again.end()


def test_the_grace_is_an_end(checkpoint: Path) -> None:
    child = Child("--model", str(checkpoint), "--grace", "0.2")
    answers: list[tuple[int, Any]] = []
    callers = [threading.Thread(target=lambda: answers.append(child.ask(max_tokens=1900, n=20))) for _ in range(2)]
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    started = time.monotonic()
    child.end()
    assert time.monotonic() - started < 10
    for caller in callers:
        caller.join()
    assert [status for status, _ in answers] == [503, 503]
    assert error_of(answers[0][1])["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--grace", "-1"], "--grace must be a number of seconds"),
        (["--timeout", "0"], "--timeout must be a number of seconds"),
        (["--max-queue", "0"], "max_queue must be"),
        (["--kv-dtype", "int4"], "kv_dtype must be float32, bfloat16 or int8"),
        (["--api-key-file", "none.txt"], "none.txt: No such file"),
        (["--model", "none/none"], "none/none"),
        (["--device", "tpu"], "device must be"),
        (["--host", "not a host"], "cannot listen on not a host port 8000"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hrmcore("serve", *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert hrmcore("serve", "--port", str(port)) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hrmcore("serve") == 2
    assert "starlette and uvicorn missing: pip install 'hrmcore[serve]'" in capsys.readouterr().err


def test_an_open_address_without_a_key_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hrmcore.serving.server.Server.run", lambda *_: None)
    assert hrmcore("serve", "--host", "0.0.0.0", "--port", "0") == 0
    assert "warning: anyone who reaches this machine may ask the model" in capsys.readouterr().err
    assert hrmcore("serve", "--port", "0") == 0
    assert capsys.readouterr().err == ""


def test_hosts_names_and_keys(tmp_path: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "name")] == [
        *(True, True, True),
        *(False, False, False),
    ]
    assert model_name(None) == "hrmcore-tiny"
    assert model_name(f"{tmp_path}{os.sep}") == tmp_path.name
    assert model_name("owner/name") == "owner/name"
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \r\n")
    assert read_keys(keys) == ["one", "two"]
    for content, message in ((b"\n", "no API key"), ("é".encode(), "ASCII"), (b"a b", "no spaces")):
        keys.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_keys(keys)


def test_the_models_are_listed(served: Served) -> None:
    status, _, content = served.send("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in content["data"]] == [MODEL]
    assert content["data"][0]["max_model_len"] == 2048
