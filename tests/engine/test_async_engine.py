"""One engine, many callers: the same answers as alone, in order, bounded, cancelled, ended."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hrmcore.engine import engine as engine_module
from hrmcore.engine.async_engine import AsyncEngine, EngineClosed, QueueFull
from hrmcore.engine.engine import Engine
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [f"what is {number} plus {number + 1}?{' copy' * (number % 7)}" for number in range(24)]


def run(engine: Engine, body: Callable[[AsyncEngine], Awaitable[Any]], max_queue: int = 64) -> Any:
    """What a coroutine function returns that is given an AsyncEngine; nothing of it may stay open."""

    async def whole() -> Any:
        async with AsyncEngine(engine, max_queue) as served:
            result = await asyncio.wait_for(body(served), 120)
            await settled(served)
        return result

    before = threading.active_count()
    result = asyncio.run(whole())
    assert engine.open_requests == 0
    assert threading.active_count() == before
    return result


async def settled(served: AsyncEngine) -> None:
    for _ in range(2000):
        if served.open_answers == 0 and served.engine.open_requests == 0:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("requests are stuck")


def slow_down(engine: Engine, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes so much longer: what a test does beside it comes first on any machine."""
    step = engine._runner.step

    def slow(*batch: list[int]) -> Any:
        time.sleep(seconds)
        return step(*batch)

    monkeypatch.setattr(engine._runner, "step", slow)


def options_of(number: int) -> dict[str, Any]:
    drawn = {"temperature": 0.9, "seed": number, "top_p": 0.9} if number % 2 else {}
    return {"max_new_tokens": 5 + 3 * (number % 9), **drawn, **({"stop": "7"} if number % 3 == 0 else {})}


def test_answers_are_those_of_one_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 5)  # so that requests join while others run
    alone = [engine.generate(text, **options_of(number)) for number, text in enumerate(QUESTIONS)]

    async def body(served: AsyncEngine) -> list[str]:
        async def ask(number: int) -> str:
            await asyncio.sleep(0.003 * number)
            return await served.generate(QUESTIONS[number], **options_of(number))

        return await asyncio.gather(*map(ask, range(len(QUESTIONS))))

    assert run(engine, body) == alone


def test_pieces_come_one_by_one_and_the_answer_tells_why_it_ended(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        answer = served.stream("what is 3 plus 4?", max_new_tokens=6)
        assert answer.finish is None
        pieces = [piece async for piece in answer]
        assert "".join(pieces) == engine.generate("what is 3 plus 4?", max_new_tokens=6)
        assert (answer.finish, answer.token_count) == ("length", 6)
        assert answer.prompt_tokens == len(engine.tokenizer.prompt("what is 3 plus 4?"))  # type: ignore[union-attr]
        assert [piece async for piece in answer] == []
        assert await served.chat([{"role": "user", "content": "copy"}], max_new_tokens=3) == engine.generate(
            "copy", max_new_tokens=3
        )

    run(engine, body)


def test_those_who_hang_up_leave_and_the_others_get_their_answers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 4)
    draw = random.Random(1)
    alone = [engine.generate(text, max_new_tokens=30) for text in QUESTIONS]
    slow_down(engine, 0.01, monkeypatch)

    async def body(served: AsyncEngine) -> int:
        async def ask(number: int) -> bool:
            await asyncio.sleep(draw.random() / 20)
            task = asyncio.ensure_future(served.generate(QUESTIONS[number], max_new_tokens=30))
            if number % 3 == 0:
                await asyncio.sleep(draw.random() / 50)
                task.cancel()
            try:
                assert await task == alone[number]
            except asyncio.CancelledError:
                return True
            return False

        return sum(await asyncio.gather(*map(ask, range(len(QUESTIONS)))))

    assert run(engine, body) >= 3


def test_an_answer_that_nobody_holds_is_cancelled(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        async for _ in served.stream("copy", max_new_tokens=1500):
            break
        gc.collect()
        started = time.monotonic()
        await settled(served)
        assert time.monotonic() - started < 5

    run(engine, body)


def test_the_queue_is_bounded_and_first_come_first_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 1)

    async def body(served: AsyncEngine) -> list[int]:
        first = served.stream("copy", max_new_tokens=1000)
        await anext(first)  # it runs
        order: list[int] = []

        async def ask(number: int) -> None:
            await served.generate("copy", max_new_tokens=2)
            order.append(number)

        tasks = [asyncio.ensure_future(ask(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert served.waiting == 3
        with pytest.raises(QueueFull, match="3 requests are waiting already"):
            served.stream("copy")
        tasks.pop(1).cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert served.waiting == 2  # who gives up makes room at once
        tasks.append(asyncio.ensure_future(ask(3)))
        await asyncio.sleep(0)
        first.close()
        await asyncio.gather(*tasks)
        return order

    assert run(engine, body, max_queue=3) == [0, 2, 3]


def test_memory_admits_what_it_can_hold(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 150 * engine._runner.cache_bytes_per_token
    monkeypatch.setattr(engine_module, "CACHE_BUDGET", budget)
    most = 0

    async def body(served: AsyncEngine) -> None:
        async def ask() -> None:
            nonlocal most
            async for _ in served.stream("copy", max_new_tokens=60):
                most = max(most, engine.open_requests)

        await asyncio.gather(*(ask() for _ in range(6)))

    run(engine, body)
    assert most == 2


def test_time_limits_end_answers_that_run_and_answers_that_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 1)
    slow_down(engine, 0.4, monkeypatch)  # longer than the first may take

    async def body(served: AsyncEngine) -> None:
        tasks = [served.generate("copy", timeout=0.1 * n) for n in (3, 1)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TimeoutError, TimeoutError]
        assert "no complete answer in" in str(outcomes[0])

    run(engine, body)


def test_bad_arguments_are_refused_at_once(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        for options in ({"temperature": -1}, {"timeout": 0}, {"timeout": float("nan")}, {"condition": "none"}):
            with pytest.raises(ValueError, match=next(iter(options))):
                served.stream("copy", **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="empty"):
            await served.generate(" ")
        assert served.open_answers == 0

    run(engine, body)
    with pytest.raises(ValueError, match="max_queue"):
        AsyncEngine(engine, 0)


def test_closing_lets_what_runs_end_and_refuses_the_rest(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 1)

    async def body(served: AsyncEngine) -> None:
        running = asyncio.ensure_future(served.generate("copy", max_new_tokens=200))
        waiting = asyncio.ensure_future(served.generate("copy", max_new_tokens=2))
        while engine.open_requests == 0:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(served.close(grace=60))
        with pytest.raises(EngineClosed, match="shutting down"):
            await waiting
        with pytest.raises(EngineClosed, match="shutting down"):
            served.stream("copy")
        assert await running == engine.generate("copy", max_new_tokens=200)
        await closing

    run(engine, body)


def test_the_grace_ends(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        running = served.stream("copy", max_new_tokens=1900)
        await anext(running)
        await served.close(grace=0.05)
        with pytest.raises(EngineClosed, match="before the answer was complete"):
            async for _ in running:
                pass

    run(engine, body)


def test_a_failure_reaches_those_it_concerns_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH", 1)
    step, calls = engine._runner.step, 0

    def fail_once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the weights have gone")
        return step(*arguments)

    monkeypatch.setattr(engine._runner, "step", fail_once)

    async def body(served: AsyncEngine) -> None:
        tasks = [served.generate("copy", max_new_tokens=4) for _ in range(2)]
        first, second = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, OSError)
        assert second == engine.generate("copy", max_new_tokens=4)

    run(engine, body)


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_one_engine_on_several_threads_gives_the_same_answers(engine: Engine, checkpoint: Path, kind: str) -> None:
    if kind == "torch":
        engine = Engine(TorchRunner(HRM.from_pretrained(checkpoint)), engine.tokenizer, checkpoint)
    alone = [engine.generate(text, max_new_tokens=12) for text in QUESTIONS[:8]]
    answers: dict[int, str] = {}

    def ask(first: int) -> None:
        for number in range(first, 8, 4):
            answers[number] = engine.generate(QUESTIONS[number], max_new_tokens=12)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(8)] == alone
    assert engine.open_requests == 0


class NoMemory(TorchDispatchMode):
    """Every operation of torch finds no memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 MiB free.")


def test_a_device_without_memory_is_a_memory_error_and_the_engine_goes_on(engine: Engine, checkpoint: Path) -> None:
    runner = TorchRunner(HRM.from_pretrained(checkpoint))
    engine = Engine(runner, engine.tokenizer, checkpoint)
    alone = engine.generate("copy", max_new_tokens=4)
    tokens = engine.tokens([5, 6, 7], ignore_eos=True)
    next(tokens)
    for work in (lambda: engine.generate("copy"), lambda: next(tokens)):
        with NoMemory(), pytest.raises(MemoryError, match="cpu has no memory for this step; close requests") as error:
            work()
        assert error.value.__context__ is None  # which would hold on to the tensors of the call that failed
    assert runner.open_sequences == 0
    assert engine.generate("copy", max_new_tokens=4) == alone
