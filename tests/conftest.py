"""What tests share: the backends of a kernel, threads, and a small random model with a tokenizer."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator import emulated_cuda
from support.two_ranks import RECORDS, Ranks

from hrmcore import _C, machine
from hrmcore.config import HRMConfig
from hrmcore.engine.engine import Engine, load
from hrmcore.model import HRM
from hrmcore.tokenizer import train_tokenizer

# For the tests of bench/; last, so that the installed package wins over the sources.
sys.path.append(str(Path(__file__).parents[1]))

# A shell ignores SIGINT for what it starts in the background, and what is ignored is inherited: the tests of Ctrl-C
# would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLES = [
    {"task": "chain_sum", "instruction": "what is 3 plus 4?", "response": "7"},
    {"task": "grid", "instruction": "copy\n1 2\n3 4", "response": "1 2\n3 4"},
]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped: one line a reason."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests that train in two: they import torch only once."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of what the ranks train on."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((record["instruction"] for record in RECORDS), folder, vocab_size=330)
    return folder


@pytest.fixture
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the measurement of the machine's peak, which the MFU alone needs."""
    monkeypatch.setattr(machine, "peak_flops", lambda precision, device: 1e12)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    with _instruction_set(request.param):
        yield request.param


EMULATED = pytest.param("cuda-emulated", marks=pytest.mark.emulated)


@pytest.fixture(params=[*_C.supported_isas(), EMULATED])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, and the emulator of CUDA: for what has CUDA kernels."""
    with emulated_cuda() if request.param == "cuda-emulated" else _instruction_set(request.param):
        yield request.param


@pytest.fixture(params=["cpu", EMULATED])
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's best kernels, and the emulator of CUDA: for what does not depend on the instruction set."""
    with emulated_cuda() if request.param == "cuda-emulated" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: the models are tiny, and the machine may be busy."""
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    _C.set_num_threads(before[1])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a folder with a tokenizer and sample questions. Its answers are noise."""
    folder = tmp_path_factory.mktemp("checkpoint")
    texts = [f"what is {i} plus {j}? é{i} ü, copy\n{i} {j}" for i in range(40) for j in range(40)]
    tokenizer = train_tokenizer(texts, folder, vocab_size=300)
    torch.manual_seed(0)
    config = HRMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers_per_stack=1,
        num_attention_heads=2,
        head_dim=16,
        H_cycles=2,
        L_cycles=2,
        max_position_embeddings=2048,
    )
    hrm = HRM(config)
    with torch.no_grad():
        hrm.lm_head.weight[tokenizer.eoa] = 0  # greedy answers do not end by themselves
    hrm.save_pretrained(folder)
    (folder / "samples.json").write_text(json.dumps(SAMPLES))
    return folder


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Engine:
    """The checkpoint, loaded."""
    return load(checkpoint)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved while a test runs, in order; they are written, too."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    original = Figure.savefig

    def keep(self: Figure, path: Path, **options: Any) -> None:
        drawn.append(self)
        original(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn
