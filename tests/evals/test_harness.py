"""Scoring and the eval command: intervals, runners, and what a mistake looks like."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import hrmcore

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.engine.engine import Engine, load
from hrmcore.evals import iq, reasoning_gym
from hrmcore.evals.harness import Question, Task, evaluate, records_task, table, tally, wilson
from hrmcore.evals.runners import EngineRunner, TransformersRunner
from hrmcore.growth.files import grow_files
from hrmcore.growth.operators import grow
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")


# --- scores --------------------------------------------------------------------------------------------------------


def test_wilson_is_the_published_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3, to four decimals."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), (low, high) in published.items():
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    for n in (1, 7, 1000):
        assert wilson(0, n)[0] == 0 < wilson(0, n)[1]
        assert wilson(n, n)[1] == 1 > wilson(n, n)[0]
    with pytest.raises(ValueError, match="right must be"):
        wilson(3, 2)


def test_a_score_counts_what_was_answered() -> None:
    questions = tuple(Question(str(i), str(i), 0.5, condition) for i, condition in enumerate(["direct", "cot"] * 3))
    task = Task("t", "f", questions, lambda index, answer: {"right": 1.0, "half": 0.5}.get(answer, 0.0))
    score = tally(task, ["right", "half", None, "wrong", "right", None])
    assert (score.n, score.right, score.too_long, score.chance) == (6, 2, 2, 0.5)
    assert (score.accuracy, score.score) == pytest.approx((1 / 3, 2.5 / 6))
    assert (score.low, score.high) == wilson(2, 6)
    assert "2 too long" in table([score])


def test_answers_come_back_to_their_questions() -> None:
    """Conditions are asked one after the other; every answer must still meet its own question."""

    class Echo:
        name = "echo"
        asked: list[tuple[str, str]] = []  # noqa: RUF012

        def answer(self, prompts: Sequence[str], condition: str) -> list[str | None]:
            self.asked += [(prompt, condition) for prompt in prompts]
            return list(prompts)

    questions = tuple(Question(f"q{i}", f"q{i}", condition=c) for i, c in enumerate(["direct", "cot", "direct"]))
    score = evaluate(Task("t", "f", questions, lambda i, answer: float(answer == questions[i].answer)), Echo())
    assert score.right == 3
    assert Echo.asked == [("q0", "direct"), ("q2", "direct"), ("q1", "cot")]
    assert score.chance is None


# --- records and reasoning-gym -------------------------------------------------------------------------------------


def test_records_are_matched_exactly_and_sampled(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [{"instruction": f"i{i}", "response": f"r {i}\n", "condition": "cot"} for i in range(30)]
    path.write_text("\n".join(json.dumps(record) for record in records))
    task = records_task(str(path), 30, 0)
    assert [q.prompt for q in task.questions] == [f"i{i}" for i in range(30)]
    assert task.questions[0].condition == "cot"
    assert task.score(3, " r 3 ") == 1
    assert task.score(3, "r  3") == task.score(3, "r 3\nx") == 0
    few = records_task(str(path), 5, 0)
    assert len({q.prompt for q in few.questions}) == 5
    assert few.questions == records_task(str(path), 5, 0).questions != records_task(str(path), 5, 1).questions
    assert few.score(0, few.questions[0].answer) == 1


def test_reasoning_gym_scores_its_own_tasks() -> None:
    task = reasoning_gym.task("chain_sum", 5, 3)
    assert [task.score(i, q.answer) for i, q in enumerate(task.questions)] == [1.0] * 5
    assert task.score(0, task.questions[1].answer) < 1
    assert task.questions == reasoning_gym.task("chain_sum", 5, 3).questions
    # A puzzle with several solutions: any of them counts, which exact match would not see.
    game = reasoning_gym.task("countdown", 5, 0)
    assert game.score(0, game.questions[0].answer.replace(" ", "")) == 1


# --- our engine and transformers -----------------------------------------------------------------------------------


def test_our_engine_is_asked_in_batches(checkpoint: Path, engine: Engine) -> None:
    prompts = [f"what is {i} plus {j}?" for i in range(11) for j in range(6)]  # more than a batch
    runner = EngineRunner(str(checkpoint), "auto", None, max_new_tokens=5)
    answers = runner.answer([*prompts, "1 " * 3000], "direct")
    assert answers[-1] is None  # longer than the context
    assert answers[:-1] == [engine.generate(prompt, max_new_tokens=5) for prompt in prompts]
    assert runner.answer(prompts[:1], "cot") == [engine.generate(prompts[0], max_new_tokens=5, condition="cot")]


def test_transformers_gives_our_engines_answers(checkpoint: Path) -> None:
    """The same float32 checkpoint through two implementations: prompts of unequal length, batched, greedy."""
    prompts = ["what is 3 plus 4?", "copy\n1 2\n3 4", "é", "what is 12 plus 34? what is 5 plus 6?"]
    ours = EngineRunner(str(checkpoint), "float32", None, max_new_tokens=12).answer(prompts, "direct")
    theirs = TransformersRunner(str(checkpoint), max_new_tokens=12).answer([*prompts, "1 " * 3000], "direct")
    assert theirs == [*ours, None]
    assert len(set(ours)) > 1


def test_rows_of_the_head_that_no_word_belongs_to_are_no_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a checkpoint whose vocabulary is padded, or was grown: such a row may well be the likeliest."""
    model = HRM.from_pretrained(checkpoint)
    known = model.config.vocab_size
    padded = grow(model, vocab_size=known + 8)
    with torch.no_grad():
        padded.lm_head.weight[known:] = 4 * padded.lm_head.weight[10:18]
    save_model(padded, tmp_path, tokenizer_folder=checkpoint)
    engine = load(tmp_path, dtype="float32")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.prompt("what is 3 plus 4?")
    tokens = list(engine.tokens(prompt, max_new_tokens=12))
    assert {token < known for token in tokens} == {True, False}
    text = engine.tokenizer.decode([token for token in tokens if token < known])
    assert engine.generate("what is 3 plus 4?", max_new_tokens=12) == text
    assert TransformersRunner(str(tmp_path), 12).answer(["what is 3 plus 4?"], "direct") == [text]
    options = ["--model", str(tmp_path), "--watch", "--max-new-tokens", "12"]
    assert hrmcore("inspect", "what is 3 plus 4?", *options) == 0
    assert f"#{next(token for token in tokens if token >= known)} " in capsys.readouterr().out


