"""The four subsets of the checkable rows: how a group is drawn, and the few lines that prove which answer is right.

A draft is four requests, each with its answer. A maker may draw freely: make_rows keeps a draft only when `check` says
yes on the diagonal of the 4 x 4 table of requests and answers and no everywhere else. Difficulty 1 is crude (far
topics, far numbers, plain formats), 2 middling, 3 fine (near topics, off by one, one question for all).
The words are in dpo/checkable/banks.toml. Read next: that, then dpo/rows.py.
"""

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from dpo.rows import normalise

Bank = dict[str, list[str]]
Spec = tuple[str, ...]  # what a request asks for, in a form that `check` of its subset can test


class Topic(NamedTuple):
    """A topic of Focus: its name in requests, the words that prove an answer, and answer sentences."""

    name: str
    keys: Spec
    sentences: list[str]


class Request(NamedTuple):
    """A request's text, what proves an answer to it, and the answer drawn for it."""

    text: str
    spec: Spec
    answer: str


class Subset(NamedTuple):
    """`draw(rng, split, difficulty)` makes a draft, or None where it drew an unclear one; `check` proves an answer."""

    draw: Callable[[Random, str, int], list[Request] | None]
    check: Callable[[Spec, str], bool]


def _topic(name: str, *sentences: str) -> Topic:
    keys = re.findall(r"\*(\w+)\*", " ".join(sentences).lower())
    return Topic(name, tuple(keys), [sentence.replace("*", "") for sentence in sentences])


_FILE = tomllib.loads(Path(__file__).with_name("banks.toml").read_text(encoding="utf-8"))
BANKS: dict[str, Bank] = _FILE["banks"]  # by split
TOPICS: dict[str, list[list[Topic]]] = {  # by split and cluster
    split: [[_topic(*topic) for topic in cluster] for cluster in clusters]
    for split, clusters in _FILE["topics"].items()
}


def plain_words(text: str) -> str:
    """The normalised text with a space at both ends, for whole-word search."""
    return f" {normalise(text)} "


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sometimes(rng: Random, entries: Sequence[str], chance: float) -> str:
    return rng.choice(entries) if rng.random() < chance else ""


def _names_subject(rng: Random, difficulty: int) -> bool:
    """Whether an answer names what it is about: a cue to request and answer alike, so rarer the harder."""
    return rng.random() < (0.5, 0.25, 0.0)[difficulty - 1]


# Focus: is this an answer to this request?


def check_focus(spec: Spec, answer: str) -> bool:
    """The answer has one of the topic's key words."""
    return any(key in plain_words(answer).split() for key in spec)


