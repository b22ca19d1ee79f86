"""What Python does while the engine is inside a step, each in a process of its own: a lock held there waits for ever.

    python -m support.inside_a_step CASE

prints the case's name when it ends; after 60 s it prints every thread's stack and fails. Stays clear of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hrmcore import _C
from hrmcore.checkpoint.hrm_text import key_table
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.engine import Engine
from hrmcore.engine.packed_file import PACKED_FILE, write_packed
from hrmcore.engine.runner import Interrupted

# Large enough for a prefill of more than a tenth of a second, after which the step asks for the first time.
PROMPT = [position % 61 for position in range(1600)]
CONFIG = HRMConfig(61, 256, 512, 2, 2, 64, max_position_embeddings=len(PROMPT) + 50)
SMALL = HRMConfig(61, 64, 64, 1, 2, 32, max_position_embeddings=128)
TIME_LIMIT = 60  # seconds


def filled(config: HRMConfig, threads: int = 2) -> CpuRunner:
    """An engine of random weights."""
    runner = CpuRunner(config, "int8", None, threads, cache_bytes=0)
    runner.core.allocate_weights()
    chance = np.random.default_rng(0)
    for key in key_table(config):
        runner.core.set_weight(key.name, chance.normal(scale=0.1, size=key.shape).astype(np.float32))
    return runner


def prefill(runner: CpuRunner, act: Callable[[], None], kept_pages: int = 0) -> None:
    """A long prefill, inside which `act` runs once; its answer must be what it is without.

    `kept_pages` are those that an engine keeps of what it has answered.
    """
    acted = []

    def stop() -> bool:
        if not acted:
            acted.append(True)
            act()
        return False

    (handle,), rows = runner.open([PROMPT], [len(PROMPT)], stop)
    assert acted, "the prefill was too short to be asked"
    assert np.array_equal(rows[0], runner.logits(PROMPT, len(PROMPT))[-1])
    runner.close(handle)
    assert (runner.open_sequences, runner.core.cache_pages_used) == (0, kept_pages)


def handler_closes() -> None:
    """A signal's handler closes another stream."""
    runner = filled(CONFIG)
    other = Engine(runner, None, Path()).tokens([1, 2, 3], ignore_eos=True)
    next(other)
    signal.signal(signal.SIGALRM, lambda *_: other.close())
    prefill(runner, lambda: signal.raise_signal(signal.SIGALRM), kept_pages=1)


def handler_closes_between_two_questions() -> None:
    """The same when the signal comes while the step computes."""
    runner = filled(CONFIG)
    other = Engine(runner, None, Path()).tokens([1, 2, 3], ignore_eos=True)
    next(other)
    closed = []
    signal.signal(signal.SIGALRM, lambda *_: closed.append(other.close()))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    runner.logits(PROMPT, 0)
    while not closed:
        time.sleep(0.01)
    assert runner.open_sequences == 0


def collector_finalises() -> None:
    """The garbage collector finalises a stream that was dropped in a reference cycle."""
    runner = filled(CONFIG)
    gc.disable()

    def use_and_forget() -> None:
        cycle: list[object] = []
        cycle += [cycle, Engine(runner, None, Path()).tokens([1, 2, 3], ignore_eos=True)]
        next(cycle[1])  # type: ignore[call-overload]

    use_and_forget()
    prefill(runner, lambda: [gc.collect(), None][1], kept_pages=1)


