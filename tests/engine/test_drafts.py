"""Guessed tokens: whatever is guessed, the answer is the one without guesses, token for token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import set_weights

from hrmcore.config import HRMConfig
from hrmcore.engine import scheduler
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.drafts import LONGEST, MOST, PAUSE, Drafts
from hrmcore.engine.engine import Engine
from hrmcore.engine.runner import Rows
from hrmcore.engine.streams import Tokens
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = HRMConfig(61, 64, 64, 1, 2, 32, max_position_embeddings=512)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


class Counting(CpuRunner):
    """Notes how many rows each step verified."""

    rows: list[int]

    def step(self, *arguments: Any) -> Rows:
        self.rows.append(1)
        return super().step(*arguments)

    def verify(self, handles: Any, tokens: Any) -> Rows:
        self.rows.append(sum(map(len, tokens)))
        return super().verify(handles, tokens)


def engine_of(dtype: str = "int8", verifies: bool = True, **changes: Any) -> Engine:
    config = CONFIG.replace(**changes)
    runner = Counting(config, dtype, None, 1, 1 << 26)
    torch.manual_seed(0)
    set_weights(runner.core, HRM(config))
    runner.verifies = verifies and not config.attention_window
    runner.rows = []
    return Engine(runner, None, Path("nowhere"))


def rows_of(engine: Engine) -> list[int]:
    rows: list[int] = engine._runner.rows  # type: ignore[attr-defined]
    return rows


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3, "seed": 1},
]


class Oracle:
    """Guesses that are known to be right for a while: every number of right tokens comes to pass."""

    def __init__(self, answer: list[int], seed: int) -> None:
        self.answer = answer
        self.chance = random.Random(seed)
        self.right: list[int] = []

    def propose(self, answer: list[int], most: int) -> list[int]:
        assert answer == self.answer[: len(answer)]
        guess = self.answer[len(answer) : len(answer) + self.chance.randint(0, most)] if most > 0 else []
        if guess and self.chance.random() < 0.7:
            wrong = self.chance.randrange(len(guess))
            guess[wrong] = (guess[wrong] + 1) % CONFIG.vocab_size
        return guess

    def verified(self, guessed: int, right: int) -> None:
        self.right.append(right)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("options", OPTIONS)
def test_any_guess_gives_the_same_answer(dtype: str, options: dict[str, Any]) -> None:
    asked = {"max_new_tokens": 150, "ignore_eos": True, **options}
    plain = list(engine_of(dtype, verifies=False).tokens(PROMPT, **asked))
    engine = engine_of(dtype)
    for seed in range(3):
        tokens, oracle = engine.tokens(PROMPT, **asked), Oracle(plain, seed)
        tokens.request.drafts = oracle  # type: ignore[assignment]
        assert list(tokens) == plain
        assert tokens.request.count == len(plain)
        assert set(oracle.right) == {0, 1, 2, 3}
    assert max(rows_of(engine)) == scheduler.VERIFIED_ROWS
    assert engine.open_requests == 0


@pytest.mark.parametrize("together", [2])
def test_several_requests_are_verified_in_one_step(together: int) -> None:
    prompts = [[*PROMPT, number] for number in range(together)]
    plain = [
        list(engine_of(verifies=False).tokens(prompt, max_new_tokens=60 + 7 * n, temperature=1.0, seed=n))
        for n, prompt in enumerate(prompts)
    ]
    engine = engine_of()
    asked = [
        engine.tokens(prompt, max_new_tokens=60 + 7 * n, temperature=1.0, seed=n) for n, prompt in enumerate(prompts)
    ]
    for n, tokens in enumerate(asked):
        tokens.request.drafts = Oracle(plain[n], n)  # type: ignore[assignment]
    received: list[list[int]] = [[] for _ in asked]
    for index, token in engine._decode([tokens.request for tokens in asked]):
        received[index].append(token)
    assert received == plain
    assert max(rows_of(engine)) > together
    assert max(rows_of(engine)) <= scheduler.VERIFIED_ROWS


def test_an_answer_that_repeats_itself_takes_fewer_steps() -> None:
    prompt = [1, 2, 3] * 5
    plain = list(engine_of(verifies=False).tokens(prompt, max_new_tokens=400, ignore_eos=True))
    assert len(set(map(tuple, zip(plain, plain[1:], plain[2:], strict=False)))) < 200  # greedy models do
    engine = engine_of()
    assert list(engine.tokens(prompt, max_new_tokens=400, ignore_eos=True)) == plain
    assert len(rows_of(engine)) < 300


def test_none_are_guessed_where_bits_could_change_or_rows_are_many() -> None:
    windowed = engine_of(attention_window=64, position_encoding="xpos")
    list(windowed.tokens([1, 2, 3] * 5, max_new_tokens=60))
    assert set(rows_of(windowed)) == {1}
    assert not CpuRunner(CONFIG.replace(attention_window=64), "int8", None, 1, 0).verifies
    assert not CpuRunner(CONFIG, "int8", None, 1, 0).verifies  # its weights lie in the processor's cache
    assert CpuRunner(CONFIG.replace(vocab_size=1 << 19), "int8", None, 1, 0).verifies
    in_torch = Engine(TorchRunner(HRM(CONFIG)), None, Path("nowhere"))
    assert len(list(in_torch.tokens([1, 2, 3] * 5, max_new_tokens=20, ignore_eos=True))) == 20
    many = engine_of()
    asked: list[Tokens] = [many.tokens([1, 2, 3] * 5, max_new_tokens=40, ignore_eos=True) for _ in range(4)]
    list(many._decode([tokens.request for tokens in asked]))
    assert set(rows_of(many)) == {1}


@pytest.mark.parametrize("stop", ["7", "plus", "a"])
def test_a_stop_string_ends_the_answer_at_the_same_token(engine: Engine, stop: str, monkeypatch: Any) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 120, "temperature": 1.0, "seed": 5, "logprobs": 2}
    monkeypatch.setattr(engine._runner, "verifies", False)
    whole = engine.stream("what is 3 plus 4?", **asked)
    list(whole)
    plain = engine.stream("what is 3 plus 4?", stop=stop, **asked)
    text = "".join(plain)
    monkeypatch.setattr(engine._runner, "verifies", True)
    guessed = engine.stream("what is 3 plus 4?", stop=stop, **asked)
    oracle = Oracle(whole.request.answer, 1)
    oracle.propose = lambda answer, most: oracle.answer[len(answer) : len(answer) + max(most, 0)]  # type: ignore[method-assign]
    guessed.request.drafts = oracle  # type: ignore[assignment]
    assert "".join(guessed) == text
    assert (guessed.finish, guessed.token_count, guessed.logprobs) == (plain.finish, plain.token_count, plain.logprobs)
    assert sum(oracle.right) > 0


def test_a_guess_is_what_followed_the_longest_end_the_last_time() -> None:
    drafts = Drafts([1, 2, 3, 9, 2, 3, 4, 5, 1, 2])
    assert drafts.propose([3], MOST) == [9, 2]  # after 1 2 3, rather than 4 5 after 2 3
    drafts = Drafts([1, 2, 3, 9, 2, 3, 4, 5, 8, 2])
    assert drafts.propose([3], MOST) == [4, 5]  # after 2 3 the last time
    assert drafts.propose([3], 1) == [4]
    assert drafts.propose([3], 0) == []
    assert Drafts([1, 2, 3]).propose([4], MOST) == []
    assert LONGEST == 3


def test_guesses_grow_while_they_are_right_and_pause_when_they_are_not() -> None:
    drafts = Drafts([1] * 20)
    answer = [1]
    lengths = []
    for _ in range(4):
        guess = drafts.propose(answer, MOST)
        lengths.append(len(guess))
        drafts.verified(len(guess), len(guess))
        answer += [1] * 10
    assert lengths == [2, 3, 3, 3]
    for expected in (MOST, 1):
        assert drafts.length == expected
        drafts.verified(expected, 0)
    pauses = []
    for _ in range(3):
        waited = 0
        while not drafts.propose(answer, MOST):
            waited += 1
        pauses.append(waited)
        drafts.verified(1, 0)
    assert pauses == [2 * PAUSE - 1, 4 * PAUSE - 1, 8 * PAUSE - 1]
