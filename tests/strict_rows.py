"""A second reader of row files, written from the documentation alone: what a file holds, or that it is to be refused.

The fuzz (tests/test_fuzz_rows.py) compares dpo/rows.py with it. It reads one record at a time, slowly and plainly.
"""

import json
import math
import os
import re
from difflib import SequenceMatcher
from pathlib import Path

Record = dict[str, object]
Found = list[tuple[object, ...]]  # what is compared of each row that is read
OURS = ("id", "subset", "group", "split", "weight", "margin", "soft_label")


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
    prompt, chosen, rejected = raw.get("prompt"), raw.get("chosen"), raw.get("rejected")
    if isinstance(prompt, list) and isinstance(chosen, str) and isinstance(rejected, str):
        return chat(prompt), text(chosen), text(rejected)
    if isinstance(prompt, list):
        return chat(prompt), one_answer(chosen), one_answer(rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        shared, *answers = last_of_chats(chat(chosen), chat(rejected))
        assert isinstance(shared, list)
        require(prompt is None or prompt == shared[-1][1])
        return shared, answers[0], answers[1]
    if prompt is not None:
        return text(prompt), text(chosen), text(rejected)
    require(not any(raw.get(key) for key in ("question", "instruction", "input", "query")))
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
    for key, value in raw.items():
        of_prompt = ("tools", "images", "image", "chat_template_kwargs", "system", "system_prompt", "history")
        require(not value or key not in of_prompt)
        near = max(SequenceMatcher(None, name, key).ratio() for name in (*OURS, "reference_answer"))
        require(value is None or key in (*OURS, "reference_answer") or near < 0.82)
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
    if format == "rmbench":
        require(raw.get("id") is not None and raw.get("domain") is not None)
        row |= {"id": str(raw["id"]), "subset": raw["domain"]}
        answers = (raw.get("prompt"), raw.get("chosen"), raw.get("rejected"))
    if format == "judgebench":
        named = {"id": raw.get("pair_id"), "subset": raw.get("source")}
        row |= {key: value for key, value in named.items() if value is not None and raw.get(key) is None}
        require(raw.get("label") in ("A>B", "B>A"))
        sides = [[text(raw.get("response_A"))], [text(raw.get("response_B"))]]
        answers = (text(raw.get("question")), *(sides if raw["label"] == "A>B" else sides[::-1]))
    if format == "llmbar":
        require(raw.get("label") in (1, 2) and raw["label"] is not True)
        sides = [[text(raw.get("output_1"))], [text(raw.get("output_2"))]]
        answers = (text(raw.get("input")), *(sides if raw["label"] == 1 else sides[::-1]))
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
    return (
        [one_answer([one]) if isinstance(one, dict) else text(one) for one in texts] if isinstance(texts, list) else []
    )


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
    elif path.suffix == ".json":
        array = strict_json(data)
        require(isinstance(array, list))
        raws = [*enumerate(array)] if isinstance(array, list) else []
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