def stop_closes_its_own_request() -> None:
    """A request that is closed in its own step is released when the step ends."""
    runner = filled(CONFIG)
    core, logits = runner.core, np.empty((1, CONFIG.vocab_size), np.float32)
    for stops in (False, True):
        request, during = core.open(0), []

        def stop(request: int = request, during: list = during, stops: bool = stops) -> bool:
            if not during:
                core.close(request)
                during.append((core.open_requests, core.cache_pages_used))
            return stops

        assert core.step([request], [PROMPT], logits, False, stop) is not stops
        assert during == [(0, -(-len(PROMPT) // 64))]
        assert (core.open_requests, core.cache_pages_used) == (0, 0)
        with pytest.raises(ValueError, match="which is not"):
            core.close(request)
        with pytest.raises(ValueError, match="which is not"):
            core.step([request], [[1]], logits, False)


def another_thread_opens_and_closes() -> None:
    """A thread opens and closes, and the step waits for it."""
    runner = filled(CONFIG)
    (other,), _ = runner.open([[1, 2, 3]], [0])

    def act() -> None:
        def open_and_close() -> None:
            runner.close(other)
            runner.close(runner.core.open(0))

        thread = threading.Thread(target=open_and_close)
        thread.start()
        thread.join()
        runner.close(runner.core.open(0))

    prefill(runner, act)


def steps_inside_are_refused() -> None:
    """A step inside a step of the same engine would wait for itself."""
    runner = filled(CONFIG)

    def act() -> None:
        with pytest.raises(RuntimeError, match="inside a step"):
            runner.logits([1, 2], 0)

    prefill(runner, act)


def everything_else_works() -> None:
    """Kernels, packing, mapping a file, sampling and another engine's steps take the other locks of the core."""
    runner, other, x = filled(CONFIG), filled(SMALL), np.ones((64, 4096), np.float32)
    folder = Path(tempfile.mkdtemp())
    header = {"config": SMALL.to_dict(), "dtype": "int8", "bytes": other.core.weight_bytes}
    header["checksum"] = other.core.checksum()
    write_packed(folder / PACKED_FILE, header, other.core.packed_weights())
    enough = threading.Event()

    def kernels() -> None:
        while not enough.is_set():
            _C.rms_norm_forward(x, None, np.empty_like(x), None, 1e-6)
            CpuRunner.from_checkpoint(folder, "auto", None, 2, 0).logits([1, 2, 3], 0)

    def act() -> None:
        for _ in range(5):
            kernels_once()
            prefilled = filled(SMALL).logits([1, 2, 3], 0)
            assert np.array_equal(prefilled, other.logits([1, 2, 3], 0))
            list(Engine(other, None, Path()).tokens([1, 2, 3], temperature=1.0, seed=1, max_new_tokens=3))

    def kernels_once() -> None:
        _C.rms_norm_forward(x, None, np.empty_like(x), None, 1e-6)
        mapped = CpuRunner.from_checkpoint(folder, "auto", None, 2, 0)
        mapped.logits([1, 2, 3], 0)

    threads = [threading.Thread(target=kernels) for _ in range(2)]
    for thread in threads:
        thread.start()
    prefill(runner, act)
    enough.set()
    for thread in threads:
        thread.join()


def emulated_kernels_work() -> None:
    """The tests' emulator of CUDA makes one launch at a time, of this thread and of others."""
    runner, x, y = filled(CONFIG), np.ones((8, 64), np.float32), np.empty((8, 64), np.float32)
    _C.emulate_cuda(str(Path(_C.__file__).with_name("_C_emulated.so")))
    enough = threading.Event()

    def launch() -> None:
        while not enough.is_set():
            _C.rms_norm_forward(x, None, np.empty_like(y), None, 1e-6)

    thread = threading.Thread(target=launch)
    thread.start()
    prefill(runner, lambda: _C.rms_norm_forward(x, None, y, None, 1e-6))
    enough.set()
    thread.join()
    assert np.allclose(y, 1)


@contextlib.contextmanager
def held(runner: CpuRunner) -> Iterator[None]:
    """Another thread stays in a step of the runner, until the context ends and the step is given up."""
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> bool:
        inside.set()
        go_on.wait()
        return True

    def blocked() -> None:
        with pytest.raises(Interrupted):
            runner.open([PROMPT], [0], hold)

    thread = threading.Thread(target=blocked)
    thread.start()
    inside.wait()
    yield
    go_on.set()
    thread.join()


def a_step_that_waits_can_be_interrupted() -> None:
    """A step that waits for another thread's hears signals and `stop`."""
    runner = filled(CONFIG)
    with held(runner):
        with pytest.raises(Interrupted):
            runner.open([[1, 2, 3]], [0], lambda: True)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            runner.logits([1, 2, 3], 0)
    assert (runner.open_sequences, runner.core.cache_pages_used) == (0, 0)
    runner.logits([1, 2, 3], 0)


def a_forked_child_goes_on() -> None:
    """A child that was forked while another thread was in a step has no such thread to wait for."""
    runner = filled(CONFIG)
    with held(runner):
        if (child := os.fork()) == 0:
            runner.logits([1, 2, 3], 0)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


CASES = (
    handler_closes,
    handler_closes_between_two_questions,
    collector_finalises,
    stop_closes_its_own_request,
    another_thread_opens_and_closes,
    steps_inside_are_refused,
    everything_else_works,
    emulated_kernels_work,
    a_step_that_waits_can_be_interrupted,
    a_forked_child_goes_on,
)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    {case.__name__: case for case in CASES}[sys.argv[1]]()
    print(sys.argv[1])
