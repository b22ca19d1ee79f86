"""The boundary of the compiled module: DLPack, instruction sets, threads. Children show what a fresh process does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.dlpack import to_dlpack

from hrmcore import _C

pytestmark = pytest.mark.native


PATIENCE = 600  # seconds: under an emulator, importing torch takes minutes


def child(program, **environment):
    """Run a Python program in a fresh process; returns (exit status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, env=os.environ | environment
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def normalise(x, y):
    _C.rms_norm_forward(x, None, y, None, 0.0)


def test_numpy_arrays():
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    y = np.full((3, 4), np.nan, dtype=np.float32)
    normalise(x, y)
    np.testing.assert_allclose(y, x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True)), rtol=1e-6)


def test_strides_come_across():
    x, y = np.zeros((6, 9), dtype=np.float32), np.zeros((3, 4), dtype=np.float32)
    view = x[4::-2, 2:6]  # a negative row stride
    view[:] = [[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 3, 4]]
    normalise(view, y)
    np.testing.assert_allclose(y, [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1.2, 1.6]], rtol=1e-6)


FLOATS = np.ones((2, 4), dtype=np.float32)
READ_ONLY = np.ones((2, 4), dtype=np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0]], "x must be a tensor (any DLPack producer), got <class 'list'>"),
        (None, "x must be a tensor"),
        (FLOATS.astype(np.float16), "x must be float32 or bfloat16, got an unsupported dtype"),
        (FLOATS.astype(np.complex64), "x must be float32 or bfloat16, got an unsupported dtype"),
        (FLOATS > 0, "x must be float32 or bfloat16, got an unsupported dtype"),
        (FLOATS.astype(">f4"), "x must be an array that can be exported through DLPack"),
        (READ_ONLY, "x must be an array that can be exported through DLPack"),
        (np.ones(7 * [1], dtype=np.float32), "x must be of rank 6 at most, got rank 7"),
        (np.ndarray((2, 4), np.float32, bytearray(33), offset=1), "x must be aligned to its element size"),
        (np.float32(1.0), "x must be "),
    ],
)
def test_bad_array(x, message):
    with pytest.raises(ValueError, match="rms_norm_forward: " + re.escape(message)):
        normalise(x, FLOATS.copy())


def test_consumed_capsule():
    capsule = to_dlpack(torch.ones(2, 4))
    torch.from_dlpack(capsule)
    with pytest.raises(ValueError, match="x must be a DLPack capsule that nobody has consumed"):
        normalise(capsule, FLOATS.copy())


def test_wrong_number_of_arguments():
    with pytest.raises(TypeError):
        _C.rms_norm_forward(FLOATS)


def test_instruction_sets():
    supported = _C.supported_isas()
    assert supported[0] == "generic"
    before = _C.isa()
    try:
        for isa in supported:
            _C.set_isa(isa)
            assert _C.isa() == isa
        with pytest.raises(ValueError, match="'sse9' is unknown or not supported here; choose one of generic"):
            _C.set_isa("sse9")
        assert _C.isa() == supported[-1], "a refused name must change nothing"
    finally:
        _C.set_isa(before)


PRINT_ISA = "from hrmcore import _C; print(_C.isa())"


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_environment_forces_the_instruction_set(isa):
    assert child(PRINT_ISA, HRMCORE_ISA=isa) == (0, isa, "")


def test_strongest_instruction_set_by_default():
    assert child(PRINT_ISA, HRMCORE_ISA="") == (0, _C.supported_isas()[-1], "")


def test_bad_instruction_set_in_the_environment():
    status, _, error = child(PRINT_ISA, HRMCORE_ISA="mmx")
    assert status == 1
    assert "ImportError: the environment variable HRMCORE_ISA is wrong" in error
    assert "'mmx' is unknown or not supported here; choose one of generic" in error


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_count_out_of_bounds(threads):
    before = _C.num_threads()
    with pytest.raises(ValueError, match=f"threads must be between 1 and 1024, got {threads}"):
        _C.set_num_threads(threads)
    assert _C.num_threads() == before


def test_threads_default_to_the_processors_that_this_process_may_use():
    program = "from hrmcore import _C; print(_C.num_threads())"
    assert child(program) == (0, str(len(os.sched_getaffinity(0))), "")


# Sums of squares over many rows, on 1 to 7 threads and again on each: all bits must agree.
ROWS_ON_THREADS = """
import os
import numpy as np
from hrmcore import _C

x = np.random.default_rng(0).standard_normal((5170, 65), dtype=np.float32)

def rows(threads):
    y = np.full_like(x, np.nan)
    _C.set_num_threads(threads)
    _C.rms_norm_forward(x, None, y, None, 1e-6)
    return y.tobytes()

expected = rows(1)
assert not np.isnan(np.frombuffer(expected, np.float32)).any()
for threads in (2, 3, 3, 7, 2, 1, 7):
    assert rows(threads) == expected, threads
"""


def test_own_threads_where_no_openmp_is_loaded():
    program = ROWS_ON_THREADS + (
        "print(len(os.listdir('/proc/self/task')) >= 7)\n"
        "print([line for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line or 'torch' in line])"
    )
    assert child(program, OPENBLAS_NUM_THREADS="1") == (0, "True\n[]", "")


FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if all(rows(threads) == expected for threads in (1, 2, 3, 2)) else 1)
print(os.waitpid(child, 0)[1], all(rows(threads) == expected for threads in (3, 2)))
"""


def test_after_a_fork():
    assert child(ROWS_ON_THREADS + FORK) == (0, "0 True", "")


def test_after_a_fork_with_openmp():
    """torch's OpenMP team does not survive a fork: waiting for it would hang the child."""
    assert child("import torch\n" + ROWS_ON_THREADS + FORK) == (0, "0 True", "")


def test_threads_of_the_caller():
    """Kernels called from several Python threads at once, each on several threads, do not disturb one another."""
    program = ROWS_ON_THREADS + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as callers:\n"
        "    print(set(callers.map(rows, [2, 3] * 40)) == {expected})"
    )
    assert child(program) == (0, "True", "")


@pytest.mark.memory
def test_calls_leave_no_memory_behind():
    """10,000 rounds that lost 32 bytes each, the least that malloc gives, would grow by 312 KiB."""
    program = Path(__file__).parent / "soak" / "leaks.py"
    done = subprocess.run([sys.executable, program, "10000"], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 150
