"""Files of records as rows: JSON lines, JSON arrays, CSV, Parquet, compressed or not. Imports no torch.

A row is the JSON line that its record would be, with the number under which a person finds it in the file.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from hrmcore.limits import MOST_PARSED

PARQUET = ".parquet"
TEXT = ".txt"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ROWS = 1024  # rows of a Parquet file that are held at once
_NUMBER = 64  # characters in which it shows whether a number goes on
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 16  # bytes of a JSON array that are read at once


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
                yield from map(Row._make, enumerate(_lines(file), start=1))
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
    with path.open("rb"):  # a missing file is named as every other one is
        pass
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
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _csv(
    path: Path, file: IO[bytes], delimiter: str, columns: Callable[[Sequence[str]], Sequence[str]] | None
) -> Iterator[Row]:
    csv.field_size_limit(MOST_PARSED)
    begins, held = 1, 0  # where the row under way begins, and how long it is already

    def lines() -> Iterator[str]:
        nonlocal held
        for line in _text_lines(path, _lines(file)):
            held += len(line)
            if held > MOST_PARSED:
                fault = f"the row that begins here is longer than {MOST_PARSED} characters"
                raise ValueError(f"{path}:{begins}: {fault}; a quote may be missing")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header or not any(header):
            raise ValueError(f"{path}:1: a first line with the columns' names is missing")
        _check_columns(path, header, columns)
        begins, held = reader.line_num + 1, 0
        for cells in reader:
            if cells and len(cells) != len(header):
                cell_count = f"has {len(cells)} cells, the first line names {len(header)} columns"
                raise ValueError(f"{path}:{begins}: {cell_count}; quote the cells that hold a {delimiter!r}")
            if cells:
                yield Row(begins, json.dumps(dict(zip(header, cells, strict=True))).encode())
            begins, held = reader.line_num + 1, 0
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _check_columns(path: Path, header: Sequence[str], columns: Callable[[Sequence[str]], Sequence[str]] | None) -> None:
    try:
        if columns:
            columns(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than MOST_PARSED only so much that this shows."""
    while line := file.readline(MOST_PARSED + 1):
        rest = line
        while len(line) > MOST_PARSED and rest and not rest.endswith(b"\n"):
            rest = file.readline(_CHUNK)
        yield line


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_PARSED:
            raise ValueError(f"{path}:{number}: a line of more than {MOST_PARSED} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def _json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """The elements of an array; a file that begins with anything else is read as JSON lines."""
    if _is_array(path):
        yield from _Array(path, file).elements()
    else:
        yield from map(Row._make, enumerate(_lines(file), start=1))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        start = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
        while not start.strip() and (more := file.read(_CHUNK)):
            start = more
        return bool(start.lstrip().startswith(b"["))


class _Array:
    """The one array that a file holds, read piece by piece: its text from the element under way on is held."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place = "", 0
        self._line, self._counted = 1, 0  # the number of the line that this place of the text is in
        self._ended = False

    def elements(self) -> Iterator[Row]:
        """Each with the line where it begins."""
        self._next()
        self._place += 1
        first = self._next()
        while first != "]":
            yield self._element()
            first = self._next()
            if first == ",":
                self._place += 1
                first = self._next()
            elif first != "]":
                raise self._fault("a comma or the array's end is missing")
        self._place += 1
        if self._next():
            raise ValueError(f"{self._path}: text follows the array's end")

    def _element(self) -> Row:
        while True:
            held = len(self._text) - self._place
            try:
                _, end = self._parse(self._text, self._place)
                if self._ended or len(self._text) > end + _NUMBER or self._text[end : end + 1] in (*" \t\r\n,]",):
                    break  # else a number may go on
            except RecursionError:
                raise self._fault("brackets within brackets, too deep") from None
            except ValueError:
                if self._ended:
                    raise self._fault("the array's element that begins here is not whole") from None
                if held > MOST_PARSED:
                    fault = f"the array's element that begins here is not whole, or longer than {MOST_PARSED} bytes"
                    raise self._fault(fault) from None
            while len(self._text) - self._place <= 2 * held and self._read():  # what is tried again has doubled
                pass
        row = Row(self._number(), self._text[self._place : end].encode("utf-8", "surrogatepass"))
        self._place = end
        return row

    def _next(self) -> str:
        """Pass white space; the character that follows, or none at the end of the file."""
        while True:
            self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Read on, forgetting what is passed; False at the end of the file."""
        if self._ended:
            return False
        self._number()
        self._text, self._place, self._counted = self._text[self._place :], 0, 0
        chunk = self._file.read(_CHUNK)
        self._ended = not chunk
        try:
            self._text += self._decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise ValueError(f"{self._path}:{line}: not UTF-8; save the file as UTF-8") from None
        return True

    def _number(self) -> int:
        """The number of the line at the place."""
        self._line += self._text.count("\n", self._counted, self._place)
        self._counted = self._place
        return self._line

    def _fault(self, fault: str) -> ValueError:
        return ValueError(f"{self._path}:{self._number()}: not JSON: {fault}")
