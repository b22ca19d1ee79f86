"""Writing the files of a checkpoint's folder: all of them whole, or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from hrmcore.durable import replacing
from hrmcore.tokenizer import tokenizer_files


def file_copies(folder: str | Path | None) -> dict[str, Callable[[Path], object]]:
    """For `write_files`: the tokenizer's files of a folder. Raises FileNotFoundError when it has no tokenizer."""
    if folder is None:
        return {}
    files = tokenizer_files(Path(folder))
    if not {path.name for path in files} & {"tokenizer.model", "tokenizer.json"}:
        raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json")
    return {source.name: partial(shutil.copyfile, source) for source in files}


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all files under temporary names, flush them to the disk, then rename all."""
    with replacing(*(folder / name for name in writers)) as staged:
        for temporary, write in zip(staged, writers.values(), strict=True):
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors leaves files that only their owner can read
