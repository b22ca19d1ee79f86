"""The token store: tokenised records in a folder, memory-mapped when they are read. Imports no torch.

tokens.npy      every sequence with its eoa, in the smallest unsigned type that holds the vocabulary
offsets.npy     (N+1) int64, where each sequence starts
prefix.npy      (N) int32, the length of each instruction
tokenizer/      the tokenizer that made the ids
manifest.json   counts, sources, and the size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from tqdm import tqdm

from hrmcore.data.files import expand
from hrmcore.data.records import Corpus, KeyCounts, Record, Rejected, read_records, tokenize
from hrmcore.durable import sha256_of
from hrmcore.limits import read_bounded
from hrmcore.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Store:
    """An open store; the arrays of `corpus` are views of its files."""

    folder: Path
    manifest: dict[str, Any]
    corpus: Corpus


def open_store(folder: str | Path) -> Store:
    """Map a store's files. Sizes are checked here, contents by `verify`.

    Raises FileNotFoundError when the folder is no store, ValueError naming the file that is not what was written.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path}: {found}, was written with {entry['bytes']}; prepare the store again")
    tokens, offsets, prefix = (_map(folder / f"{name}.npy") for name in ("tokens", "offsets", "prefix"))
    corpus = Corpus(tokens, offsets, prefix)
    starts_where_it_should = len(offsets) == len(prefix) + 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
    if not (starts_where_it_should and len(prefix) and (prefix > 0).all() and (prefix <= corpus.lengths).all()):
        raise ValueError(f"{folder}: offsets.npy and prefix.npy do not fit tokens.npy; prepare the store again")
    return Store(folder, manifest, corpus)


def tokenizer_of(folder: str | Path) -> Path:
    """The folder of a tokenizer: of a store its own, else the folder itself."""
    own = Path(folder) / TOKENIZER
    return own if (Path(folder) / MANIFEST).is_file() else Path(folder)


def load_corpus(
    files: Sequence[str], tokenizer: Tokenizer, context: int, say: Callable[[str], None]
) -> tuple[Corpus, str]:
    """The records of some files, or of one store, and the checksum of their tokens.

    `say` is called with a line for each reason why records were left out, and for keys beside the usual ones. Raises
    ValueError when a store is not the only one named, was made with another tokenizer, or holds a record of more than
    `context` tokens.
    """
    if folders := [file for file in files if Path(file).is_dir()]:
        if len(files) > 1:
            raise ValueError(f"{folders[0]}: a store stands alone; `hrmcore prepare` puts many files into one")
        return _load_store(folders[0], tokenizer, context)
    rejected, keys = Rejected(), KeyCounts()

    def counted() -> Iterator[Record]:
        for file in expand(files):
            for record in read_records(file, rejected):
                keys.add(record)
                yield record

    bar = tqdm(counted(), desc="tokenising", unit="record", disable=None)
    corpus = tokenize(iter(bar), tokenizer, context, rejected)
    for line in [*rejected.report(), *keys.report()]:
        say(line)
    digest = hashlib.sha256()
    for array in (corpus.tokens, corpus.offsets, corpus.prefix):
        digest.update(array.tobytes())
    return corpus, digest.hexdigest()


def _load_store(folder: str, tokenizer: Tokenizer, context: int) -> tuple[Corpus, str]:
    store = open_store(folder)
    if store.manifest["tokenizer_sha256"] != sha256_of(tokenizer.source):
        raise ValueError(f"{folder}: was not made with {tokenizer.source}; set tokenizer to {folder}/tokenizer")
    if (longest := int(store.corpus.lengths.max())) > context:
        raise ValueError(
            f"{folder}: a record has {longest} tokens, the model's max_position_embeddings is {context}; "
            f"prepare with --context {context}"
        )
    files = store.manifest["files"]
    sums = "".join(files[f"{name}.npy"]["sha256"] for name in ("tokens", "offsets", "prefix"))
    return store.corpus, hashlib.sha256(sums.encode()).hexdigest()


def verify(folder: str | Path) -> None:
    """Read every file of a store and compare checksums. Raises ValueError naming the first that has changed."""
    store = open_store(folder)
    for name, entry in store.manifest["files"].items():
        if sha256_of(store.folder / name) != entry["sha256"]:
            raise ValueError(f"{store.folder / name}: its contents have changed; prepare the store again")


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


class TokenWriter:
    """Writes tokens.npy as the tokens come; the header, which tells their number, is written last."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._path = folder / "tokens.npy"
        self._type = token_type(vocab_size)
        self._header = len(self._header_of(0))
        self._file = self._path.open("w+b")
        self._file.write(bytes(self._header))

    def _header_of(self, count: int) -> bytes:
        header = io.BytesIO()
        described = {"descr": self._type.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()

    def append(self, tokens: np.ndarray) -> None:
        """Add ids, which must lie in the vocabulary, at the end."""
        self._file.write(tokens.astype(self._type).tobytes())

    def keep(self, offsets: np.ndarray, kept: np.ndarray) -> None:
        """Close the gaps that all sequences but the `kept` ones, N booleans, would leave. `offsets` (N+1) int64."""
        self._file.flush()
        tokens = np.memmap(self._path, self._type, "r+", offset=self._header, shape=(int(offsets[-1]),))
        edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
        end = 0
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            start, stop = int(offsets[first]), int(offsets[last])
            tokens[end : end + stop - start] = tokens[start:stop]
            end += stop - start
        tokens.flush()
        del tokens
        self._file.truncate(self._header + end * self._type.itemsize)

    def repeat(self, offsets: np.ndarray, chosen: np.ndarray) -> None:
        """Add the `chosen` sequences, N booleans, once more. `offsets` (N+1) int64 are those of the first N."""
        self._file.flush()
        tokens = np.memmap(self._path, self._type, "r", offset=self._header, shape=(int(offsets[-1]),))
        self._file.seek(0, os.SEEK_END)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            self._file.write(tokens[int(offsets[first]) : int(offsets[last])].tobytes())

    def close(self) -> None:
        """Write the header. The file is complete after this, and not before."""
        count = (self._file.seek(0, os.SEEK_END) - self._header) // self._type.itemsize
        header = self._header_of(count)
        if len(header) != self._header:
            raise ValueError(f"{self._path}: {count} tokens do not fit its header")
        self._file.seek(0)
        self._file.write(header)
        self._file.close()


def write_index(folder: Path, lengths: np.ndarray, prefix: np.ndarray) -> None:
    """Write offsets.npy and prefix.npy. `lengths` (N): all tokens of each sequence, eoa included."""
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"))
    np.save(folder / "prefix.npy", prefix.astype("<i4"))


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write manifest.json: `values`, and the size and checksum of every file that lies in the folder now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": FORMAT, **values, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a store (no {MANIFEST}); `hrmcore prepare` writes one")
    try:
        manifest = json.loads(read_bounded(path))
        known = manifest["format"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a store's manifest; prepare the store again") from None
    if known != FORMAT:
        raise ValueError(f"{path}: format {known}, this version reads {FORMAT}; prepare the store again")
    if missing := {"tokens.npy", "offsets.npy", "prefix.npy"} - set(entries):
        raise ValueError(f"{path}: does not list {min(missing)}; prepare the store again")
    return manifest


def _map(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TokenError) as error:  # of a header, which is Python
        raise ValueError(f"{path}: not an array that a store holds ({' '.join(str(error).split())})") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: not an array that a store holds ({array.dtype}, {array.ndim} dimensions)")
    return np.asarray(array)  # a plain view: slices of a memmap object are slow
