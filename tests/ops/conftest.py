"""Op tests run on each instruction set that this processor has, and, where the op has CUDA kernels, on the emulator of
CUDA (`backend`); thread counts and sets are restored."""

from collections.abc import Iterator

import pytest
from emulator import emulated_cuda

from hrmcore import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[*_C.supported_isas(), "cuda-emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda-emulated":
        with emulated_cuda():
            yield request.param
        return
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)
