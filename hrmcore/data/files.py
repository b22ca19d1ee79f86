"""Files of records as rows: JSON lines, JSON arrays, CSV, Parquet, compressed or not. Imports no torch.

A row is the JSON line that its record would be, with the number under which a person finds it in the file.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

PARQUET = ".parquet"
TEXT = ".txt"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ROWS = 1024  # rows of a Parquet file that are held at once


class Row(NamedTuple):
    """`number` is the line where the row begins, from 1; in Parquet the row's own number."""

    number: int
    line: bytes


def expand(names: Sequence[str | Path]) -> list[Path]:
    """The files that names and glob patterns stand for. A pattern's files come in alphabetical order.

    Raises ValueError on a pattern that no file matches.
    """
    paths: list[Path] = []
    for name in names:
        if Path(name).exists() or not glob.has_magic(str(name)):
            paths.append(Path(name))
            continue
        found = sorted(glob.glob(str(name), recursive=True))
        if not found:
            raise ValueError(f"{name}: no file matches it")
        paths += map(Path, found)
    return paths


def source_name(path: Path) -> str:
    """A file's name without its endings: chat of chat.jsonl.gz."""
    return _uncompressed(path).stem


def is_json_lines(path: Path) -> bool:
    """Whether the file holds the lines as they are read, uncompressed."""
    return path.suffix not in (PARQUET, TEXT, ".json", *_DELIMITERS, *COMPRESSED)


def read_rows(path: str | Path, columns: Callable[[Sequence[str]], Sequence[str]] | None = None) -> Iterator[Row]:
    """The rows of a file, by its ending: .json, .csv, .tsv, .txt, .parquet, else JSON lines; each perhaps compressed.

    A .txt file is one row, {"text": all of it}.

    `columns` is called with the column names of a table; of a Parquet file those are read that it returns, all without
    it. It may raise ValueError.
    Raises FileNotFoundError when there is no such file, and ValueError naming file and line where it cannot be read on.
    """
    path = Path(path)
    suffix = _uncompressed(path).suffix
    if suffix == PARQUET:
        if path.suffix != PARQUET:
            raise ValueError(f"{path}: Parquet compresses its own columns; unpack the file")
        yield from _parquet(path, columns)
        return
    with _open(path) as file:
        try:
            if suffix in _DELIMITERS:
                yield from _csv(path, file, _DELIMITERS[suffix], columns)
            elif suffix == ".json":
                yield from _json(path, file)
            elif suffix == TEXT:
                yield Row(1, json.dumps({"text": "".join(_text_lines(path, file))}).encode())
            else:
                yield from map(Row._make, enumerate(file, start=1))
        except _damage(path) as error:
            raise ValueError(f"{path}: the compressed file is damaged or cut short ({error})") from None


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """What the libraries raise on a damaged file of this ending."""
    if path.suffix == ".gz":
        import gzip
        import zlib

        return EOFError, gzip.BadGzipFile, zlib.error
    if path.suffix == ".xz":
        import lzma

        return EOFError, lzma.LZMAError
    return (EOFError, OSError) if path.suffix in COMPRESSED else ()


def _open(path: Path) -> Any:
    """The file's bytes, unpacked."""
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path)
    if path.suffix == ".bz2":
        import bz2

        return bz2.open(path)
    if path.suffix == ".xz":
        import lzma

        return lzma.open(path)
    if path.suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> IO[bytes]:
    with path.open("rb"):  # a missing file is named as every other one is
        pass
    pyarrow = _pyarrow(path)
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: pyarrow is not installed; `pip install hrmcore[parquet]` brings it") from error
    return pyarrow


def _parquet(path: Path, columns: Callable[[Sequence[str]], Sequence[str]] | None) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            wanted = list(columns(found)) if columns else found
            unread = dict.fromkeys(name for name in found if name not in wanted)  # of these only the names are told
            for batch in file.iter_batches(_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    given = {name: value for name, value in row.items() if value is not None} | unread
                    yield Row(number, json.dumps(given, default=lambda _: None).encode())  # what JSON lacks is no text
    except (ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from None


def _csv(
    path: Path, file: IO[bytes], delimiter: str, columns: Callable[[Sequence[str]], Sequence[str]] | None
) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_text_lines(path, file), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header or not any(header):
            raise ValueError(f"{path}:1: a first line with the columns' names is missing")
        _check_columns(path, header, columns)
        begins = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                cell_count = f"has {len(cells)} cells, the first line names {len(header)} columns"
                raise ValueError(f"{path}:{begins}: {cell_count}; quote the cells that hold a {delimiter!r}")
            if cells:
                yield Row(begins, json.dumps(dict(zip(header, cells, strict=True))).encode())
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _check_columns(path: Path, header: Sequence[str], columns: Callable[[Sequence[str]], Sequence[str]] | None) -> None:
    try:
        if columns:
            columns(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def _json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """The elements of an array; a file that begins with an object is read as JSON lines."""
    opening: list[bytes] = []
    for line in file:
        opening.append(line)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            break
    lines = itertools.chain(opening, file)
    if opening and opening[-1].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _elements(path, "".join(_text_lines(path, lines)))
    else:
        yield from map(Row._make, enumerate(lines, start=1))


def _elements(path: Path, text: str) -> Iterator[Row]:
    """The elements of the one array that a text holds, each with the line where it begins."""
    decoder = json.JSONDecoder()
    place, line, counted = text.index("[") + 1, 1, 0

    def skip(place: int) -> int:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        return place

    place = skip(place)
    while text[place : place + 1] != "]":
        line += text.count("\n", counted, place)
        counted = place
        try:
            _, end = decoder.raw_decode(text, place)
        except ValueError:
            raise ValueError(f"{path}:{line}: not JSON: the array's element that begins here is not whole") from None
        except RecursionError:
            raise ValueError(f"{path}:{line}: not JSON: brackets within brackets, too deep") from None
        yield Row(line, text[place:end].encode("utf-8", "surrogatepass"))
        place = skip(end)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise ValueError(f"{path}:{line}: not JSON: a comma or the array's end is missing")
    if text[place + 1 :].strip():
        raise ValueError(f"{path}: text follows the array's end")
