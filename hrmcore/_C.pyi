# The kernels' signatures are stated once, in csrc/bindings.cpp; a wrong call is a TypeError or ValueError at run time.
from typing import Any

def __getattr__(name: str) -> Any: ...
