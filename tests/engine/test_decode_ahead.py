"""Decoding one step ahead on CUDA, run by the emulator: the answers of a runner that gives its logits to the host.

Requests join, leave, are cancelled and run out of room while a step of theirs is under way.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator import emulated_cuda, seeded
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.engine import Engine
from hrmcore.engine.runner import PAGE, Drawer, Rows
from hrmcore.engine.sampling import Sampler, Sampling
from hrmcore.engine.streams import Request
from hrmcore.model import HRM

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]

CONFIG = HRMConfig(50, 32, 32, 1, 2, 16, H_cycles=1, L_cycles=1, max_position_embeddings=512, attention_window=0)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"temperature": 1.5, "seed": 1},
    {"temperature": 2.0, "top_k": 7, "seed": 2},
    {"temperature": 2.0, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 3},
    {"temperature": 3.0, "min_p": 0.1, "seed": 2**64 - 1},
]


def model() -> HRM:
    torch.manual_seed(0)
    made = HRM(CONFIG).requires_grad_(False)
    made.lm_head.weight.mul_(30)  # tokens that lead, and not always the same
    return made


class Ahead(CudaRunner):
    """On CPU tensors, with emulated steps; counts them, and the rows of each."""

    def __init__(self) -> None:
        super().__init__(model(), blocks=2)
        self.steps: list[int] = []

    def decode(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        self.steps.append(len(tokens))
        return super().decode(tokens, positions, tables)

    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        with emulated_cuda():
            return super().step(handles, tokens)

    def draw(
        self, handles: Sequence[int], tokens: Sequence[int], samplers: Sequence[Sampler], left: Sequence[int]
    ) -> list[int]:
        with emulated_cuda():
            return super().draw(handles, tokens, samplers, left)

    @property
    def free_pages(self) -> int:
        return len(self._pool._free) - self._pool.kv.shape[2] // PAGE  # 0: all


class OnHost(Ahead):
    """The same, whose tokens are drawn on the host."""

    draw = None  # type: ignore[assignment]


def engine_of(runner: Ahead) -> Engine:
    return Engine(runner, None, Path("nowhere"))


def prompt_of(index: int) -> list[int]:
    chance = random.Random(index)
    return [chance.randrange(50) for _ in range(chance.choice([1, 5, 40, PAGE - 2, PAGE]))]


def request_of(engine: Engine, index: int, tokens: int = 9) -> Request:
    """A request that ends at its limit or before, by tokens that end it."""
    chance = random.Random(1000 + index)
    request = engine.tokens(
        prompt_of(index), max_new_tokens=chance.randint(1, tokens), ignore_eos=True, **OPTIONS[index % len(OPTIONS)]
    ).request
    request.ends = frozenset(chance.sample(range(50), 3))
    return request


def answers_of(
    engine: Engine, waiting: deque[tuple[int, Request]], after: Callable[[int], None]
) -> dict[int, list[int]]:
    """All tokens by request; `after` is called with the number of each step."""
    answers: dict[int, list[int]] = {}
    for number, step in enumerate(engine.decode(waiting)):
        for key, token in step:
            if token is not None:
                answers.setdefault(key, []).append(token)
        after(number)
    return answers


@pytest.fixture
def runner() -> Iterator[Ahead]:
    made = Ahead()
    yield made
    assert made.open_sequences == 0
    assert made.steps_ahead == 0


def test_it_is_one_that_draws_and_its_like_is_not(runner: Ahead) -> None:
    assert isinstance(runner, Drawer)
    assert not isinstance(OnHost(), Drawer)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_answer_is_that_of_the_host(options: dict[str, Any], runner: Ahead) -> None:
    ours = list(engine_of(runner).tokens(prompt_of(2), max_new_tokens=12, ignore_eos=True, **options))
    host = OnHost()
    theirs = list(engine_of(host).tokens(prompt_of(2), max_new_tokens=12, ignore_eos=True, **options))
    assert ours == theirs
    assert len(set(ours)) > 2
    assert runner.steps == host.steps == [1] * 11  # none too many: the runner knows how many may be asked for


@pytest.mark.parametrize("ends", [False, True])
def test_requests_that_join_and_leave_get_the_answers_of_the_host(ends: bool, runner: Ahead) -> None:
    """Sixteen, up to twelve at once; some ended by their own tokens, some from outside."""

    def run(engine: Engine) -> dict[int, list[int]]:
        requests = [request_of(engine, index) for index in range(16)]
        waiting = deque(enumerate(requests[:12]))

        def after(number: int) -> None:
            if number in (3, 5):
                waiting.extend(list(enumerate(requests))[12:14] if number == 3 else list(enumerate(requests))[14:])
            if ends and number in (2, 4, 6):
                requests[number].finish = requests[number].finish or "closed"

        return answers_of(engine, waiting, after)

    ours = run(engine_of(runner))
    theirs = run(engine_of(OnHost()))
    if ends:  # a cancelled one may have come further or less far on the other
        for key in (2, 4, 6):
            shorter = min(len(ours.get(key, [])), len(theirs.get(key, [])))
            assert ours.pop(key, [])[:shorter] == theirs.pop(key, [])[:shorter]
    assert ours == theirs
    assert max(runner.steps) > 8
    assert runner.free_pages == -held_by_prefills(runner)


def held_by_prefills(runner: Ahead) -> int:
    return sum(len(sequence.pages) for sequence in runner._kept.values())


def test_a_request_that_leaves_costs_the_others_no_step(runner: Ahead) -> None:
    engine = engine_of(runner)
    waiting = deque((i, engine.tokens(prompt_of(i), max_new_tokens=4 + 3 * i, ignore_eos=True).request) for i in (0, 1))
    answers_of(engine, waiting, lambda number: None)
    assert runner.steps == [2] * 3 + [1] * 3


def test_one_that_joins_has_one_step_of_its_own(runner: Ahead) -> None:
    engine = engine_of(runner)
    requests = [engine.tokens(prompt_of(i), max_new_tokens=8, ignore_eos=True).request for i in (0, 1)]
    waiting = deque([(0, requests[0])])
    ours = answers_of(engine, waiting, lambda number: waiting.append((1, requests[1])) if number == 2 else None)
    assert sum(runner.steps) == 14
    assert runner.steps.count(1) == len(runner.steps) - runner.steps.count(2) <= 8
    alone = engine_of(OnHost())
    assert ours == {i: list(alone.tokens(prompt_of(i), max_new_tokens=8, ignore_eos=True)) for i in (0, 1)}


def test_streams_in_turns_keep_their_steps_ahead(runner: Ahead) -> None:
    """Two callers on one engine: neither throws the other's step away."""
    engine = engine_of(runner)
    streams = [engine.tokens(prompt_of(i), max_new_tokens=6, ignore_eos=True, **OPTIONS[i]) for i in (1, 4)]
    ours = [[], []]
    for _ in range(6):
        for i, stream in enumerate(streams):
            ours[i].append(next(stream))
    for stream in streams:
        stream.close()
    host = engine_of(OnHost())
    theirs = [list(host.tokens(prompt_of(i), max_new_tokens=6, ignore_eos=True, **OPTIONS[i])) for i in (1, 4)]
    assert ours == theirs
    assert runner.steps == [1] * 10


