"""Preference rows: what a row is, and reading, checking and writing files of them.

No tensors here. A row is one request with its right (chosen) and wrong (rejected) answers; its pairs are all (chosen i,
rejected j). Rows come from files (`read_rows`) or from the generator (dpo/checkable), and are kept on disk: memory does
not grow with their texts. Read next: dpo/split.py.
"""

import hashlib
import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo.formats import (
    FORMATS,
    Answer,
    Message,
    check_columns,
    message_of,
    messages_of,
    need,
    plain,
    recognise,
    text_of,
)
from dpo.lines import Lines
from dpo.shards import Record, read_records
from models.errors import UserError, show
from models.files import atomic_write_text

SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "subset", "prompt", "chosen", "rejected", "group", "split", "reference_answer")


class PairValues(NamedTuple):
    """What a row may say of one of its pairs."""

    weight: float = 1.0  # how much the pair counts in the loss's mean
    margin: float = 0.0  # by how much the chosen answer's reward is to lead, reward units (beta * nats)
    soft_label: float = 1.0  # probability that the chosen answer is the better one

    def weighed(self, share: float) -> "PairValues":
        """The same of a pair that counts for so much of its row."""
        return self._replace(weight=share * self.weight)


ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("above 0 and below 1e9 (to leave a pair out, leave its answer out)", lambda value: 0 < value < 1e9),
    "margin": ("between -1e9 and 1e9", lambda value: abs(value) < 1e9),
    "soft_label": ("from 0.5 to 1 (below 0.5, exchange the answers)", lambda value: 0.5 <= value <= 1),
}


@dataclass(frozen=True)
class Row:
    """One request with its right and wrong answers. `where` (file:line) serves messages only and is not compared.

    `pair_values` holds one entry a pair in the order of pairs_of(row, 0), or nothing where the row says nothing.
    `thinking` pairs an answer with what was thought before it: trained with the answer, never shown to a judge.
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
    thinking: tuple[tuple[str, str], ...] = ()
    reference_answer: str = ""  # what a judge may be shown as right; "" = the row has none


Rows = Lines[Row]


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


def row_digest(row: Row) -> str:
    """Of what a judge reads of the row, and of its id."""
    read = json.dumps([row.id, row.prompt, row.chosen, row.rejected, row.reference_answer])
    return hashlib.sha256(read.encode()).hexdigest()[:16]


def rows_digest(rows: Iterable[Row]) -> str:
    """Of all of them, in this order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_digest(row).encode())
    return digest.hexdigest()


def iterate_rows(path: Path, format: str, dropped: Counter[str], formats: set[str] | None = None) -> Iterator[Row]:
    """The rows of a file or a folder of files (dpo/shards.py), one by one, in order; other keys are ignored.

    `format`: a name in dpo/formats.py, or "auto": the one of each file's first row; `formats` takes those met. What a
    format marks as no preference is left out and counted in `dropped` by reason. A UserError names file and line of the
    first bad row.
    """
    ids: set[str] = set()
    formats = set() if formats is None else formats
    try:
        for records in read_records(path):
            first: tuple[str, str] | None = None
            for where, raw in records:
                record = _record(raw, where)
                check_columns(record, where)
                if format == "auto":
                    first = _format_of(record, where, first)
                name = first[0] if first else format
                formats.add(name)
                ours = FORMATS[name].convert(record, name, where, dropped)
                if ours is None:
                    continue
                row = _row(ours, where)
                if row.id in ids:
                    first_place = next(one.where for one in iterate_rows(path, format, Counter()) if one.id == row.id)
                    raise UserError(f"{where}: id {show(row.id)} is also the id at {first_place}; ids must be unique")
                ids.add(row.id)
                yield row
    except FileNotFoundError as error:
        raise UserError(f"data.path={path}: there is no such file; looked for {path.absolute()}") from error
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror or error})") from error
    if not ids:
        left = f", but for {dropped.total()} dropped ones" if dropped else ""
        raise UserError(f"data.path={path}: there are no rows{left}")


def read_rows(
    path: Path,
    format: str = "auto",
    dropped: Counter[str] | None = None,
    folder: Path | None = None,
    formats: set[str] | None = None,
) -> Rows:
    """All rows of `iterate_rows`, kept in `folder` (keep_rows).

    Of ours, `chosen` and `rejected` may be one answer or a list, an answer a text or a message with its thinking,
    `prompt` a text or a list of messages, `group` (default: the normalised prompt), `split`, `reference_answer`,
    `weight`, `margin` and `soft_label` absent or null; the last three are a number for all pairs or a list of one each,
    chosen-major.
    """
    return keep_rows(iterate_rows(path, format, Counter() if dropped is None else dropped, formats), folder)


def keep_rows(rows: Iterable[Row], folder: Path | None = None) -> Rows:
    """The rows in a file without a name in `folder` (default: the system's place): it ends with the process."""
    ends = array("q", [0])
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the rows are)
    for row in rows:
        ends.append(ends[-1] + file.write(json.dumps(list(vars(row).values())).encode()))
    file.flush()
    return Lines(file, np.stack([ends[:-1], ends[1:]], 1), _kept)


