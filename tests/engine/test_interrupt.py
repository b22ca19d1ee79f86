"""A long prefill stops when it is asked to, and leaves an engine that goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import set_weights
from support.inside_a_step import CASES, TIME_LIMIT

from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import Engine
from hrmcore.engine.runner import Interrupted, Rows
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parents[1]
# Large enough for a prefill of more than a tenth of a second, after which it is asked for the first time.
PROMPT = [position % 61 for position in range(1600)]
CONFIG = HRMConfig(61, 256, 512, 2, 2, 64, max_position_embeddings=len(PROMPT) + 50)


@pytest.fixture(scope="module")
def model() -> HRM:
    torch.manual_seed(0)
    return HRM(CONFIG)


@pytest.fixture(params=[1, 3])
def runner(model: HRM, request: pytest.FixtureRequest) -> CpuRunner:
    runner = CpuRunner(CONFIG, "int8", None, request.param, cache_bytes=0)
    set_weights(runner.core, model)
    return runner


def test_stop_is_asked_and_obeyed(runner: CpuRunner) -> None:
    (beside,), before = runner.open([[5, 6, 7]], [3])
    asked = []

    def second_time() -> bool:
        asked.append(time.monotonic())
        time.sleep(0.15)  # so that the next time is due at once, however fast the machine
        return len(asked) == 2

    with pytest.raises(Interrupted):
        runner.open([PROMPT], [len(PROMPT)], second_time)
    assert len(asked) == 2  # and never again
    assert runner.open_sequences == 1
    # Neither a request that runs nor the same prefill again shows a trace of it.
    (alone,), rows = runner.open([[5, 6, 7]], [3])
    assert np.array_equal(rows, before)
    assert np.array_equal(runner.step([beside], [8]), runner.step([alone], [8]))
    (handle,), whole = runner.open([PROMPT], [len(PROMPT)], lambda: False)
    assert np.array_equal(whole[0], runner.logits(PROMPT, len(PROMPT))[-1])
    for open_handle in (beside, alone, handle):
        runner.close(open_handle)
    assert runner.core.cache_pages_used == 0


def test_a_look_into_the_layers_is_stopped_and_leaves_nothing(runner: CpuRunner) -> None:
    with pytest.raises(Interrupted):
        runner.layers(PROMPT, len(PROMPT), lambda: True)
    assert (runner.open_sequences, runner.core.cache_pages_used) == (0, 0)
    rows = runner.layers(PROMPT, len(PROMPT), lambda: False)
    assert np.array_equal(rows[-1], runner.logits(PROMPT, len(PROMPT))[-1])


def test_layers_are_of_one_request(runner: CpuRunner) -> None:
    handles = [runner.core.open(0), runner.core.open(0)]
    logits = np.empty((CONFIG.cache_slots, CONFIG.vocab_size), np.float32)
    for requests, every_row in ((handles, False), (handles[:1], True)):
        with pytest.raises(ValueError, match="every_layer must be of one request"):
            runner.core.step(requests, [[1]] * len(requests), logits, every_row, every_layer=True)
    with pytest.raises(ValueError, match="logits"):
        runner.core.step(handles[:1], [[1]], logits[:1], False, every_layer=True)


def test_a_step_that_was_stopped_may_be_repeated(runner: CpuRunner) -> None:
    core = runner.core
    request, logits = core.open(len(PROMPT)), np.empty((1, CONFIG.vocab_size), np.float32)
    assert core.step([request], [PROMPT], logits, False, lambda: True) is False
    # Had it counted, the prompt would not fit the context a second time.
    assert core.step([request], [PROMPT], logits, False) is True
    assert np.array_equal(logits[0], runner.logits(PROMPT, len(PROMPT))[-1])


def test_a_stop_that_fails_ends_the_step_with_its_error(runner: CpuRunner) -> None:
    with pytest.raises(ZeroDivisionError):
        runner.open([PROMPT], [0], lambda: bool(1 // 0))
    assert runner.open_sequences == 0


def test_a_token_that_takes_long_can_be_interrupted(model: HRM) -> None:
    runner = CpuRunner(CONFIG.replace(H_cycles=2000), "int8", None, 1, cache_bytes=0)
    set_weights(runner.core, model)
    with interrupted_soon(), pytest.raises(KeyboardInterrupt):
        runner.open([[1]], [1])
    asked: list[bool] = []
    with pytest.raises(Interrupted):
        runner.open([[1]], [1], lambda: asked.append(True) or len(asked) == 2)
    assert runner.core.cache_pages_used == 0


@contextmanager
def interrupted_soon() -> Iterator[None]:
    """SIGINT once the engine is at work."""
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_an_interruption_reaches_a_prefill(runner: CpuRunner) -> None:
    engine = Engine(runner, None, Path("nowhere"))
    tokens = engine.tokens(PROMPT, temperature=1.0, seed=1)
    with interrupted_soon(), pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert runner.open_sequences == 0
    with interrupted_soon(), pytest.raises(KeyboardInterrupt):
        engine.logits(PROMPT)
    assert runner.open_sequences == 0
    assert len(list(engine.tokens([1, 2, 3], max_new_tokens=4, ignore_eos=True))) == 4


def test_another_thread_closes_an_answer_that_is_in_its_prefill(runner: CpuRunner) -> None:
    engine = Engine(runner, None, Path("nowhere"))
    tokens, received = engine.tokens(PROMPT), []
    consumer = threading.Thread(target=lambda: received.extend(tokens))
    consumer.start()
    wait_for_one(runner)
    tokens.close()
    consumer.join()
    assert (received, tokens.request.finish) == ([], "closed")
    assert runner.open_sequences == 0
    assert list(tokens) == []


def test_one_of_a_batch_is_closed_in_its_prefill_and_the_others_are_unharmed(runner: CpuRunner) -> None:
    engine = Engine(runner, None, Path("nowhere"))
    prompts = [[1, 2, 3], PROMPT, [4, 5]]
    answers = [engine.tokens(prompt, max_new_tokens=5, ignore_eos=True) for prompt in prompts]
    alone = [list(engine.tokens(prompts[i], max_new_tokens=5, ignore_eos=True)) for i in (0, 2)]
    closer = threading.Thread(target=lambda: (wait_for_one(runner), answers[1].close()))
    closer.start()
    received: list[list[int]] = [[], [], []]
    for index, token in engine._decode([answer.request for answer in answers]):
        received[index].append(token)
    closer.join()
    assert [received[0], received[2]] == alone
    assert len(received[1]) < 5
    assert answers[1].request.finish == "closed"
    assert runner.open_sequences == 0


def wait_for_one(runner: CpuRunner) -> None:
    while runner.open_sequences == 0:
        time.sleep(0.001)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_nothing_waits_for_the_step_that_it_runs_in(case: str) -> None:
    command = [sys.executable, "-m", "support.inside_a_step", case]
    ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=TIME_LIMIT + 30)
    assert (ended.stdout, ended.returncode) == (f"{case}\n", 0), ended.stderr


class Slow(CpuRunner):
    """As an engine that is at work for a while at every step."""

    def _advance(self, *args: Any, **kwargs: Any) -> Rows:
        time.sleep(0.05)
        return super()._advance(*args, **kwargs)


def test_what_is_closed_while_its_token_comes_ends_there(model: HRM) -> None:
    runner = Slow(CONFIG, "int8", None, 1, cache_bytes=0)
    set_weights(runner.core, model)
    tokens, received = Engine(runner, None, Path("nowhere")).tokens([1, 2, 3], ignore_eos=True), []
    consumer = threading.Thread(target=lambda: received.extend(tokens))
    consumer.start()
    while len(received) < 2:
        time.sleep(0.001)
    tokens.close()
    before = len(received)
    consumer.join()
    assert len(received) == before
    assert runner.open_sequences == 0
