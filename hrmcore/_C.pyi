# The signatures are stated once, in csrc/bindings/; a wrong call is a TypeError or ValueError at run time.
from typing import Any

def __getattr__(name: str) -> Any: ...