def _kept(line: bytes) -> Row:
    identity, subset, prompt, chosen, rejected, group, split, where, values, thinking, reference = json.loads(line)
    texts = tuple(prompt), tuple(chosen), tuple(rejected)
    said = tuple(PairValues(*one) for one in values), tuple(map(tuple, thinking))
    return Row(identity, subset, *texts, group, split, where, *said, reference)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes JSONL that `read_rows` reads back equal; the file appears whole or not at all."""
    lines = []
    for row in rows:
        record = {key: value for key, value in vars(row).items() if key in COLUMNS and value}
        for key in ("chosen", "rejected"):
            record[key] = [_thought(answer, dict(row.thinking)) for answer in record[key]]
        if row.pair_values:
            record |= dict(zip(PairValues._fields, zip(*row.pair_values, strict=True), strict=True))
        if len(row.prompt) == 1:
            record["prompt"] = row.prompt[0]["content"]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    atomic_write_text(path, "".join(lines))


def _format_of(record: Record, where: str, first: tuple[str, str] | None) -> tuple[str, str]:
    """Format and place of the file's first row, which all its rows must be like."""
    found = recognise(record)
    if first is None and found is None:
        known = "; ".join(f"{name}: {format.shape}" for name, format in FORMATS.items())
        raise UserError(f"{where}: the keys {show(sorted(record))} are of no known format. Known are {known}")
    if first is not None and found not in (first[0], None):
        raise UserError(
            f"{where}: looks like the format {found}, but {first[1]} like {first[0]}; a file holds one format: split "
            f"it, or set data.format={first[0]} to read all of it so"
        )
    return first or (str(found), where)


def _record(raw: object, where: str) -> Record:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row is a JSON object, not {show(raw)}")
    return raw


def _row(raw: Record, where: str) -> Row:
    for key in ("id", "subset", "prompt", "chosen", "rejected"):
        need(raw, key, "ours", where)
    thinking: dict[str, str] = {}
    chosen, rejected = (_answers(raw[key], key, where, thinking) for key in ("chosen", "rejected"))
    wrong = {plain(answer) for answer in rejected}
    for answer in chosen:
        if plain(answer) in wrong:
            raise UserError(f"{where}: the same answer is chosen and rejected: {show(answer)}; remove one of the two")
    split = raw.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: split is {show(split)}; allowed are {', '.join(SPLITS)}, or no split at all")
    prompt = _prompt(raw["prompt"], where)
    if raw.get("group") is None:  # hashed, because every verdict's line repeats the group and a request can be long
        group = "prompt:" + hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:16]
    else:
        group = text_of(raw["group"], "group", where)
    identity, subset = (text_of(raw[key], key, where) for key in ("id", "subset"))
    values = _pair_values(raw, len(chosen) * len(rejected), where)
    thoughts = tuple((answer, thought) for answer, thought in thinking.items() if thought)
    reference = raw.get("reference_answer")
    reference = "" if reference is None else text_of(reference, "reference_answer", where)
    return Row(identity, subset, prompt, chosen, rejected, group, split, where, values, thoughts, reference)


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


def _answers(value: object, key: str, where: str, thinking: dict[str, str]) -> tuple[str, ...]:
    """The answers' texts; `thinking` is told of each text what was thought before it, "" for nothing."""
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list):
        raise UserError(f"{where}: {key} must be a text or a list of texts, not {show(value)}")
    if not answers:
        raise UserError(f"{where}: {key} is an empty list; a row needs at least one chosen and one rejected answer")
    texts = []
    for index, answer in enumerate(answers):
        place = f"{key}[{index}]"
        message = message_of(answer, place, where) if isinstance(answer, dict) else {"content": answer}
        if message.get("role", "assistant") != "assistant":
            raise UserError(f"{where}: {place} is a message from {message['role']!r}; an answer is from 'assistant'")
        text, thought = text_of(message["content"], place, where), message.get("thinking", "")
        if thinking.setdefault(text, thought) != thought:
            raise UserError(f"{where}: {place} repeats an answer with other thinking: {show(text)}; remove one of them")
        texts.append(text)
    return tuple(texts)


def _thought(answer: str, thinking: Mapping[str, str]) -> Answer:
    return {"role": "assistant", "content": answer, "thinking": thinking[answer]} if answer in thinking else answer


def _prompt(value: object, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "user", "content": text_of(value, "prompt", where)},)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: prompt must be a text or a list of messages, not {show(value)}")
    messages = messages_of(value, "prompt", where)
    if messages[-1]["role"] != "user":
        last = messages[-1]["role"]
        raise UserError(f"{where}: the last message of prompt is from {last!r}, but must be from 'user'")
    text_of(messages[-1]["content"], f"prompt[{len(messages) - 1}].content", where)
    return tuple(messages)
