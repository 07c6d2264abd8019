"""Preference rows: what a row is, and reading, checking and writing files of them.

No tensors here. A row is one request with its right (chosen) and wrong (rejected) answers; its pairs are all (chosen i,
rejected j). Rows come from files (`read_rows`) or from the generator (dpo/checkable). Read next: dpo/split.py.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from models.errors import UserError
from models.files import atomic_write_text

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "subset", "prompt", "chosen", "rejected", "group", "split")


class PairValues(NamedTuple):
    """What a row may say of one of its pairs."""

    weight: float = 1.0  # how much the pair counts in the loss's mean
    margin: float = 0.0  # by how much the chosen answer's reward is to lead, reward units (beta * nats)
    soft_label: float = 1.0  # probability that the chosen answer is the better one


ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("above 0 and below 1e9 (to leave a pair out, leave its answer out)", lambda value: 0 < value < 1e9),
    "margin": ("between -1e9 and 1e9", lambda value: abs(value) < 1e9),
    "soft_label": ("from 0.5 to 1 (below 0.5, exchange the answers)", lambda value: 0.5 <= value <= 1),
}


@dataclass(frozen=True)
class Row:
    """One request with its right and wrong answers. `where` (file:line) serves messages only and is not compared.

    `pair_values` holds one entry a pair in the order of pairs_of(row, 0), or nothing where the row says nothing.
    """

    id: str
    subset: str
    prompt: tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    group: str
    split: str | None = None
    where: str = field(default="", compare=False)
    pair_values: tuple[PairValues, ...] = ()


def normalise(text: str) -> str:
    """Lower case, runs of anything but (Unicode) letters and digits to one space: the "same text" of a leak."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def prompt_key(prompt: Iterable[Message]) -> str:
    """The normalised text of all messages of a prompt."""
    return normalise("\n".join(message["content"] for message in prompt))


def pairs_of(row: Row, pairs_per_row: int) -> list[tuple[int, int]]:
    """The first `pairs_per_row` (0 = all) pairs (index into chosen, index into rejected), chosen-major."""
    pairs = [(i, j) for i in range(len(row.chosen)) for j in range(len(row.rejected))]
    return pairs[:pairs_per_row] if pairs_per_row else pairs


def values_of(row: Row, i: int, j: int) -> PairValues:
    """What the row says of the pair (chosen i, rejected j)."""
    return row.pair_values[i * len(row.rejected) + j] if row.pair_values else PairValues()


def columns_of(rows: Iterable[Row]) -> set[str]:
    """Which of PairValues' columns say something somewhere in the rows."""
    return {
        key
        for row in rows
        for values in row.pair_values
        for key, value in values._asdict().items()
        if value != PairValues._field_defaults[key]
    }


