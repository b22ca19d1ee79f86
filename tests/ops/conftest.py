"""Every op test runs on each instruction set that this processor has; thread counts and sets are restored."""

from collections.abc import Iterator

import pytest

from hrmcore import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)