def test_any_transformers_model_answers(tmp_path: Path) -> None:
    """A tiny Llama: in a batch every prompt gets the answer that it gets alone, with and without a chat template."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", *(str(i) for i in range(60)), "what", "is", "plus", "user:"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    prompts = ["what is 3 plus 4", "7", "what is 1 plus 2 plus 3 plus 4", "1 " * 70]
    answers = []
    for template in (None, "{% for m in messages %}user: {{ m.content }} {% endfor %}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        runner = TransformersRunner(str(tmp_path), max_new_tokens=6)
        together = runner.answer(prompts, "direct")
        assert together[:3] == [runner.answer([prompt], "direct")[0] for prompt in prompts[:3]]
        assert together[3] is None
        assert all(answer and not answer.startswith("what") for answer in together[:3])
        answers.append(together)
    assert answers[0] != answers[1]


# --- an endpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict[str, Any]], tuple[int, bytes]]], str]]:
    """Start servers that answer every POST as a function says; returns their URL."""
    servers = []

    def start(respond: Callable[[dict[str, Any]], tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, payload = respond(body) if self.path == "/v1/chat/completions" else (404, b"{}")
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


def test_an_endpoint_is_asked(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that solves what it is asked: every question must reach it whole, and its answer the right question."""
    asked = []
    solvers = {q.prompt: iq.TASKS[n].solve for n in iq.TASKS for noise in (0, 2) for q in iq.questions(n, 3, 5, noise)}

    def respond(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body)
        prompt = body["messages"][0]["content"]
        return 200, completion(solvers[prompt](prompt) + "\n")

    out, picture = tmp_path / "results.json", tmp_path / "results.png"
    options = ["--n", "3", "--noise", "0,2", "--seed", "5", "--out", str(out), "--plot", str(picture)]
    assert hrmcore("eval", "--tasks", "iq", "--model", "m", "--endpoint", serve(respond), *options) == 0
    result = json.loads(out.read_text())
    assert len(result["tasks"]) == 6 + 3 * 2
    assert all(task["accuracy"] == 1 and task["n"] == 3 for task in result["tasks"])
    assert {(b["model"], b["temperature"], b["max_tokens"], b["seed"]) for b in asked} == {("m", 0, 64, 5)}
    assert picture.read_bytes().startswith(b"\x89PNG")
    table_lines = capsys.readouterr().out.splitlines()
    assert len(table_lines) == 2 + len(result["tasks"])
    assert "two_supporting_facts, noise 2" in table_lines[-1]


