"""Mutated data lines: each is read as a second, strict reader (below) does, or refused with file, line and reason."""

import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from dpo.rows import Row, iterate_rows
from models.errors import UserError
from tests.foreign_rows import ONE_TEXT, WRITERS, Record, as_csv, as_jsonl, said

Found = list[tuple[object, ...]]  # what is compared of each row that is read
OURS = ("id", "subset", "group", "split", "weight", "margin", "soft_label")
SHAPES = [*((shape, ".jsonl") for shape in WRITERS), ("trl", ".csv"), ("hh", ".csv")]


# A second reader, from the documentation: it says what a file holds, or that it is to be refused.


class Refused(Exception):
    """The strict reading does not take this file."""


def require(sound: bool) -> None:
    if not sound:
        raise Refused


def text(value: object) -> str:
    require(isinstance(value, str) and any(not letter.isspace() for letter in value))
    require(not any("\ud800" <= letter <= "\udfff" for letter in str(value)))
    return str(value)


def number(value: object, low: float, high: float, open_ends: bool = True) -> float:
    require(type(value) in (int, float))
    assert isinstance(value, int | float)
    require(low < value < high if open_ends else low <= value <= high)
    return value


def chat(value: object, weights: tuple[int, ...] = ()) -> list[tuple[str, str]]:
    require(isinstance(value, list) and len(value) > 0)
    messages = []
    for message in value if isinstance(value, list) else []:
        require(isinstance(message, dict) and {"role", "content"} <= message.keys() <= {"role", "content", "weight"})
        if "weight" in message:
            require(bool(weights) and type(message["weight"]) is int and message["weight"] in weights)
        require(message["role"] in ("system", "user", "assistant") and isinstance(message["content"], str))
        require(not re.search("[\ud800-\udfff]", message["content"]))
        messages.append((message["role"], message["content"]))
    return messages


def one_answer(value: object, weights: tuple[int, ...] = ()) -> str:
    messages = chat(value, weights)
    require(len(messages) == 1 and messages[0][0] == "assistant")
    return text(messages[0][1])


def last_of_chats(chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]) -> tuple[object, str, str]:
    require(len(chosen) == len(rejected) > 1 and chosen[:-1] == rejected[:-1])
    require(chosen[-1][0] == rejected[-1][0] == "assistant")
    return chosen[:-1], text(chosen[-1][1]), text(rejected[-1][1])