def test_a_cancelled_stream_leaves_nothing_and_its_pages_serve_the_next(runner: Ahead) -> None:
    """Its late step is under way when its pages go; what comes into them is not changed by that."""
    engine = engine_of(runner)
    stream = engine.tokens(prompt_of(3), max_new_tokens=50, ignore_eos=True)
    first = [next(stream) for _ in range(3)]
    assert runner.steps_ahead == 1
    stream.close()
    assert (runner.open_sequences, runner.steps_ahead) == (0, 0)
    again = list(engine.tokens(prompt_of(3), max_new_tokens=10, ignore_eos=True))
    assert again[:3] == first
    assert again == list(engine_of(OnHost()).tokens(prompt_of(3), max_new_tokens=10, ignore_eos=True))


def test_a_request_that_wants_log_probabilities_has_its_logits_on_the_host(runner: Ahead) -> None:
    """And the tokens of the one beside it go on as if it were not there."""

    def run(engine: Engine) -> dict[int, list[int]]:
        requests = [
            engine.tokens(prompt_of(i), max_new_tokens=9, ignore_eos=True, **OPTIONS[4]).request for i in (0, 1)
        ]
        requests[1].limit, requests[1].top = 3, 2
        waiting = deque([(0, requests[0])])
        answers = answers_of(engine, waiting, lambda n: waiting.append((1, requests[1])) if n == 2 else None)
        assert len(requests[1].scores) == 3
        return answers

    assert run(engine_of(runner)) == run(engine_of(OnHost()))


