"""The store's files: numpy reads them, and a store that is not what was written is refused by name."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrmcore.data.store import TokenWriter, open_store, token_type, verify, write_index, write_manifest
from hrmcore.durable import new_folder

SEQUENCES = [[2, 5, 9, 3, 7, 4], [2, 5, 3, 4], [2, 5, 8, 8, 3, 9, 9, 4]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "store"
    with new_folder(out) as temporary:
        writer = TokenWriter(temporary, vocab_size=1000)
        for sequence in SEQUENCES:
            writer.append(np.asarray(sequence))
        writer.close()
        write_index(temporary, np.asarray([len(s) for s in SEQUENCES]), np.asarray([4, 3, 5]))
        (temporary / "tokenizer").mkdir()
        (temporary / "tokenizer" / "tokenizer.model").write_bytes(b"any")
        write_manifest(temporary, {"records": 3})
    return out


def test_numpy_reads_the_files(folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy")
    assert (tokens.dtype, tokens.tolist()) == (np.uint16, list(chain(*SEQUENCES)))
    assert np.load(folder / "offsets.npy").tolist() == [0, 6, 10, 18]
    assert np.load(folder / "prefix.npy").tolist() == [4, 3, 5]


def test_an_open_store_is_mapped_and_read_only(folder: Path) -> None:
    store = open_store(folder)
    assert store.manifest["records"] == len(store.corpus) == 3
    assert store.corpus.tokens.tolist() == list(chain(*SEQUENCES))
    assert isinstance(store.corpus.tokens.base, np.memmap)
    assert not store.corpus.tokens.flags.writeable
    verify(folder)


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_tokens_take_the_smallest_type(vocab_size: int, name: str, tmp_path: Path) -> None:
    assert token_type(vocab_size).name == name
    writer = TokenWriter(tmp_path, vocab_size)
    writer.append(np.asarray([0, vocab_size - 1]))
    writer.close()
    assert np.load(tmp_path / "tokens.npy").tolist() == [0, vocab_size - 1]


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=40))
def test_what_is_not_kept_leaves_no_gap(
    records: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    lengths, kept = [length for length, _ in records], np.asarray([keep for _, keep in records])
    sequences = [np.full(length, number) for number, length in enumerate(lengths)]
    writer = TokenWriter(folder, vocab_size=300)
    writer.append(np.concatenate(sequences))
    writer.keep(np.concatenate([[0], np.cumsum(lengths)]), kept)
    writer.close()
    expected = [int(token) for sequence, keep in zip(sequences, kept, strict=True) if keep for token in sequence]
    assert np.load(folder / "tokens.npy").tolist() == expected


FILES = ["tokens.npy", "offsets.npy", "prefix.npy", "tokenizer/tokenizer.model"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_is_named(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf"{folder / name}: has {len(whole) - 1} bytes, was written with {len(whole)}"
    ):
        open_store(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder / name}: is missing"):
        open_store(folder)


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_file_that_has_changed(name: str, folder: Path) -> None:
    whole = bytearray((folder / name).read_bytes())
    whole[-2] ^= 1
    (folder / name).write_bytes(whole)
    with pytest.raises(ValueError, match=str(folder)):
        verify(folder)
    if name.startswith("token"):  # what only a checksum sees
        open_store(folder)
        with pytest.raises(ValueError, match=f"{folder / name}: its contents have changed"):
            verify(folder)


@pytest.mark.parametrize(
    ("offsets", "prefix"),
    [
        ([0, 6, 10, 17], [4, 3, 5]),
        ([1, 6, 10, 18], [4, 3, 5]),
        ([0, 6, 5, 18], [4, 3, 5]),
        ([0, 6, 10, 18], [4, 4, 5]),
        ([0, 6, 10, 18], [4, 0, 5]),
    ],
)
def test_an_index_that_does_not_fit_is_refused(offsets: list[int], prefix: list[int], folder: Path) -> None:
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    np.save(folder / "prefix.npy", np.asarray(prefix, dtype=np.int32))
    with pytest.raises(ValueError, match=r"offsets\.npy and prefix\.npy do not fit tokens\.npy"):
        open_store(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a store's manifest"),
        ("[]", "not a store's manifest"),
        ('{"format": 1}', "not a store's manifest"),
        ('{"format": 1, "files": {"tokens.npy": 3}}', "not a store's manifest"),
        ('{"format": 1, "files": {}}', "does not list offsets.npy"),
        ('{"format": 2, "files": {}}', "format 2, this version reads 1"),
    ],
)
def test_a_broken_manifest_is_named(text: str, message: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{folder}/manifest\.json: {message}"):
        open_store(folder)


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: not a store"):
        open_store(tmp_path)


def test_an_array_of_objects_is_never_unpickled(folder: Path) -> None:
    path = folder / "tokens.npy"
    np.save(path, np.asarray([{}], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tokens.npy"]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tokens\.npy: not an array that a store holds"):
        open_store(folder)