# Files: a reader yields (where, raw row); _row checks one of them.


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl or a .parquet file (RewardBench 2's columns); keys beyond Row's are ignored.

    `chosen` and `rejected` may be one text or a list of texts, `prompt` a text or a list of messages, `group` (default:
    the normalised prompt), `split`, `weight`, `margin` and `soft_label` absent or null; the last three are a number for
    all pairs or a list of one each, chosen-major. A UserError names file and line of the first row that is not so.
    """
    if path.is_dir():
        raise UserError(f"data.path={path}: is a folder; name a file in it that ends in {' or '.join(READERS)}")
    if path.suffix not in READERS:
        raise UserError(f"data.path={path}: a row file ends in {' or '.join(READERS)}")
    rows: dict[str, Row] = {}
    try:
        for where, raw in READERS[path.suffix](path):
            row = _row(raw, where)
            if row.id in rows:
                first = rows[row.id].where
                raise UserError(f"{where}: id {show(row.id)} is also the id at {first}; ids must be unique")
            rows[row.id] = row
    except FileNotFoundError as error:
        raise UserError(f"data.path={path}: there is no such file") from error
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror or error})") from error
    if not rows:
        raise UserError(f"data.path={path}: the file has no rows")
    return list(rows.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes JSONL that `read_rows` reads back equal; the file appears whole or not at all."""
    lines = []
    for row in rows:
        record = {key: value for key, value in vars(row).items() if key in COLUMNS and value is not None}
        if row.pair_values:
            record |= dict(zip(PairValues._fields, zip(*row.pair_values, strict=True), strict=True))
        if len(row.prompt) == 1:
            record["prompt"] = row.prompt[0]["content"]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    atomic_write_text(path, "".join(lines))


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:  # bytes: only "\n" ends a line, and a line that is not UTF-8 can be named
        for line, data in enumerate(file, start=1):
            where = f"{path.name}:{line}"
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8")  # some editors begin a file with a BOM
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                place = f"byte {error.start + 1} of the line"
                raise UserError(f"{where}: not UTF-8 ({place}); save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                fault = f"not a JSON object ({error}); a line holds one whole row"
                raise UserError(f"{where}: {fault}: {show(text)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow  # here: reading JSONL should not wait for it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in (*COLUMNS, *PairValues._fields)]
            records: list[object] = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"data.path={path}: not a readable parquet file ({error})") from error
    yield from ((f"{path.name}:{number}", record) for number, record in enumerate(records, start=1))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _row(raw: object, where: str) -> Row:
    needs = "id, subset, prompt, chosen and rejected"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row is a JSON object with {needs}, not {show(raw)}")
    for key in ("id", "subset", "prompt", "chosen", "rejected"):
        if raw.get(key) is None:
            raise UserError(f"{where}: key {key!r} is missing or null; a row needs {needs}")
    chosen, rejected = (_answers(raw[key], key, where) for key in ("chosen", "rejected"))
    wrong = {" ".join(answer.split()) for answer in rejected}
    for answer in chosen:
        if " ".join(answer.split()) in wrong:
            raise UserError(f"{where}: the same answer is chosen and rejected: {show(answer)}; remove one of the two")
    split = raw.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: split is {show(split)}; allowed are {', '.join(SPLITS)}, or no split at all")
    prompt = _prompt(raw["prompt"], where)
    if raw.get("group") is None:  # hashed, because every verdict's line repeats the group and a request can be long
        group = "prompt:" + hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:16]
    else:
        group = _text(raw["group"], "group", where)
    identity, subset = (_text(raw[key], key, where) for key in ("id", "subset"))
    values = _pair_values(raw, len(chosen) * len(rejected), where)
    return Row(identity, subset, prompt, chosen, rejected, group, split, where, values)


def _pair_values(raw: Mapping[str, object], pairs: int, where: str) -> tuple[PairValues, ...]:
    columns: dict[str, list[float]] = {}
    for key in PairValues._fields:
        value = raw.get(key)
        if value is not None:
            values = value if isinstance(value, list) else [value] * pairs
            columns[key] = [_number(number, key, where) for number in values]
            if len(values) != pairs:
                raise UserError(
                    f"{where}: {key} has {len(values)} numbers for {pairs} pairs; give one a pair or one for all"
                )
    each = (PairValues(**{key: column[pair] for key, column in columns.items()}) for pair in range(pairs))
    return tuple(each) if columns else ()


def _number(value: object, name: str, where: str) -> float:
    allowed, sound = ALLOWED[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not sound(value):
        raise UserError(f"{where}: {name} is {show(value)}; it must be a number {allowed}")
    return float(value)


def _answers(value: object, key: str, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise UserError(f"{where}: {key} must be a text or a list of texts, not {show(value)}")
    if not texts:
        raise UserError(f"{where}: {key} is an empty list; a row needs at least one chosen and one rejected answer")
    return tuple(_text(text, f"{key}[{index}]", where) for index, text in enumerate(texts))


def _prompt(value: object, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, "prompt", where)},)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: prompt must be a text or a list of messages, not {show(value)}")
    messages: list[Message] = []
    for index, message in enumerate(value):
        name = f"prompt[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f"{where}: {name} must have the keys role and content and no other, not {show(message)}")
        role, last = message["role"], index == len(value) - 1
        if role not in ROLES:
            raise UserError(f"{where}: {name} has the role {show(role)}; allowed are {', '.join(ROLES)}")
        if last and role != "user":
            raise UserError(f"{where}: the last message of prompt is from {role!r}, but must be from 'user'")
        content = _text(message["content"], f"{name}.content", where, may_be_empty=not last)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _text(value: object, name: str, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text, not {show(value)}")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: {name} is empty; give it a text or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, a tokenizer cannot read it
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is no text: {show(value)}") from error
    return value


def show(value: object) -> str:
    """A value as a message quotes it: at most 80 characters, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
