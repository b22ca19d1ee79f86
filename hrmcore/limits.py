"""How much of a file is parsed at once. Imports nothing of ours.

Parsed JSON takes up to 48 bytes for each of its own: an object like {"aaaa":{},…} needs some 400 bytes a member in
Python, for 10 in the file. So what is parsed in one piece is bounded, and no file takes more memory than four times its
size and 48 times MOST_PARSED.
"""

from __future__ import annotations

from pathlib import Path

# Bytes. The longest sequence, 2^20 tokens, is about as much text; a header of so many describes 40,000 tensors.
MOST_PARSED = 1 << 22


def read_bounded(path: Path, most: int = MOST_PARSED) -> bytes:
    """All of a file. Raises ValueError naming it when it has more than `most` bytes, and OSError."""
    with path.open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{path}: larger than the {most} bytes that such a file may have")
    return text
