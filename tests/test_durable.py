"""Files and folders get their names only once they are whole, and keep the old contents until then."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hrmcore.durable import new_folder, replacing, sha256_of


def test_files_replace_the_old_ones_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("old")
    with replacing(*paths) as temporary:
        for path, text in zip(temporary, ("new a", "new b"), strict=True):
            path.write_text(text)
        assert paths[0].read_text() == "old"
        assert not paths[1].exists()
    assert [path.read_text() for path in paths] == ["new a", "new b"]
    assert sorted(tmp_path.iterdir()) == paths


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with replacing(path, temporary=".{name}.half") as [temporary]:
            assert temporary.name == ".a.half"
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def watch_sync(descriptor: int) -> None:
        calls.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_replace)
    with replacing(tmp_path / "file", temporary="temporary") as [temporary]:
        temporary.write_text("whole")
    assert calls == ["sync temporary", "name file", f"sync {tmp_path.name}"]
    calls.clear()
    with new_folder(tmp_path / "folder") as unnamed:
        (unnamed / "inside").write_text("whole")
    assert calls == ["sync inside", "sync folder.partial", "name folder", f"sync {tmp_path.name}"]


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "folder") as unnamed:
            (unnamed / "inside").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.partial").mkdir()
    with pytest.raises(FileExistsError, match="is being written by another process, or was left by one"):
        new_folder(tmp_path / "folder").__enter__()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("old")
    with pytest.raises(FileExistsError, match="folder: exists already; remove it or name another folder"):
        new_folder(tmp_path / "folder").__enter__()
    assert (tmp_path / "folder" / "inside").read_text() == "old"


def test_checksums_begin_where_they_are_asked_to(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "file", start=1000) == hashlib.sha256(content[1000:]).hexdigest()