def draw_focus(rng: Random, split: str, difficulty: int) -> list[Request]:
    """Four topics: from four clusters, two of each of two, or one cluster of near topics."""
    bank = BANKS[split]
    clusters = rng.sample(TOPICS[split], (4, 2, 1)[difficulty - 1])
    draft = []
    for topic in [topic for cluster in clusters for topic in rng.sample(cluster, 4 // len(clusters))]:
        about = rng.choice(bank["about"]).format(t=topic.name)
        text = _join(_sometimes(rng, bank["opener"], 0.5), about, _sometimes(rng, bank["closer"], 0.5))
        lead = rng.choice(bank["naming"]) if _names_subject(rng, difficulty) else _sometimes(rng, bank["preamble"], 0.4)
        sentences = rng.sample(topic.sentences, rng.choice((1, 1, 2)))
        draft.append(Request(text, topic.keys, _join(lead.format(t=topic.name), *sentences)))
    return draft


# Precise IF: four constraints on one task


def _is_json_object(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except json.JSONDecodeError:
        return False


_RULES: dict[str, Callable[[str, list[str], Spec], bool]] = {  # of an answer, its words, the constraint's arguments
    "words": lambda answer, words, args: len(words) == int(args[0]),
    "sentences": lambda answer, words, args: max(1, len(re.findall(r"[.!?](?!\w)", answer))) == int(args[0]),
    "items": lambda answer, words, args: (
        re.search(r"[^a-zA-Z, ]", answer) is None and "," in answer and len(answer.split(",")) == int(args[0])
    ),
    "include": lambda answer, words, args: args[0] in words,
    "avoid": lambda answer, words, args: args[0] not in words,
    "lower": lambda answer, words, args: answer == answer.lower(),
    "upper": lambda answer, words, args: answer == answer.upper(),
    "ends": lambda answer, words, args: words[-1] == args[0],
    "starts": lambda answer, words, args: words[0] == args[0],
    "order": lambda answer, words, args: tuple(word for word in dict.fromkeys(words) if word in args) == args,
    "bullets": lambda answer, words, args: "\n" in answer and all(line[:2] == "- " for line in answer.split("\n")),
    "json": lambda answer, words, args: _is_json_object(answer),
    "quoted": lambda answer, words, args: answer[0] == answer[-1] == '"',
    "question": lambda answer, words, args: answer.rstrip('"').endswith("?"),
}
_CRUDE = ("words", "sentences", "items", "lower", "upper", "bullets", "json", "quoted", "question")
_COUNTED = ("words", "sentences", "items", "include", "ends", "starts", "order")  # have an argument that can be near
_POOLS = {"qualities": (8, 7, 5), "people": (4, 3, 2), "times": (4, 3, 2), "spots": (4, 3, 2)}  # sizes by difficulty
_NUMBERS = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def check_precise_if(spec: Spec, answer: str) -> bool:
    """The answer keeps the constraint, read generously (a word inside JSON counts as a word of the answer)."""
    return _RULES[spec[0]](answer, _words(answer), spec[1:])


def _kinds(rng: Random, difficulty: int) -> list[str]:
    if difficulty == 3:
        return rng.sample(_COUNTED, 2) * 2 if rng.random() < 0.5 else [rng.choice(_COUNTED)] * 4
    return rng.sample(_CRUDE if difficulty == 1 else tuple(_RULES), 4)


def _line(rng: Random, pool: Bank, key: str, thing: str) -> str:
    a, b, c = rng.sample(pool["qualities"], 3)
    fields = {"a": a, "b": b, "c": c, "n": thing, "p": rng.choice(pool["people"])}
    return rng.choice(pool[key]).format(**fields, w=rng.choice(pool["times"]), l=rng.choice(pool["spots"]))


def _shape(rng: Random, pool: Bank, kind: str, thing: str, difficulty: int) -> str:
    """An answer made to keep a constraint of this kind."""
    line = _line(rng, pool, "statement", thing)
    if kind == "sentences":
        lines = [line, *(_line(rng, pool, rng.choice(("nameless", "statement")), thing) for _ in range(3))]
        return " ".join(dict.fromkeys(lines[: rng.choice((1, 2, 2, 3) if difficulty < 3 else (1, 2, 3, 4))]))
    if kind == "items":
        return _capital(", ".join(rng.sample(pool["qualities"], rng.choice((3, 4, 5)))))
    if kind == "order" or (kind == "ends" and rng.random() < 0.5):
        return _line(rng, pool, "listed", thing)
    if kind == "starts":
        return f"{rng.choice(pool['starter'])}, {line[0].lower()}{line[1:]}"
    if kind == "bullets":
        return f"- {line}\n- {_line(rng, pool, 'nameless', thing)}"
    if kind == "json":
        return json.dumps({thing.capitalize(): " and ".join(rng.sample(pool["qualities"], 2))})
    if kind in ("avoid", "question"):
        return _line(rng, pool, "nameless" if kind == "avoid" else "ask", thing)
    return {"lower": line.lower(), "upper": line.upper(), "quoted": f'"{line}"'}.get(kind, line)


def _constraint(rng: Random, bank: Bank, kind: str, answer: str, thing: str) -> tuple[str, Spec]:
    """The wording and the spec of a constraint of this kind that the answer keeps."""
    words = _words(answer)
    if kind in ("words", "sentences", "items"):
        counts = {"words": len(words), "sentences": len(re.findall(r"[.!?]", answer)), "items": answer.count(",") + 1}
        count = counts[kind]
        spelled = _NUMBERS[count] if count < len(_NUMBERS) and rng.random() < 0.5 else str(count)
        noun = "sentence" if count == 1 else "sentences"
        return rng.choice(bank[kind]).format(k=spelled, sentence=noun), (kind, str(count))
    args: Spec = ()
    if kind == "include":
        content = {entry.split()[-1] for key in _POOLS for entry in bank[key]}
        args = (rng.choice([word for word in words if word in content] or [thing]),)
    elif kind == "order":
        args = tuple(word for word in words if word in bank["qualities"])
    elif kind in ("ends", "starts", "avoid"):
        args = ({"ends": words[-1], "starts": words[0], "avoid": thing}[kind],)
    return rng.choice(bank[kind]).format(x=", ".join(args)), (kind, *args)


def draw_precise_if(rng: Random, split: str, difficulty: int) -> list[Request] | None:
    """One task, four constraints (each read off its answer); None where a reader might count differently than we do."""
    bank, kinds = BANKS[split], _kinds(rng, difficulty)
    if "words" in kinds and "json" in kinds:  # is the key a word of the answer?
        return None
    thing = rng.choice(bank["things"])
    # The group's own few words, so that its answers are alike in content: the fewer the harder.
    pool = bank | {key: rng.sample(bank[key], sizes[difficulty - 1]) for key, sizes in _POOLS.items()}
    draft = []
    for kind, answer in [(kind, _shape(rng, pool, kind, thing, difficulty)) for kind in kinds]:
        wording, spec = _constraint(rng, bank, kind, answer, thing)
        task = rng.choice(bank["task"]).format(n=thing)
        draft.append(Request(_join(_sometimes(rng, bank["opener"], 0.2), task, wording), spec, answer))
    counts = [len(_words(request.answer)) for request in draft]
    asked = [count for kind, count in zip(kinds, counts, strict=True) if kind == "words"]
    if difficulty == 1 and any(0 < abs(count - n) < 3 for count in counts for n in asked):
        return None
    return None if difficulty == 3 and asked and max(asked) - min(asked) > 4 else draft


# Math: short sums with four results


def check_math(spec: Spec, answer: str) -> bool:
    """The answer's one number is the value of the spec, e.g. ("7", "+", "2", "-", "4"), taken from left to right."""
    value = int(spec[0])
    for operator, operand in zip(spec[1::2], map(int, spec[2::2]), strict=True):
        value = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[operator]
    return re.findall(r"\d+", answer) == [str(value)]


def _sum(rng: Random, result: int, two_step: bool) -> Spec:
    """A sum with this result (>= 4) and operands of at least 2."""
    terms: tuple[int | str, ...]
    if two_step:
        b, c = rng.sample(range(2, 10), 2)
        if rng.random() < 0.5 and result - b + c >= 2:
            terms = (result - b + c, "+", b, "-", c)
        else:
            terms = (result + b - c, "-", b, "+", c) if result > c + 1 else (result + b, "-", b)
    else:
        factors = [k for k in range(2, result // 2 + 1) if result % k == 0]
        operator = rng.choice(["+", "-"] + ["*"] * bool(factors) + ["/"] * (result <= 12))
        most = {"+": result - 2, "-": 12, "/": 5}
        b = rng.choice(factors) if operator == "*" else rng.randint(2, most[operator])
        terms = ({"+": result - b, "-": result + b, "*": result // b, "/": result * b}[operator], operator, b)
    return tuple(map(str, terms))


def draw_math(rng: Random, split: str, difficulty: int) -> list[Request]:
    """Four sums of one kind (bare or about the same goods) whose results lie 8-15, 2-5 or 1 apart."""
    bank, form = BANKS[split], rng.choice(("plain", "story"))
    goods = rng.choice(bank["goods"])
    results = [rng.randint(4, (9, 20, 30)[difficulty - 1])]
    while len(results) < 4:
        results.append(results[-1] + rng.randint(*((8, 15), (2, 5), (1, 1))[difficulty - 1]))
    rng.shuffle(results)
    draft = []
    for result in results:
        spec = _sum(rng, result, two_step=difficulty == 3 and rng.random() < 0.5)
        template = rng.choice(bank[form + "".join(spec[1::2])])
        fields = dict(zip("abc", spec[::2], strict=False), N=rng.choice(bank["names"]), i=goods)
        text = _join(_sometimes(rng, bank["opener"], 0.2), template.format(**fields))
        wording = rng.choice(bank["number"] + bank["unit"] * (form == "story")).format(r=result, i=goods)
        draft.append(Request(text, spec, _join(_sometimes(rng, bank["preamble"], 0.2), wording)))
    return draft


# Grounding: the facts stand in the prompt


def check_grounding(spec: Spec, answer: str) -> bool:
    """The answer states the asked value, no other value of the facts, and names no other entity.

    The spec is the asked entity and attribute, then the facts as (entity, attribute, value) one after the other.
    """
    facts = [spec[start : start + 3] for start in range(2, len(spec), 3)]
    right = next(value for *asked, value in facts if asked == [*spec[:2]])
    others = {part for entity, _, value in facts for part in (entity, value)} - {right, spec[0]}
    text = plain_words(answer)
    return plain_words(right) in text and not any(plain_words(other) in text for other in others)


_ATTRIBUTES = {  # kind of entity: attribute: the bank of its values
    "places": {"opens": "hours", "entry": "money", "runs": "names", "street": "streets"},
    "objects": {"price": "money", "color": "colors", "owner": "names", "room": "shelves"},
}
_COUNTS = {"hours": range(5, 12), "money": range(3, 40)}


def _values(rng: Random, bank: Bank, key: str) -> list[str]:
    if key in _COUNTS:
        return [rng.choice(bank[key]).format(k=k) for k in rng.sample(_COUNTS[key], 5)]
    return rng.sample(bank[key], 4)


def draw_grounding(rng: Random, split: str, difficulty: int) -> list[Request]:
    """1: one entity's four attributes, or four versions of its facts. 2: two by two. 3: one attribute of four."""
    bank, kind = BANKS[split], rng.choice(tuple(_ATTRIBUTES))
    attributes = rng.sample(tuple(_ATTRIBUTES[kind]), 4)
    entities = rng.sample(bank[kind], 4)
    versions = difficulty == 1 and rng.random() < 0.5
    asked = {
        1: [(entities[0], attribute) for attribute in (attributes[:1] * 4 if versions else attributes)],
        2: [(entity, attribute) for entity in entities[:2] for attribute in attributes[:2]],
        3: [(entity, attributes[0]) for entity in entities],
    }[difficulty]
    values = {attribute: _values(rng, bank, _ATTRIBUTES[kind][attribute]) for attribute in attributes}
    stated = [(*pair, values[pair[1]][i if versions or difficulty > 1 else 0]) for i, pair in enumerate(asked)]
    shared = list(stated)
    rng.shuffle(shared)
    draft = []
    for entity, attribute, value in stated:
        other = (entity, attributes[1], values[attributes[1]][0])
        facts = rng.sample([(entity, attribute, value), other], 2) if versions else shared
        sentences = [_capital(bank[a][0].format(e=e, v=v)) + "." for e, a, v in facts]
        lead = _sometimes(rng, bank["read"], 0.4)
        wording = rng.choice(bank[attribute][2:]).format(v=value)
        if wording.startswith("It ") and _names_subject(rng, difficulty):
            wording = f"The {entity} {wording[3:]}"
        text = _join(lead, *sentences, bank[attribute][1].format(e=entity))
        spec = (entity, attribute, *(part for fact in facts for part in fact))
        draft.append(Request(text, spec, _join(_sometimes(rng, bank["preamble"], 0.2), wording)))
    return draft


SUBSETS: dict[str, Subset] = {
    "Focus": Subset(draw_focus, check_focus),
    "Precise IF": Subset(draw_precise_if, check_precise_if),
    "Math": Subset(draw_math, check_math),
    "Grounding": Subset(draw_grounding, check_grounding),
}
