"""Row files as streams of raw records: .jsonl, .json (an array), .parquet, .csv, plain or .gz or .zst, or a folder.

Strict: what JSON does not define (NaN, a key twice) and what is no UTF-8 is refused. Nothing is known of rows here.
Read next: dpo/formats.py, what a record means.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from models.errors import UserError, show

Record = dict[str, object]
Records = Iterator[tuple[str, object]]  # ("file:line", what stands there); parquet counts rows
CODECS = {".gz": "gzip", ".zst": "zstd"}
CSV_NUMBERS = {"weight", "margin", "soft_label"}  # the other cells are texts
CSV_NUMBERS |= {"score_chosen", "score_rejected", "chosen-rating", "rejected-rating"}
# begins the name of a split's files
SPLIT = re.compile(r"(train|valid|val|dev|test|eval)(?:idation|uation|ing)?(?![a-z])")
SPACE = re.compile(r"[ \t\r\n]*")  # JSON's: other spaces between values are faults


def read_records(path: Path) -> Iterator[Records]:
    """The records of the file at `path`, or of each row file below the folder, in the order of their names.

    In a folder, files of other kinds and hidden ones are no rows; .jsonl beside .parquet is an error (the same twice?),
    and so are files of several splits: they would be mixed, and its test trained on.
    """
    if not path.is_dir():
        if _kind(path) not in READERS:
            raise UserError(f"data.path={path}: {ALLOWED}")
        yield _whole(path, path.name)
        return
    found = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file() and _kind(file) in READERS]
    shards = sorted((name.as_posix(), file) for name, file in found if not any(p.startswith(".") for p in name.parts))
    kinds = sorted({_kind(file) for _, file in shards})
    if not shards:
        raise UserError(f"data.path={path}: the folder holds no row file; {ALLOWED}")
    if len(kinds) > 1:
        raise UserError(f"data.path={path}: the folder holds {' and '.join(kinds)} files; name a folder of one kind")
    splits = sorted({match[1] for name, _ in shards for part in Path(name).parts if (match := SPLIT.match(part))})
    if len(splits) > 1:
        raise UserError(
            f"data.path={path}: the folder holds files of the splits {' and '.join(splits)}, which would be mixed; "
            "name one of them, or write all rows to one file, each with its `split`"
        )
    for name, file in shards:
        yield _whole(file, name)


def _whole(path: Path, name: str) -> Records:
    """The file's records. UserError behind the last of them where what follows is damaged or cut off."""
    where = ""
    try:
        for where, raw in READERS[_kind(path)](path, name):
            yield where, raw
    except OSError as error:
        if error.errno:  # the disk's fault, not the file's
            raise
        place = f"{where}: behind this row the file" if where else f"data.path={path}:"
        why = " ".join(str(error).split())
        raise UserError(f"{place} cannot be read ({why}); it is damaged or cut off: write or fetch it again") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in CODECS else path.suffix


def _open(path: Path) -> BinaryIO:
    if path.suffix not in CODECS:
        return path.open("rb")
    import pyarrow  # here: reading JSONL should not wait for it

    return io.BufferedReader(pyarrow.input_stream(path, compression=CODECS[path.suffix]))


def _not_utf8(where: str, error: UnicodeDecodeError, of: str) -> UserError:
    return UserError(f"{where}: not UTF-8 (byte {error.start + 1} of the {of}); save the file as UTF-8")


def _lines(path: Path, name: str) -> Iterator[tuple[str, str]]:
    with _open(path) as file:  # bytes: only "\n" ends a line, and a line that is not UTF-8 can be named
        for line, data in enumerate(file, start=1):
            where = f"{name}:{line}"
            try:
                yield where, data.decode("utf-8-sig" if line == 1 else "utf-8")  # some editors begin with a BOM
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error, "line") from error


def _unique(pairs: list[tuple[str, object]]) -> Record:
    found: Record = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {show(key)} stands twice in an object")
        found[key] = value
    return found


def _no_number(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def _read_jsonl(path: Path, name: str) -> Records:
    for where, text in _lines(path, name):
        try:
            if text.strip(" \t\r\n"):
                yield where, DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            fault = f"not a JSON object ({error}); a line holds one whole row"
            raise UserError(f"{where}: {fault}: {show(text)}") from error


def _read_json(path: Path, name: str) -> Records:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{name}:{line}", error, "file") from error

    def fault(at: int, expected: str) -> UserError:
        where, found = f"{name}:{text.count(chr(10), 0, at) + 1}", show(text[at : at + 20])
        return UserError(f"{where}: not a JSON array of rows: {expected} must stand here, not {found}")

    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        raise fault(start, "'[' (a file with one row a line is a .jsonl file)")
    line, counted, at = 1, 0, _after_space(text, start + 1)
    place = 0  # of a row among those that begin on its line: all may
    more = text[at : at + 1] != "]"
    while more:
        passed = text.count("\n", counted, at)
        line, counted, place = line + passed, at, 1 if passed else place + 1
        where = f"{name}:{line}"
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({error}): {show(text[at : at + 80])}") from error
        yield where if place == 1 else f"{where}:{place}", value
        at = _after_space(text, end)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            raise fault(at, "',' or ']'")
        at = _after_space(text, at + 1) if more else at
    end = _after_space(text, at + 1)
    if end < len(text):
        raise fault(end, "nothing more")


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found, "the pattern matches nothing at all, too"
    return found.end()


def _read_csv(path: Path, name: str) -> Records:
    csv.field_size_limit(2**31 - 1)  # of the whole process: the module has no other way
    last, line = "", 1
    header: list[str] = []

    def texts() -> Iterator[str]:
        nonlocal last
        for _, last in _lines(path, name):
            yield last

    reader = csv.reader(texts(), strict=True)
    try:
        for cells in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if last.removesuffix("\n").removesuffix("\r").endswith("\r"):  # the module would swallow it
                raise UserError(f"{where}: not CSV (a carriage return before the line's end); quote its cell")
            if not cells:
                continue
            if not header:
                header = cells
                if twice := [key for key in cells if cells.count(key) > 1]:
                    raise UserError(f"{where}: the column {show(twice[0])} stands twice in the header")
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells for the {len(header)} columns of the header")
            yield where, {key: _cell(key, cell, where) for key, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        raise UserError(f"{name}:{line}: not CSV ({error}); quote a cell that holds a quote or a line's end") from error


def _cell(key: str, cell: str, where: str) -> object:
    try:
        return DECODER.decode(cell) if key in CSV_NUMBERS else cell
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {key} must be a number, not {show(cell)}") from error


def _read_parquet(path: Path, name: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        source = path if path.suffix not in CODECS else pyarrow.BufferReader(_open(path).read())
        with pyarrow.parquet.ParquetFile(source, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            if len(set(columns)) < len(columns):
                raise UserError(f"{name}: a column's name stands twice: {show(columns)}")
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", _without_nulls(record)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(f"not a readable parquet file: {error}") from error


def _without_nulls(value: object) -> object:
    """A parquet file has a place for every key in every object, null where the row's writer gave none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
ENDINGS = tuple(container + codec for container in READERS for codec in ("", *CODECS))
ALLOWED = f"a row file ends in {', '.join(READERS)}, or one of these and {' or '.join(CODECS)}"
