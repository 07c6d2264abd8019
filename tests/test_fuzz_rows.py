"""Mutated data lines: each is read as a second, strict reader does, or refused with file, line and reason."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from dpo.rows import Row, iterate_rows
from models.errors import UserError
from tests.foreign_rows import ONE_TEXT, WRITERS, Record, as_csv, as_json, as_jsonl, said
from tests.strict_rows import Found, Refused, strict_reading

SHAPES = [*((shape, ".jsonl") for shape in WRITERS), ("trl", ".csv"), ("hh", ".csv")]
SHAPES += [("ours", ".json"), ("rb2", ".json")]  # rows whose ids are not their lines


# The mutations: of bytes, and of what they say.

BITS = [
    b"",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\r\n",
    b" ",
    b"null",
    b"NaN",
    b"-Infinity",
]
BITS += [
    b"1e999",
    b"\xff",
    b"\xc3",
    b"\x00",
    b"\xef\xbb\xbf",
    "\u2028".encode(),
    "\x85".encode(),
    b"\\ud800",
    b"\\u0000",
]
BITS += [b'"id":"x",', b'"chosen":"x",', b"true", b"0", b"\n\nHuman:", b"\\n\\nAssistant:", b"\xf0\x9f\x98\x80", b"\t"]
VALUES: list[object] = [None, "", " ", "x", "\ud800", 0, 1, -1, 2.5, 10**400, True, False, [], {}, ["x"], [None], [[]]]
VALUES += [
    {"role": "user", "content": "x"},
    [{"role": "assistant", "content": "y"}],
    "\u2028",
    "user",
    "test",
    "\n\nHuman: x",
]
KEYS = [
    "id",
    "subset",
    "prompt",
    "chosen",
    "rejected",
    "weight",
    "margin",
    "soft_label",
    "split",
    "group",
    "role",
    "tools",
]
KEYS += [
    "content",
    "rank",
    "completion",
    "messages",
    "input",
    "context",
    "score_chosen",
    "num_correct",
    "overall_score",
]


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, size = draw.randrange(len(data) + 1), draw.choice((0, 1, 1, 2, 9))
        middle = draw.choice(
            (draw.choice(BITS), draw.choice(BITS), bytes([draw.randrange(256)]), data[at : at + size] * 2)
        )
        data = data[:at] + middle + data[at + size :]
    return data


def leaves(value: object) -> list[object]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for one in inner for leaf in leaves(one)]


def mutate_leaf(draw: random.Random, value: object, others: list[object]) -> object:
    near: list[object] = [draw.choice(others), draw.choice(VALUES)]
    if isinstance(value, str):
        near += [
            f"{value} ",
            f" {value}",
            value.replace(" ", "  "),
            f"{draw.choice(others)}\n",
            value[: len(value) // 2],
        ]
    elif isinstance(value, int | float):
        near += [True, str(value), -value, value + 1, math.nan, math.inf, [value]]
    return draw.choice(near)


def mutate_value(draw: random.Random, value: object, others: list[object]) -> object:
    """A copy with one change somewhere in it; `others` are the leaves of the whole record."""
    if not isinstance(value, dict | list) or not value:
        return mutate_leaf(draw, value, others)
    if draw.random() < 0.05:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at, items = draw.randrange(len(value)), list(value)
        change = draw.choice(("in", "in", "in", "in", "in", "cut", "twice", "swap"))
        if change == "in":
            items[at] = mutate_value(draw, items[at], others)
        elif change == "swap":
            items.reverse()
        else:
            items[at : at + 1] = [] if change == "cut" else [items[at]] * 2
        return items
    key = draw.choice(list(value))
    change = draw.choice(("in", "in", "in", "in", "in", "cut", "name", "more", "swap"))
    if change == "in":
        return value | {key: mutate_value(draw, value[key], others)}
    if change == "more":
        return value | {draw.choice(KEYS): draw.choice([*VALUES, *others])}
    if change == "swap":
        other = draw.choice(list(value))
        return value | {key: value[other], other: value[key]}
    rest = {name: inner for name, inner in value.items() if name != key}
    return rest if change == "cut" else rest | {draw.choice(KEYS): value[key]}


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """A change that leaves the brackets right: a key twice, a constant for a value, a character between two values."""
    ends = [found.end() for found in re.finditer(rb'[{,]\s*(?=")', data)]
    at = draw.choice(ends)
    key = re.compile(rb'"[^"]*":').match(data, at)
    if key and draw.random() < 0.5:
        return data[:at] + key[0] + draw.choice((b"1,", b"NaN,", b'"x",')) + data[at:]
    return data[:at] + draw.choice((b"\r\n", b"\n", b"\xc2\xa0", b'"y":Infinity,', b'"y":[-1e999],', b",")) + data[at:]


def good_line(draw: random.Random, shape: str) -> Record:
    pieces = ["\u2028", '"', "\\", "é", "日本", "[1]", "😀", "word", "an", "42", ",", "\n", "\r\n"]
    some = lambda: "x" + " ".join(draw.choices(pieces, k=draw.randint(1, 4)))  # noqa: E731
    earlier = () if shape in ONE_TEXT or draw.random() < 0.7 else (said("user", some()), said("assistant", some()))
    row = Row("r", "s", (*earlier, said("user", some())), (), (), "g")
    record = WRITERS[shape][1](row, f"right {some()}", f"wrong {some()}")
    if shape not in ("together", "implicit_text") and draw.random() < 0.3:
        record |= draw.choice(({"weight": 2}, {"margin": -0.5, "soft_label": 0.75}, {"split": "test", "group": "g"}))
    return record


def read(path: Path, format: str) -> tuple[Found, int]:
    dropped: Counter[str] = Counter()
    found: Found = []
    for row in iterate_rows(path, format, dropped):
        group = None if row.group.startswith("prompt:") else row.group
        prompt = tuple((message["role"], message["content"]) for message in row.prompt)
        values = tuple(tuple(values) for values in row.pair_values)
        found.append((row.id, row.subset, prompt, row.chosen, row.rejected, group, row.split, values))
    return found, dropped.total() - dropped["an answer that repeats a better one"]


def outcome(path: Path, format: str) -> tuple[Found, int] | str:
    """What is read, or the refusal; any other exception is the fault that is looked for."""
    try:
        return read(path, format)
    except UserError as error:
        return str(error)


def check(folder: Path, seed: int) -> bool:
    """Whether the mutated line of this seed was read; an AssertionError where it was neither read right nor refused."""
    draw = random.Random(seed)
    shape, ending = SHAPES[seed % len(SHAPES)]
    format, good = WRITERS[shape][0], good_line(draw, shape)
    write = {".jsonl": as_jsonl, ".csv": as_csv, ".json": as_json}[ending]
    path = folder / f"r{ending}"
    kind = draw.random()
    if ending != ".csv" and kind < 0.6:
        changed = mutate_value(draw, good, leaves(good))
        data = json.dumps(changed, ensure_ascii=draw.random() < 0.9).encode("utf-8", "replace")
        if ending == ".json":
            data = b"[" + data + draw.choice((b"]", b"]", b"]\r\n\n", b"] x", b",]", b"", b"]]"))
        data += draw.choice((b"", b"\n", b"\r\n", "\n\u2028\n".encode(), b"\n \t\r\n"))
    elif ending != ".csv" and kind < 0.7:
        data = mutate_json(draw, write([good]))
    else:
        data = mutate_bytes(draw, write([good]))
    path.write_bytes(data)
    try:
        expected: tuple[Found, int] | None = strict_reading(path, format)
    except Refused:
        expected = None
    result = outcome(path, format)
    if isinstance(result, str):
        assert expected is None, f"seed {seed}: {data!r} is sound, but refused: {result}"
        place = (
            rf"{re.escape(path.name)}:\d+(:\d+)?: ."
            if "there are no rows" not in result
            else f"data.path={re.escape(str(path))}: ."
        )
        assert re.match(place, result), f"seed {seed}: {data!r}: a refusal without file, line, reason: {result}"
        assert "\n" not in result and len(result) < 1000, f"seed {seed}: {result!r}"
    else:
        assert result == expected, f"seed {seed}: {data!r} is read as {result}, not as {expected}"
    if ending == ".jsonl":  # recognised by its keys, behind a good line: the same, or a refusal
        path.write_bytes(as_jsonl([good | ({"id": "other"} if "id" in good else {})]) + data)
        behind = outcome(path, "auto")
        alone = outcome(path, format)
        assert isinstance(behind, str) or behind == alone, f"seed {seed}: {data!r}: auto reads {behind}, not {alone}"
    return not isinstance(result, str)


def test_500_mutated_lines_are_read_strictly_or_refused(tmp_path: Path) -> None:
    read_whole = sum(check(tmp_path, seed) for seed in range(500))
    assert 50 < read_whole < 450, "both ways are taken"


@pytest.mark.long
def test_10000_mutated_lines_are_read_strictly_or_refused(tmp_path: Path) -> None:
    read_whole = sum(check(tmp_path, seed) for seed in range(500, 10_000))
    assert 1_000 < read_whole < 9_000, "both ways are taken"
