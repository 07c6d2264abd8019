"""Small files: whole or not at all.

Whatever others read later (a checkpoint, a store's part, results.json) is written under a hidden name beside its place,
synced, then renamed: a full disk, Ctrl-C or a kill leaves what stood there as it was.
Read next: models/checkpoint.py, which writes model folders with these.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import UserError


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or (with an OSError) not at all; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # write() does not say where the disk is full
        raise
    _sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Put `text` at `path` as UTF-8, whole or (with an OSError) not at all; parents are made."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`; a normal end puts it at `path`, any exception removes it.

    A folder that stands at `path` is replaced as a whole and only by a complete one. Killed within the two renames (no
    exception), the old one lies whole beside it as `.NAME.*.old`.
    """
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _sync(written)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new folder is in place: a leftover is litter, not a failure


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON in UTF-8, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`; UserError if the file is missing, unreadable or something else."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; UserError if the file is missing, unreadable, broken or no object."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{path}: broken JSON (nested too deeply)") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold one JSON object {{...}}, holds a {type(value).__name__}")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{ending}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
