"""No file, however broken, ends a reader in anything but one error that says what is wrong, within seconds."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from fuzz.readers import FOUND, READERS, SECONDS, describe, make_files, mutated, try_reader
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(name: str, folder: Path) -> None:
    reader = READERS[name]
    reader.read(folder)
    signed = reader.sign((folder / reader.file).read_bytes())
    assert try_reader(name, folder, signed) is None
    reader.read(folder)


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found_stays_mended(name: str, data: bytes, folder: Path) -> None:
    assert try_reader(name, folder, READERS[name].sign(data)) is None


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_one_error(name: str, folder: Path) -> None:
    whole = (folder / READERS[name].file).read_bytes()

    @seed(0)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.randoms(use_true_random=False), st.binary(max_size=300)))
    def check(source: random.Random | bytes) -> None:
        data = source if isinstance(source, bytes) else mutated(whole, source)
        started = time.process_time()
        fault = try_reader(name, folder, READERS[name].sign(data))
        assert fault is None, f"{fault}: {describe(data)}"
        assert time.process_time() - started < SECONDS

    check()
