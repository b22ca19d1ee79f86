"""Two CUDA devices: every launch goes to that of its tensors, whichever one is in use; the emulator pretends both."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import emulator
from support.emulator import device_with, emulated_cuda, launches_by_device, on_device
from support.graphs import Replayed
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from hrmcore import _C, optim
from hrmcore.checkpoint.host_copies import CudaSide
from hrmcore.config import HRMConfig
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.sampling import Sampler, Sampling
from hrmcore.graphs import CudaGraphs
from hrmcore.model import HRM, Layout
from hrmcore.ops.cross_entropy import cross_entropy

SECOND = 1
CONFIG = HRMConfig(50, 32, 32, 2, 2, 16, H_cycles=2, L_cycles=2, max_position_embeddings=256)

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("one_thread")]


def rms_norm(export: Callable[[Tensor], Any]) -> None:
    x, y = torch.ones(3, 16), torch.empty(3, 16)
    _C.rms_norm_forward(export(x), None, export(y), None, 1e-6)
    assert torch.allclose(y, x)


def adamw_step(export: Callable[[Tensor], Any]) -> None:
    param, grad, average, second = (torch.ones(7) for _ in range(4))
    lists = [[export(x)] for x in (param, grad, average, second)]
    _C.adamw_step([0], *lists, [None], [1], 0.1, 0.9, 0.95, 0.0, 1e-8, 0.0, None)
    assert (param < 1).all()


def rotate_append(export: Callable[[Tensor], Any]) -> None:
    q, k, v = (torch.ones(3, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    q_out, k_out, keys, values = (torch.empty_like(q) for _ in range(4))
    operands = {
        **{"q": q, "k": k, "v": v, "q_out": q_out, "k_out": k_out, "keys": keys, "values": values},
        **{"table": torch.ones(4, 16), "positions": torch.arange(3, dtype=torch.int32), "rows": torch.arange(3)},
    }
    _C.cuda_rotate_append(**{name: export(tensor) for name, tensor in operands.items()}, stream=0)
    assert torch.equal(values, v)


ENTRIES = [rms_norm, adamw_step, rotate_append]  # one for each way by which a launch leaves the module


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("number", [0, SECOND])
def test_a_launch_goes_to_the_device_of_its_tensors(entry: Callable[..., None], number: int) -> None:
    with emulated_cuda():
        launches_by_device()
        entry(lambda tensor: on_device(tensor, number))
        launches = launches_by_device()
        assert launches[number] > 0
        assert launches[1 - number] == 0
        assert emulator.library.hrmcore_test_current_device() == 0


def test_a_device_that_is_not_there_and_tensors_on_two() -> None:
    with emulated_cuda():
        with pytest.raises(RuntimeError, match="rms_norm_forward on CUDA: invalid device ordinal"):
            rms_norm(lambda tensor: on_device(tensor, 2))
        numbers = iter([0, SECOND])
        with pytest.raises(ValueError, match=r"y.*on the device of the operands before it.*on another device"):
            rms_norm(lambda tensor: on_device(tensor, next(numbers)))
        assert emulator.library.hrmcore_test_current_device() == 0


def test_each_device_says_how_many_requests_it_takes() -> None:
    numbers: dict[str, Any] = {"width": 1536, "ffn": 4096, "heads": 12, "head_dim": 128, "xpos": False, "window": 0}
    rest = {"int8_cache": False, "table_length": 4, "dtype": "bfloat16", "blocks": 132}
    with emulated_cuda(), device_with(227, SECOND):
        first, second = (_C.cuda_step_most_requests(**numbers, **rest, device=number) for number in (0, SECOND))
    assert first < second == 32


@contextlib.contextmanager
def all_tensors_on(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever hrmcore hands to a kernel lies on an emulated device of this number."""
    with monkeypatch.context() as patch, emulated_cuda():
        for name, module in list(sys.modules.items()):
            if name.startswith("hrmcore.") and getattr(module, "to_dlpack", None) is to_dlpack:
                patch.setattr(module, "to_dlpack", lambda tensor: on_device(tensor, number))
        launches_by_device()
        yield


def test_a_model_on_the_second_device_answers_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in and out of buckets, the decode step, sampling, in bfloat16 and int8: no launch leaves the device."""
    for dtype in ("bfloat16", "int8"):
        torch.manual_seed(0)
        model = HRM(CONFIG).requires_grad_(False)
        with all_tensors_on(SECOND, monkeypatch):
            runner = CudaRunner(model, dtype, blocks=2, graphs=Replayed())
            handles, _ = runner.open([[1, 2, 3]], [3])
            runner.step(handles, [4])
            runner.draw(handles, [5], [Sampler(Sampling(temperature=1.0), [1])], [1])
            first, second = launches_by_device()
        assert second > 10
        assert first == 0


def test_a_step_of_training_on_the_second_device_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = HRM(CONFIG)
    optimizer = optim.AdamW(list(model.parameters()), lr=1e-3)
    with all_tensors_on(SECOND, monkeypatch):
        states = model.hidden(torch.arange(6), Layout.of([6], [2]))
        loss = cross_entropy(states, model.lm_head.weight, torch.arange(6), torch.arange(6))
        loss.backward()
        optimizer.step()
        first, second = launches_by_device()
    assert second > 20
    assert first == 0


class Cuda:
    """What is asked of torch.cuda, and the device that is in use when it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self.asked: list[tuple[str, Any]] = []
        for name in ("device", "stream", "graph", "Stream", "current_stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.number = self.number, device.index
        yield
        self.number = before

    @contextlib.contextmanager
    def graph(self, graph: object, **keys: object) -> Iterator[None]:
        self.asked.append(("graph", self.number))
        yield

    def Stream(self, device: torch.device) -> Cuda:
        self.asked.append(("Stream", device.index))
        return self

    def current_stream(self, device: torch.device) -> Cuda:
        self.asked.append(("current_stream", device.index))
        return self

    def stream(self, stream: Cuda) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> Cuda:
        return self

    def graph_pool_handle(self) -> int:
        return 0

    def wait_stream(self, other: Cuda) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return object()

    def replay(self) -> None: ...


def test_graphs_and_copies_beside_use_streams_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    device = torch.device("cuda", SECOND)
    graphs, side = CudaGraphs(device), CudaSide(device)
    graphs.warm(list)
    graphs.capture(list)
    side.begin([])
    side.hold()
    assert {number for _, number in cuda.asked} == {SECOND}
    assert [name for name, _ in cuda.asked].count("graph") == 1
    assert cuda.number == 0
