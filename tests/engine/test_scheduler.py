"""Prefills in slices, prefills that are shared, and sequences that go back: the same bits as without."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import set_weights

from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner, SlicedPrefill
from hrmcore.engine.engine import Engine
from hrmcore.engine.prefills import Kept, Prefills
from hrmcore.engine.runner import PAGE, Rows, Runner
from hrmcore.engine.scheduler import SLICE_TOKENS, SLICE_TOKENS_A_REQUEST
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = HRMConfig(61, 64, 64, 2, 2, 32, max_position_embeddings=1024)
LONG = [token % 61 for token in range(800)]


def model_of(config: HRMConfig) -> HRM:
    torch.manual_seed(0)
    return HRM(config)


def runner_of(config: HRMConfig = CONFIG, dtype: str = "int8", threads: int = 1, cache: int = 1 << 26) -> CpuRunner:
    runner = CpuRunner(config, dtype, None, threads, cache)
    set_weights(runner.core, model_of(config))
    return runner


def engine_of(runner: Runner) -> Engine:
    return Engine(runner, None, Path("nowhere"))


def ids_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


# --- slices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("bfloat16", 1), ("int8", 2), ("int4", 1)])
@pytest.mark.parametrize("changes", [{}, {"position_encoding": "xpos", "attention_window": 64}], ids=["rope", "xpos"])
def test_a_prefill_in_slices_has_the_bits_of_one_in_one_piece(
    dtype: str, threads: int, changes: dict[str, Any]
) -> None:
    runner = runner_of(CONFIG.replace(**changes), dtype, threads)
    prompts = [ids_of(150, 1), ids_of(3, 2), ids_of(70, 3)]
    prefixes = [150, 0, 40]
    handles, whole = runner.open(prompts, prefixes)
    (beside,), _ = runner.open([[5, 6, 7]], [3])
    prefill, rows, slices = runner.begin(prompts, prefixes), None, 0
    while rows is None:  # a step of another request between any two halves of a layer
        rows = prefill.advance(1)
        slices += 1
        runner.step([beside], [slices % 61])
    assert slices == 2 * CONFIG.cache_slots
    assert np.array_equal(rows, whole)
    again = runner.step(prefill.handles, [7, 8, 9])
    assert np.array_equal(again, runner.step(handles, [7, 8, 9]))
    for handle in [*handles, *prefill.handles, beside]:
        runner.close(handle)
    assert runner.core.cache_pages_used == 0


def test_two_prefills_at_once_keep_apart() -> None:
    runner = runner_of()
    prompts = [ids_of(90, 1), ids_of(130, 2)]
    begun = [runner.begin([prompt], [len(prompt)]) for prompt in prompts]
    rows: list[Rows | None] = [None, None]
    while any(row is None for row in rows):
        for index in (0, 1):
            rows[index] = begun[index].advance(20) if rows[index] is None else rows[index]
    for row, prompt in zip(rows, prompts, strict=True):
        assert row is not None
        assert np.array_equal(row[0], runner.logits(prompt, len(prompt))[-1])


class Counting(CpuRunner):
    """Notes what each slice of a prefill did, as (tokens, halves of it done), and "step" for each step."""

    log: list[tuple[int, int] | str]

    def begin(self, *arguments: Any) -> SlicedPrefill:
        prefill, log = super().begin(*arguments), self.log
        advance = prefill.advance

        def counted(*arguments: Any) -> Rows | None:
            step = prefill.step
            assert step is not None
            before = step.halves_done
            rows = advance(*arguments)
            log.append((step.tokens, step.halves_done - before))
            return rows

        prefill.advance = counted  # type: ignore[method-assign]
        return prefill

    def step(self, *arguments: Any) -> Rows:
        self.log.append("step")
        return super().step(*arguments)

    def verify(self, *arguments: Any) -> Rows:
        self.log.append("step")
        return super().verify(*arguments)


def counting() -> Counting:
    runner = Counting(CONFIG, "int8", None, 1, 1 << 26)
    set_weights(runner.core, model_of(CONFIG))
    runner.log = []
    return runner


@pytest.mark.parametrize("callers", [1, 20])
def test_between_two_tokens_lies_a_bounded_part_of_anothers_prefill(callers: int) -> None:
    runner, halves = counting(), 2 * CONFIG.cache_slots
    engine = engine_of(runner)
    running = [engine.tokens([1, 2, 3], max_new_tokens=400) for _ in range(callers)]
    long = engine.tokens(LONG, max_new_tokens=1)
    waiting = deque([("running", one.request) for one in running])
    run = engine.decode(waiting)
    while running[-1].request.count < 3:
        next(run)
    runner.log.clear()
    waiting.append(("long", long.request))
    while long.request.count == 0:
        next(run)
    run.close()
    slices = [entry for entry in runner.log if isinstance(entry, tuple)]
    assert sum(done for _, done in slices) == halves
    assert {tokens for tokens, _ in slices} == {len(LONG)}
    # In tokens times halves: a step of so many tokens is that many, and half a layer cannot be cut.
    most = max(SLICE_TOKENS * halves, SLICE_TOKENS_A_REQUEST * callers * halves, len(LONG))
    assert all(tokens * done <= most for tokens, done in slices)
    assert len(slices) <= halves * len(LONG) // (most - len(LONG)) + 1
    assert runner.log[: 2 * len(slices)] == [part for one in slices for part in ("step", one)]  # in turns
    assert engine.open_requests == 0


def test_a_prefill_with_nobody_beside_it_is_one_piece() -> None:
    runner = counting()
    list(engine_of(runner).tokens(LONG, max_new_tokens=2))
    assert runner.log[0] == (len(LONG), 2 * CONFIG.cache_slots)


def test_a_prefill_that_is_given_up_leaves_nothing() -> None:
    runner = runner_of()
    prefill = runner.begin([LONG, [1, 2]], [len(LONG), 2])
    assert prefill.advance(SLICE_TOKENS) is None
    assert runner.open_sequences == 2
    with pytest.raises(ValueError, match="requests must be in no step, got request 1, which is in one"):
        runner.step([prefill.handles[1]], [3])
    prefill.close()
    assert (runner.open_sequences, runner.core.cache_pages_used) == (0, 0)


def test_a_request_that_ends_in_its_prefill_makes_way() -> None:
    runner = counting()
    engine = engine_of(runner)
    alone = list(engine_of(runner_of()).tokens([1, 2, 3], max_new_tokens=60, ignore_eos=True))
    running = engine.tokens([1, 2, 3], max_new_tokens=60, ignore_eos=True)
    ended, after = engine.tokens(LONG, max_new_tokens=9), engine.tokens([4], max_new_tokens=2, ignore_eos=True)
    waiting = deque([("running", running.request)])
    tokens: dict[str, list[int]] = {"running": [], "ended": [], "after": []}
    for step in engine.decode(waiting):
        for key, token in step:
            tokens[key] += [token] if token is not None else []
        if len(tokens["running"]) == 2:
            waiting += [("ended", ended.request), ("after", after.request)]
        if len(tokens["running"]) == 8:
            ended.close()
    assert (tokens["running"], tokens["ended"], len(tokens["after"])) == (alone, [], 2)
    slices = [entry for entry in runner.log if isinstance(entry, tuple) and entry[0] >= len(LONG)]
    assert 4 <= len(slices) <= 7
    assert runner.open_sequences == 0


def test_a_step_is_checked_before_each_slice() -> None:
    runner = runner_of()
    handle = runner.core.open(3)
    step = runner.core.begin([handle], [[1, 2, 3]])
    with pytest.raises(ValueError, match="logits must be of size 1"):
        step.run(np.empty((2, 61), np.float32), 1)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        step.run(np.empty((1, 61), np.float32), 0)
    assert step.halves_done == 0
    logits = np.empty((1, 61), np.float32)
    assert step.run(logits, 10**15) is True
    with pytest.raises(ValueError, match="one that has not ended"):
        step.run(logits, 1)
    small = runner_of(cache=0).core
    requests = [small.open(0) for _ in range(100)]
    with pytest.raises(MemoryError, match="pages of 64 tokens are free"):
        small.begin(requests, [LONG] * 100)
    assert small.cache_pages_used == 0


# --- shared prefills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "float32", "torch"])
@pytest.mark.parametrize("changes", [{}, {"attention_window": 64, "position_encoding": "xpos"}], ids=["rope", "xpos"])
def test_forks_go_their_own_way(kind: str, changes: dict[str, Any]) -> None:
    """Sequences that begin, are kept, forked, go on and end at random, each beside its whole history."""
    config = CONFIG.replace(**changes)
    runner: Runner = TorchRunner(model_of(config)) if kind == "torch" else runner_of(config, kind)
    chance = random.Random(1)
    running: dict[int, tuple[int, list[int]]] = {}
    kept: dict[int, tuple[int, list[int]]] = {}

    def begin() -> None:
        ids = ids_of(chance.choice([1, 31, 63, 64, 65]), chance.randrange(99))
        prefix = chance.choice([0, len(ids)])
        (handle,), _ = runner.open([ids], [prefix])
        running[handle] = prefix, ids

    def advance() -> None:
        handles = chance.sample(list(running), min(chance.randint(1, 3), len(running)))
        tokens = [chance.randrange(61) for _ in handles]
        for handle, token, row in zip(handles, tokens, runner.step(handles, tokens), strict=True):
            prefix, ids = running[handle]
            ids.append(token)
            whole = runner.logits(ids, prefix)[-1]
            assert np.allclose(row, whole, atol=1e-4) if kind == "torch" else np.array_equal(row, whole)

    def keep() -> None:
        handle = chance.choice(list(running))
        prefix, ids = running[handle]
        kept[runner.keep(handle)] = prefix, list(ids)

    def fork() -> None:
        if kept:
            chosen = chance.choice(list(kept))
            prefix, ids = kept[chosen]
            running[runner.fork(chosen)] = prefix, list(ids)

    def end() -> None:
        ended = chance.choice([running, kept])
        if ended and len(running) > 1:
            handle = chance.choice(list(ended))
            del ended[handle]
            runner.close(handle)

    begin()
    acts: list[Callable[[], None]] = [begin, advance, advance, keep, fork, fork, end]
    for _ in range(60):
        chance.choice(acts)()
        assert runner.open_sequences == len(running)
    for handle in [*running, *kept]:
        runner.close(handle)
    assert runner.open_sequences == 0
    if isinstance(runner, CpuRunner):
        assert runner.core.cache_pages_used == 0


def test_a_fork_costs_no_page_but_the_last() -> None:
    runner = runner_of()
    (handle,), _ = runner.open([LONG], [len(LONG)])
    pages = -(-len(LONG) // PAGE)
    assert runner.core.cache_pages_used == pages
    kept = runner.keep(handle)
    assert runner.core.cache_pages_used == pages
    forks = [runner.fork(kept) for _ in range(5)]
    assert runner.core.cache_pages_used == pages + 5
    runner.close(handle)
    for fork in forks:
        runner.close(fork)
    assert (runner.core.cache_pages_used, runner.open_sequences) == (pages, 0)
    runner.close(kept)
    assert runner.core.cache_pages_used == 0


def test_what_is_kept_and_forked_is_checked() -> None:
    core = runner_of(cache=0).core
    request = core.open(0)
    for match, call in (
        ("request must be open, got request 9", lambda: core.keep(9)),
        ("one that holds tokens", lambda: core.keep(request)),
        ("kept must be kept, got request 0", lambda: core.fork(request)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    logits = np.empty((1, 61), np.float32)
    core.step([request], [[1, 2, 3]], logits, False)
    kept = core.keep(request)
    for match, call in (
        ("request must be open", lambda: core.keep(kept)),
        ("requests must be open", lambda: core.step([kept], [[1]], logits, False)),
        ("length must be between 3 and 3, got 2", lambda: core.rewind(request, 2)),
        ("request must be open", lambda: core.rewind(kept, 3)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for _ in range(core.cache_pages - core.cache_pages_used):
        core.fork(kept)
    with pytest.raises(MemoryError, match="pages of 64 tokens are free"):
        core.fork(kept)
    core.step([request], [[4]], logits, False)  # and what was there before is unharmed
    assert np.array_equal(logits[0], runner_of().logits([1, 2, 3, 4], 0)[-1])


def test_an_instruction_that_comes_again_is_not_read_again() -> None:
    runner = counting()
    engine = engine_of(runner)
    drawn = {"temperature": 1.0, "seed": 3}
    alone = [list(engine_of(runner_of()).tokens(LONG, max_new_tokens=9, **options)) for options in ({}, drawn)]
    assert list(engine.tokens(LONG, max_new_tokens=9)) == alone[0]
    runner.log.clear()
    for options, expected in (({}, alone[0]), (drawn, alone[1])):
        assert list(engine.tokens(LONG, max_new_tokens=9, **options)) == expected
    assert set(runner.log) == {"step"}
    assert engine.reused_prefills == 2
    for other in (LONG[:-1], [*LONG, 1], [2, *LONG[1:]]):  # not token for token the same
        list(engine.tokens(other, max_new_tokens=1))
    list(engine.tokens(LONG, prefix_length=5, max_new_tokens=1))
    assert engine.reused_prefills == 2


def test_equal_instructions_of_one_batch_are_read_once() -> None:
    runner = counting()
    engine = engine_of(runner)
    asked = [engine.tokens(LONG, max_new_tokens=5, temperature=1.0, seed=seed) for seed in range(6)]
    asked.append(engine.tokens([1, 2], max_new_tokens=5))
    received: list[list[int]] = [[] for _ in asked]
    for index, token in engine._decode([tokens.request for tokens in asked]):
        received[index].append(token)
    assert sum(tokens for tokens, _ in (e for e in runner.log if isinstance(e, tuple))) == len(LONG) + 2
    other = engine_of(runner_of())
    for seed in range(6):
        assert received[seed] == list(other.tokens(LONG, max_new_tokens=5, temperature=1.0, seed=seed))
    assert engine.reused_prefills == 5
    assert len({tuple(tokens) for tokens in received}) > 3


class Closed:
    """A runner that notes what is closed."""

    def __init__(self) -> None:
        self.closed: list[int] = []

    def close(self, handle: int) -> None:
        self.closed.append(handle)


def kept(handle: int, tokens: int) -> Kept:
    return Kept(handle, np.zeros(1, np.float32), tokens)


def test_what_was_used_longest_ago_goes_first() -> None:
    runner = Closed()
    prefills = Prefills(runner, most_tokens=300)  # type: ignore[arg-type]
    for handle in range(3):
        prefills.put((1, (handle,)), kept(handle, 100))
    used = prefills.take((1, (0,)))
    assert used is not None
    assert (prefills.tokens, prefills.take((1, (9,)))) == (200, None)
    prefills.put((1, (0,)), used)
    prefills.put((1, (3,)), kept(3, 100))
    assert (runner.closed, prefills.tokens) == ([1], 300)
    prefills.put((1, (3,)), kept(4, 100))  # another thread's prefill of the same
    assert runner.closed == [1, 3]
    prefills.put((1, (5,)), kept(5, 400))  # more than there is room for at all
    assert (runner.closed, prefills.tokens) == ([1, 3, 2, 0, 4, 5], 0)
    assert not prefills.shrink(0)


def test_kept_prefills_give_way_to_requests() -> None:
    runner = runner_of(cache=0)  # the context's 16 pages and 64 more
    engine = engine_of(runner)
    alone = list(engine_of(runner_of()).tokens(LONG, max_new_tokens=3))
    for first in range(8):  # 13 pages each
        assert len(list(engine.tokens([first, *LONG[1:]], max_new_tokens=3))) == 3
    assert runner.core.cache_pages_used >= 13
    (held,), _ = runner.open([ids_of(1000, 5)], [1000])
    runner.close(held)
    assert list(engine.tokens(LONG, max_new_tokens=3)) == alone


# --- going back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"attention_window": 64, "position_encoding": "xpos"}], ids=["rope", "xpos"])
def test_a_sequence_that_went_back_goes_on_as_if_it_had_not_been_there(changes: dict[str, Any]) -> None:
    config = CONFIG.replace(**changes)
    runner = runner_of(config)
    core, chance = runner.core, random.Random(2)
    ids = ids_of(60, 1)
    (handle,), _ = runner.open([ids], [60])
    for _ in range(60):
        added = [chance.randrange(61) for _ in range(chance.randint(1, 6))]
        logits = np.empty((len(added), 61), np.float32)
        core.step([handle], [added], logits, True)
        assert np.array_equal(logits, runner.logits([*ids, *added], 60)[len(ids) :])
        stay = chance.randint(0, len(added))
        length = len(ids) + stay
        if changes and max((len(ids) + len(added)) // 64, 1) > max(length // 64, 1):  # a window was left behind
            with pytest.raises(ValueError, match="within what the window still holds"):
                core.rewind(handle, length)
            stay = len(added)
        else:
            core.rewind(handle, length)
        ids += added[:stay]
    with pytest.raises(ValueError, match=f"length must be between 60 and {len(ids)}, got 59"):
        core.rewind(handle, 59)
    with pytest.raises(ValueError, match="request must be open"):
        core.rewind(99, 60)