@pytest.mark.parametrize(
    ("status", "payload", "message"),
    [
        (401, b'{"error": {"message": "no such key"}}', "refused with status 401"),
        (404, b"not found", "refused with status 404"),
        (200, b'{"choices": []}', "without choices"),
        (200, b'{"hello": 1}', "without choices"),
        (200, b'{"choices": [{}]}', "without choices"),
        (200, b'{"choices": [{"message": {"content": 3}}]}', "without choices"),
        (200, b'["text"]', "without choices"),
        (200, b"<html>", "not JSON"),
    ],
)
def test_an_endpoint_that_refuses_is_one_line(
    status: int, payload: bytes, message: str, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(lambda _: (status, payload))
    assert hrmcore("eval", "--tasks", "counting", "--n", "2", "--model", "m", "--endpoint", url) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert url in err
    assert message in err


# --- the command ---------------------------------------------------------------------------------------------------


def test_eval_asks_our_engine(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.jsonl"
    engine = EngineRunner(str(checkpoint), "auto", None, max_new_tokens=4)
    [known] = engine.answer(["what is 3 plus 4?"], "direct")
    assert known
    records = [{"instruction": "what is 3 plus 4?", "response": known}, {"instruction": "é", "response": "no"}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    out = tmp_path / "results.json"
    arguments = ["--tasks", f"{path},counting", "--n", "4", "--max-new-tokens", "4", "--out", str(out)]
    assert hrmcore("eval", "--model", str(checkpoint), *arguments) == 0
    first, second = json.loads(out.read_text())["tasks"]
    assert (first["task"], first["n"], first["right"], first["chance"]) == ("records.jsonl", 2, 1, None)
    assert (second["task"], second["n"], second["family"]) == ("counting", 4, "rule_understanding")
    assert "50.0%" in capsys.readouterr().out


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --tasks"),
        (["--tasks", "counting,telepathy"], "unknown task 'telepathy'; there are: iq, symbolic_mapping"),
        (["--tasks", ""], "unknown task ''"),
        (["--tasks", "reasoning_gym:telepathy"], "reasoning_gym has no task 'telepathy'"),
        (["--tasks", "no/such/file.jsonl"], "no/such/file.jsonl: No such file"),
        (["--tasks", "BROKEN"], "broken.jsonl:2: 'response' is missing"),
        (["--tasks", "EMPTY"], "empty.jsonl: no records"),
        (["--tasks", "counting", "--n", "0"], "--n must be at least 1"),
        (["--tasks", "key_retrieval", "--noise", "4,many"], "--noise must be whole numbers"),
        (["--tasks", "key_retrieval", "--noise", "-4"], "--noise must be whole numbers"),
        (["--tasks", "counting", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--tasks", "counting", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (
            ["--tasks", "counting", "--model", "no/such/folder", "--transformers"],
            "no/such/folder: no such folder, and no",
        ),
        (["--tasks", "counting", "--transformers"], "--transformers needs --model"),
        (["--tasks", "counting", "--endpoint", "http://127.0.0.1:1/v1"], "--endpoint needs --model"),
        (["--tasks", "counting", "--endpoint", "localhost", "--model", "m"], "--endpoint must be a URL"),
        (["--tasks", "counting", "--endpoint", "CLOSED", "--model", "m"], "cannot be reached"),
        (
            ["--tasks", "counting", "--model", "UNEQUAL", "--transformers"],
            "transformers cannot load it (KeyError: 'hrm",
        ),
        (["--tasks", "counting", "--out", "no/such/folder/x.json"], "no such folder"),
        (["--tasks", "counting", "--plot", "no/such/folder/x.png"], "no such folder"),
        (["--tasks", "counting", "--plot", "curve.docx"], "curve.docx: a picture's name must end in one of"),
        (["--tasks", "counting", "--transformers", "--endpoint", "http://h/v1"], "not allowed with"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """UNEQUAL is a model of ours that the hrm_text format has no word for: L and H differ in depth."""
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    empty.write_text("")
    stand_ins = {"BROKEN": str(broken), "EMPTY": str(empty), "CLOSED": f"http://127.0.0.1:{unused_port()}/v1"}
    if "UNEQUAL" in arguments:
        stand_ins["UNEQUAL"] = str(tmp_path / "unequal")
        grow_files(checkpoint, stand_ins["UNEQUAL"], {"L_layers": 2})
    assert hrmcore("eval", *(stand_ins.get(word, word) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [err] = [line for line in err.splitlines() if not line.startswith("[transformers]")]  # its own warnings
    assert err.startswith("hrmcore eval: ")
    assert message in err
