"""models/files.py: whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

import models.files
from models.files import atomic_folder, atomic_write_text


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("whole")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("second rename")
        real(source, target)

    monkeypatch.setattr(models.files.os, "rename", rename)
    with pytest.raises(OSError, match="second rename"), atomic_folder(tmp_path / "folder") as new:
        (new / "new").write_text("x")
    assert snapshot(tmp_path) == {"folder/old": b"whole"}


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "results.json"
    atomic_write_text(path, "first \u00e9")
    assert path.read_text(encoding="utf-8") == "first \u00e9"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(models.files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full: .*results.json"):
        atomic_write_text(path, "second")
    assert snapshot(tmp_path) == {"deep/results.json": "first \u00e9".encode()}