def test_without_room_for_a_step_ahead_there_is_none(runner: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page after the prompt's is refused once, to the step ahead; then there is room again."""
    reserve, refused = runner._pool.reserve, []

    def narrow(sequence: Any, length: int) -> None:
        if length == PAGE + 1 and not refused:
            refused.append(length)
            raise torch.OutOfMemoryError("no room")
        reserve(sequence, length)

    monkeypatch.setattr(runner._pool, "reserve", narrow)
    prompt = [token % 50 for token in range(PAGE - 3)]
    ours = list(engine_of(runner).tokens(prompt, max_new_tokens=9, ignore_eos=True))
    assert refused
    assert ours == list(engine_of(OnHost()).tokens(prompt, max_new_tokens=9, ignore_eos=True))
    assert runner.steps == [1] * 8


def test_without_room_for_a_token_nothing_has_changed(runner: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    handles, _ = runner.open([[1] * (PAGE - 1), [2] * (PAGE - 1)], [1, 1])
    samplers = [Sampler(Sampling(temperature=1.0, seed=5), []) for _ in range(2)]
    tokens = runner.draw(handles, [3, 4], samplers, [1, 1])
    runner._ahead.forget(handles)

    def full(handles: Sequence[int], tokens: int) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(runner, "reserve", full)
    with pytest.raises(MemoryError, match="no memory for this step"):
        runner.draw(handles, tokens, samplers, [1, 1])
    assert [runner.length_of(handle) for handle in handles] == [PAGE, PAGE]
    assert [sampler.core.draws for sampler in samplers] == [1, 1]
    for handle in handles:
        runner.close(handle)


class Poisoned(Ahead):
    """Gives a logit that is not finite to the second row of one step."""

    at = -1

    def decode(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        logits = super().decode(tokens, positions, tables)
        if len(self.steps) == self.at:
            logits[1, 7] = torch.nan
        return logits


@pytest.mark.parametrize("at", [1, 2])
def test_logits_that_are_not_finite_are_the_host_s_error_and_change_nothing(at: int) -> None:
    """In a step that was asked for, and in one that was ahead; the same tokens come when it is asked again."""
    poisoned, sound = Poisoned(), Ahead()
    poisoned.at = at
    drawn = []
    for runner in (sound, poisoned):
        handles, _ = runner.open([[1, 2], [3]], [2, 1])
        samplers = [Sampler(Sampling(temperature=1.0, seed=i, repetition_penalty=1.2), [4, 5]) for i in range(2)]
        answers = [[4, 5]]
        while len(answers) < 5:
            if runner is poisoned and len(answers) == at:
                with pytest.raises(ArithmeticError, match="the model's logits are not finite: nan for token 7"):
                    runner.draw(handles, answers[-1], samplers, [9, 9])
                assert runner.steps_ahead == 0
                assert [runner.length_of(handle) for handle in handles] == [2 + at - 1, 1 + at - 1]
                assert [sampler.core.draws for sampler in samplers] == [at - 1] * 2
            answers.append(runner.draw(handles, answers[-1], samplers, [9, 9]))
        drawn.append(answers)
        assert runner.steps_ahead == 2
        for handle in handles:
            runner.close(handle)
        assert runner.steps_ahead == 0
    assert drawn[0] == drawn[1]
    assert len(poisoned.steps) == len(sound.steps) + 2


def test_a_step_ahead_counts_only_for_what_it_was_made_of(runner: Ahead) -> None:
    """Another token, another sampler, a sequence that went on otherwise: a step of its own."""
    handles, _ = runner.open([[1, 2]], [2])
    one, other = (Sampler(Sampling(temperature=1.0, seed=seed), []) for seed in (1, 2))
    token = runner.draw(handles, [3], [one], [9])[0]
    assert runner.steps == [1, 1]
    runner.draw(handles, [(token + 1) % 50], [one], [0])
    assert runner.steps == [1] * 3
    token = runner.draw(handles, [4], [one], [9])[0]
    assert runner.steps == [1] * 5
    runner.draw(handles, [token], [other], [9])
    assert runner.steps == [1] * 7
    runner.step(handles, [5])
    assert (runner.steps, runner.steps_ahead) == ([1] * 8, 0)
    runner.close(handles[0])


def test_answers_are_the_same_for_every_schedule(runner: Ahead) -> None:
    engine = engine_of(runner)
    answers = []
    for seed in range(5):
        with seeded(seed):
            answers.append(list(engine.tokens([1, 2, 3], max_new_tokens=4, ignore_eos=True, **OPTIONS[4])))
    assert answers == answers[:1] * 5