def trl_pair(raw: Record) -> tuple[object, str, str]:
    require(not any(raw.get(key) for key in ("tools", "images", "image", "chat_template_kwargs")))
    prompt, chosen, rejected = raw.get("prompt"), raw.get("chosen"), raw.get("rejected")
    if isinstance(prompt, list):
        return chat(prompt), one_answer(chosen), one_answer(rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        shared, *answers = last_of_chats(chat(chosen), chat(rejected))
        assert isinstance(shared, list)
        require(prompt is None or prompt == shared[-1][1])
        return shared, answers[0], answers[1]
    if prompt is not None:
        return text(prompt), text(chosen), text(rejected)
    text(chosen), text(rejected)
    same = len(os.path.commonprefix([chosen, rejected]))
    ends = [at for at in range(same) if chosen[at].isspace()]
    require(len(ends) > 0)
    end = ends[-1] if chosen[ends[-1]] == " " else ends[-1] + 1
    return text(chosen[:end]), text(chosen[end:]), text(rejected[end:])


def hh_chat(value: object) -> list[tuple[str, str]]:
    rest, messages = text(value), []
    require(rest.startswith("\n\nHuman:"))
    while rest:
        name, _, rest = rest[2:].partition(":")
        require(name in ("Human", "Assistant"))
        ends = [at for at in (rest.find("\n\nHuman:"), rest.find("\n\nAssistant:")) if at >= 0]
        end = min(ends, default=len(rest))
        said_now, rest = rest[:end], rest[end:]
        messages.append(({"Human": "user", "Assistant": "assistant"}[name], said_now[said_now.startswith(" ") :]))
    return messages


def words(answer: str) -> list[str]:
    return answer.split()


def scored(raw: Record, score: str, answer: str) -> list[tuple[float, object]]:
    completions = raw.get("completions")
    require(isinstance(completions, list) and len(completions) > 1)
    assert isinstance(completions, list)
    require(all(isinstance(one, dict) for one in completions))
    return [(number(one.get(score), -math.inf, math.inf), one.get(answer)) for one in completions]


def best(answers: list[tuple[float, str]]) -> tuple[list[str], list[str]]:
    top = max(score for score, _ in answers)
    chosen = [answer for score, answer in answers if score == top]
    seen = [words(answer) for answer in chosen]
    return chosen, [answer for score, answer in answers if score < top and words(answer) not in seen]


def strict_row(format: str, raw: object, where: str) -> tuple[object, ...] | None:
    """A row as ours: id, subset, prompt, chosen, rejected, group, split, values; None where it is to be dropped."""
    require(isinstance(raw, dict))
    assert isinstance(raw, dict)
    row = {key: raw[key] for key in OURS if raw.get(key) is not None}
    answers: tuple[object, object, object]
    if format in ("ours", "rb2"):
        answers = (raw.get("prompt"), raw.get("chosen"), raw.get("rejected"))
        require("id" in row and "subset" in row)
        if format == "rb2":
            for key, count in (("chosen", "num_correct"), ("rejected", "num_incorrect")):
                require(isinstance(raw.get(key), list) and number(raw.get(count), -1, 1e9) == len(raw[key]))
            question = re.fullmatch("(ref|tied):([0-9]+)", str(raw.get("id")))
            row = ({"group": f"ties:{question[2]}"} if question else {}) | row
    else:
        row = {"id": where, "subset": format} | row
    if format in ("trl", "implicit", "binarized", "hh"):
        require(format != "trl" or raw.get("prompt") is not None)
        require(format != "implicit" or raw.get("prompt") is None)
        if format == "hh":
            pair = last_of_chats(hh_chat(raw.get("chosen")), hh_chat(raw.get("rejected")))
        else:
            pair = trl_pair(raw)
        answers = (pair[0], [pair[1]], [pair[2]])
        if format == "binarized":
            keys = ("score_chosen", "score_rejected")
            keys = keys if raw.get(keys[0]) is not None else ("chosen-rating", "rejected-rating")
            better, worse = (number(raw.get(key), -math.inf, math.inf) for key in keys)
            require(better >= worse)
            if better == worse:
                return None
        if format in ("hh", "binarized") and words(pair[1]) == words(pair[2]):
            return None
    if format == "together":
        require(set(raw) == {"input", "preferred_output", "non_preferred_output"})
        require(isinstance(raw["input"], dict) and not raw["input"].get("tools"))
        require({"messages"} <= raw["input"].keys() <= {"messages", "tools", "parallel_tool_calls"})
        messages = chat(raw["input"]["messages"], (0, 1))
        require(all(one[0] != two[0] for one, two in zip(messages, messages[1:], strict=False)))
        answers = (messages, *([one_answer(raw[key], (1,))] for key in ("preferred_output", "non_preferred_output")))
    if format == "ranked":
        found = best([(-rank, one_answer(answer)) for rank, answer in scored(raw, "rank", "completion")])
        answers = (chat(raw.get("context")), *found)
    if format == "ultrafeedback":
        found = best([(score, text(answer)) for score, answer in scored(raw, "overall_score", "response")])
        answers = (text(raw.get("instruction")), *found)
    if format in ("ranked", "ultrafeedback") and not answers[2]:
        return None
    prompt = [("user", text(answers[0]))] if isinstance(answers[0], str) else as_chat(answers[0])
    require(prompt[-1][0] == "user")
    text(prompt[-1][1])
    chosen, rejected = (as_texts(value) for value in answers[1:])
    require(not any(words(one) == words(other) for one in chosen for other in rejected))
    require(row.get("split") in (None, "train", "validation", "test"))
    group = text(row["group"]) if "group" in row else None
    bounds = {"weight": (0, 1e9, True), "margin": (-1e9, 1e9, True), "soft_label": (0.5, 1, False)}
    values = [(1.0, 0.0, 1.0)] * (len(chosen) * len(rejected)) if bounds.keys() & row.keys() else []
    for at, key in enumerate(bounds):
        if key in row:
            given = row[key] if isinstance(row[key], list) else [row[key]] * len(values)
            require(len(given) == len(values))
            numbers = [number(one, *bounds[key]) for one in given]
            values = [(*pair[:at], one, *pair[at + 1 :]) for pair, one in zip(values, numbers, strict=True)]  # type: ignore[misc]
    identity, subset = text(row["id"]), text(row["subset"])
    return identity, subset, tuple(prompt), tuple(chosen), tuple(rejected), group, row.get("split"), tuple(values)


def as_chat(value: object) -> list[tuple[str, str]]:
    return value if isinstance(value, list) and value and isinstance(value[0], tuple) else chat(value)


def as_texts(value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    require(isinstance(texts, list) and len(texts) > 0)
    return [text(one) for one in texts] if isinstance(texts, list) else []


def once(items: list[tuple[str, object]]) -> Record:
    require(len({key for key, _ in items}) == len(items))
    return dict(items)


def no_constant(name: str) -> object:
    raise Refused(name)


def strict_json(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused from error


def strict_csv(data: str) -> list[tuple[int, list[str]]]:
    """Line and cells of each record that is not an empty line (RFC 4180: a lone carriage return ends nothing)."""
    records, at, line = [], 0, 1
    while at < len(data):
        cells, start, more = [], line, True
        while more:
            if data[at : at + 1] == '"':
                closed = re.compile(r'"((?:[^"]|"")*)"', flags=re.DOTALL).match(data, at)
                require(closed is not None)
                assert closed is not None
                cell, at = closed[1].replace('""', '"'), closed.end()
            else:
                bare = re.compile(r"[^,\r\n]*").match(data, at)
                assert bare is not None
                cell, at = bare[0], bare.end()
            line += cell.count("\n")
            cells.append(cell)
            more = data[at : at + 1] == ","
            at += more
        end = re.compile(r"\r?\n|\r?\Z").match(data, at)
        require(end is not None)
        assert end is not None
        at, line = end.end(), line + 1
        if cells != [""] or '"' in data[at - 3 : at]:
            records.append((start, cells))
    return records


def strict_reading(path: Path, format: str) -> tuple[Found, int]:
    """What the file at `path` holds, and how many of its rows state no preference."""
    try:
        data = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Refused from error
    raws: list[tuple[int, object]] = []
    if path.suffix == ".jsonl":
        lines = enumerate(data.split("\n"), start=1)
        raws = [(at, strict_json(line)) for at, line in lines if any(letter not in " \t\r" for letter in line)]
    else:
        records = strict_csv(data)
        header = records[0][1] if records else []
        require(len(set(header)) == len(header))
        for at, cells in records[1:]:
            require(len(cells) == len(header))
            numbers = OURS[4:]
            row = {
                key: strict_json(cell) if key in numbers else cell
                for key, cell in zip(header, cells, strict=True)
                if cell
            }
            raws.append((at, row))
    rows = [strict_row(format, raw, f"{path.name}:{line}") for line, raw in raws]
    found = [row for row in rows if row is not None]
    require(len(found) > 0 and len({row[0] for row in found}) == len(found))
    return found, len(rows) - len(found)


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


def mutate_value(draw: random.Random, value: object) -> object:
    """A copy with one change somewhere in it."""
    if draw.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at, items = draw.randrange(len(value)), list(value)
        change = draw.choice(("in", "in", "in", "cut", "twice", "swap"))
        if change == "in":
            items[at] = mutate_value(draw, items[at])
        elif change == "swap":
            items.reverse()
        else:
            items[at : at + 1] = [] if change == "cut" else [items[at]] * 2
        return items
    key = draw.choice(list(value))
    change = draw.choice(("in", "in", "in", "in", "cut", "name", "more", "swap"))
    if change == "in":
        return value | {key: mutate_value(draw, value[key])}
    if change == "more":
        return value | {draw.choice(KEYS): draw.choice(VALUES)}
    if change == "swap":
        other = draw.choice(list(value))
        return value | {key: value[other], other: value[key]}
    rest = {name: inner for name, inner in value.items() if name != key}
    return rest if change == "cut" else rest | {draw.choice(KEYS): value[key]}


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
    write = as_jsonl if ending == ".jsonl" else as_csv
    path = folder / f"r{ending}"
    if ending == ".jsonl" and draw.random() < 0.6:
        data = (json.dumps(mutate_value(draw, good)) + "\n").encode()
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
            rf"{re.escape(path.name)}:\d+: ."
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
