"""No file, however broken, ends a reader in anything but one error that says what is wrong, within seconds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz.files import make_files
from fuzz.found import FOUND, MEMORY
from fuzz.memory import Peak
from fuzz.mutations import in_protobuf, mutated
from fuzz.readers import READERS, SECONDS, describe, try_reader
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(name: str, folder: Path) -> None:
    reader = READERS[name]
    reader.read(folder)
    signed = reader.sign(reader.unpack((folder / reader.file).read_bytes()))
    assert try_reader(name, folder, signed) is None
    reader.read(folder)


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found_stays_mended(name: str, data: bytes, folder: Path) -> None:
    assert try_reader(name, folder, READERS[name].sign(data)) is None


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_one_error(name: str, folder: Path) -> None:
    reader = READERS[name]
    whole = (folder / reader.file).read_bytes()

    @seed(0)
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.randoms(use_true_random=False), st.binary(max_size=300)))
    def check(source: random.Random | bytes) -> None:
        data = reader.sign(source) if isinstance(source, bytes) else reader.broken(whole, source)
        started = time.process_time()
        fault = try_reader(name, folder, data)
        assert fault is None, f"{fault}: {describe(data)}"
        assert time.process_time() - started < SECONDS

    check()


@pytest.mark.slow
@pytest.mark.memory
def test_large_files_take_no_more_memory_than_allowed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz.run", *MEMORY]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "FUZZ_SECONDS": "0", "FUZZ_SEED": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" 0 faults, ") == len(MEMORY)


def test_the_peak_is_that_of_everything_in_the_process() -> None:
    with Peak() as peak:
        bytearray(b"x") * (64 << 20)
    assert 60 <= peak.taken >> 20 < 96  # Linux counts resident pages in batches, of each thread its own
    with Peak() as again:  # what was freed does not hide it
        bytearray(b"x") * (64 << 20)
    assert 60 <= again.taken >> 20 < 96


def test_mutations_change_a_file_and_stay_in_its_format(folder: Path) -> None:
    whole = (folder / "tokenizer.model").read_bytes()
    chance = random.Random(0)
    broken = [in_protobuf(whole, chance) for _ in range(50)]
    assert sum(data != whole for data in broken) > 40
    assert any(try_reader("sentencepiece", folder, data) is None for data in broken)
    assert len({mutated(b'{"a": 1}', random.Random(n)) for n in range(50)}) > 30
