"""The lens over HTTP: against the lens in torch, behind the same key and queue as the answers."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import Served, serving

from hrmcore.engine.engine import Engine, load
from hrmcore.engine.runner import Interrupted
from hrmcore.lens import look
from hrmcore.lens_names import token_name, visit_name
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

LENS = "/v1/lens"
MESSAGES = [{"role": "user", "content": "copy 1 2"}]


def answered(served: Served, **fields: Any) -> list[int]:
    """The token ids of an answer, as the server tells them."""
    status, content = served.ask(messages=MESSAGES, max_tokens=6, return_token_ids=True, **fields)
    assert status == 200
    ids: list[int] = content["choices"][0]["token_ids"]
    return ids


def test_token_ids_are_those_of_the_engine_whole_and_streamed(served: Served, engine: Engine) -> None:
    expected = list(engine.tokens(engine.prompt_ids("copy 1 2"), max_new_tokens=6))
    assert answered(served) == expected
    body = {"messages": MESSAGES, "max_tokens": 6, "return_token_ids": True, "stream": True}
    text = served.send("POST", "/v1/chat/completions", body)[2]
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [index for chunk in chunks for index in chunk["choices"][0]["token_ids"]] == expected
    assert "token_ids" not in served.ask(max_tokens=2)[1]["choices"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_engine_sees_what_the_head_reads_after_every_layer(checkpoint: Path, dtype: str) -> None:
    """The last row has the bits of the step; in float32 every row is the torch lens's, to the precision of float32."""
    engine = load(checkpoint, dtype=dtype)
    prompt = engine.prompt_ids("copy 1 2")
    for ids, prefix in ((prompt, len(prompt)), ([*prompt, 5, 9, 11], len(prompt))):
        rows = engine.layers(ids, prefix)
        assert rows.shape == (engine.config.cache_slots, engine.config.vocab_size)
        assert np.array_equal(rows[-1], engine.logits(ids, prefix)[-1].numpy())
        assert len({row.tobytes() for row in rows}) == len(rows)
        if dtype == "float32":
            theirs = look(HRM.from_pretrained(checkpoint), ids, prefix).logits.numpy()
            assert np.linalg.norm(rows - theirs) < 1e-5 * np.linalg.norm(theirs)
    assert engine.open_requests == 0


def test_how_a_token_formed(served: Served, engine: Engine, checkpoint: Path) -> None:
    ids = answered(served)
    tokenizer = engine.text_tokenizer()
    prompt = engine.prompt_ids("copy 1 2")
    model = HRM.from_pretrained(checkpoint)
    for token in (0, 3, len(ids)):
        status, _, report = served.send("POST", LENS, {"messages": MESSAGES, "answer": ids, "token": token})
        assert status == 200
        seen = look(model, [*prompt, *ids[:token]], len(prompt))
        expected = ids[token] if token < len(ids) else seen.answer
        assert report["answer"]["token"] == expected
        assert report["answer"]["text"] == token_name(tokenizer, expected)
        assert report["tokens"] == [token_name(tokenizer, index) for index in ids]
        probabilities = seen.logits.double().softmax(-1)
        for found, step, shares in zip(report["steps"], seen.steps, probabilities, strict=True):
            assert (found["visit"], found["layer"]) == (visit_name(step.h, step.stack, step.l), step.layer)
            assert (found["token"], found["text"]) == (step.token, token_name(tokenizer, step.token))
            # The engine's float32 differs in the last bits; JSON has six digits.
            assert found["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
            assert found["kl"] == pytest.approx(step.kl, abs=1e-4)
        for one in [report["answer"], *report["contenders"]]:
            assert one["probabilities"] == pytest.approx(probabilities[:, one["token"]].tolist(), abs=1e-5)
        best = probabilities.sum(0).argsort(descending=True)[:4].tolist()
        others = [one["token"] for one in report["contenders"]]
        assert others[:3] == [one for one in best if one != expected][:3]
        assert report["model"] == "small"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"messages": None}, "messages is missing", "messages"),
        ({"messages": []}, "at least one message", "messages"),
        ({"answer": "ids"}, "answer must be a list of token ids", "answer"),
        ({"answer": [True]}, "answer must be a list of token ids", "answer"),
        ({"answer": [1 << 40]}, "answer must hold token ids below 300", "answer"),
        ({"answer": [-1]}, "answer must hold token ids below 300", "answer"),
        ({"token": 1}, "token must be from 0 to the 0 of the answer", "token"),
        ({"token": "first"}, "token must be", "token"),
        ({"condition": "shout"}, "unknown condition", None),
        ({"condition": 3}, "condition must be text", "condition"),
        ({"temperature": 0}, "unknown field 'temperature'", "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools need a model", "tools"),
        ({"answer": [5] * 3000, "token": 2900}, "there is no room in the context of 2048", None),
        ({"model": "gpt"}, "there is no model", "model"),
    ],
)
def test_a_mistake_is_refused(served: Served, fields: dict[str, Any], message: str, param: str | None) -> None:
    status, _, content = served.send("POST", LENS, {"messages": MESSAGES, **fields})
    assert status == (404 if "model" in fields else 400)
    assert re.search(message, content["error"]["message"])
    assert content["error"]["param"] == param


def test_it_is_behind_the_key(engine: Engine) -> None:
    with serving(engine, keys=["a-key"]) as served:
        assert served.send("POST", LENS, {"messages": MESSAGES})[0] == 401
        assert served.send("POST", LENS, {"messages": MESSAGES}, {"Authorization": "Bearer a-key"})[0] == 200


class Held:
    """An engine whose looks wait until they are let go, or stopped."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.looking, self.stopped = threading.Event(), 0, 0
        layers = engine.layers

        def slow(ids: Any, prefix: Any, stop: Any) -> Any:
            self.looking += 1
            while not self.go.wait(0.01):
                if stop():
                    self.stopped += 1
                    raise Interrupted
            return layers(ids, prefix, stop)

        monkeypatch.setattr(engine, "layers", slow)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_look_at_a_time_in_a_bounded_queue(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(engine, monkeypatch)
    with serving(engine, max_queue=2) as served, ThreadPoolExecutor() as pool:
        asked = [pool.submit(served.send, "POST", LENS, {"messages": MESSAGES}) for _ in range(2)]
        until(lambda: served.service.looks.waiting == 2)
        status, headers, content = served.send("POST", LENS, {"messages": MESSAGES})
        assert (status, headers["retry-after"], content["error"]["code"]) == (429, "1", "queue_full")
        assert held.looking == 1
        held.go.set()
        assert [look.result()[0] for look in asked] == [200, 200]
        served.settle()


def test_a_caller_who_leaves_stops_the_look(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(engine, monkeypatch)
    with serving(engine) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.request("POST", LENS, json.dumps({"messages": MESSAGES}), {"Content-Type": "application/json"})
        until(lambda: held.looking)
        connection.close()
        until(lambda: held.stopped == 1)
        held.go.set()
        assert served.send("POST", LENS, {"messages": MESSAGES})[0] == 200
        served.settle()


def test_a_look_has_a_time_limit_and_an_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(engine, monkeypatch)
    with serving(engine, timeout=0.2) as served:
        status, _, content = served.send("POST", LENS, {"messages": MESSAGES})
        assert (status, content["error"]["code"], held.stopped) == (504, "timeout", 1)
        served.server.end()
        status, _, content = served.send("POST", LENS, {"messages": MESSAGES})
        assert (status, content["error"]["code"]) == (503, "shutting_down")
