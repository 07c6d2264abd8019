"""What a judge is asked: a template's texts around the request and the answers, the verdict one of its labels.

A template is a TOML file: `labels`, `system` and `user`, the two in Jinja's notation with the columns of `columns`.
Its column `fence` is a word that no answer can know: what stands between two of it is the answer, and nothing else is.
No dimension letters. Read next: dpo/trees.py, which turns the questions into branches.
"""

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo.rows import Message, Row
from models.errors import UserError, show
from models.files import read_text

Pairs = Sequence[tuple[int, int]]
PRESETS = Path(__file__).with_name("templates")
TIES_ID = re.compile(r"(ref|tied):(.+)")
"""RewardBench 2's two rows of a Ties question: one right answer asked for (ref), or all of them right (tied)."""
TURN_MARK = re.compile(  # what begins one: of ChatML, Llama 2 to 4, harmony; DeepSeek; Mistral; Gemma; a think block
    r"([<\[])(?=\|[\w-]+\|>|｜[^<>]+｜>|/?(?:s|think|start_of_turn|end_of_turn)>|<?/?SYS>>|/?INST\])"
)
SLOTS = {"compare": 2, "choose": 4, "rate": 1, "ties": 1}
"""judge.protocol -> how many answers a question shows."""


class _Absent(jinja2.StrictUndefined):
    """A column that a row does not have: false in a condition, an error where it is written."""

    __bool__ = jinja2.Undefined.__bool__  # type: ignore[assignment]


JINJA = ImmutableSandboxedEnvironment(undefined=_Absent)  # what a row says is text, never a template


@dataclass(frozen=True)
class Template:
    """What a judge is told and asked, and how it may reply; `passing` labels make a classifier's score."""

    name: str
    labels: tuple[str, ...]
    system: str
    user: str
    passing: tuple[str, ...] = ()


def slot_columns(slots: int) -> tuple[str, ...]:
    """The columns of so many answers: answer, or answer_a, answer_b, ..."""
    return ("answer",) if slots == 1 else tuple(f"answer_{letter}" for letter in "abcd"[:slots])


def read_template(name: str, protocol: str) -> Template:
    """The preset `name` (default: the protocol's own) or a file, fit for the protocol; UserError says what is not."""
    path = PRESETS / f"{name or protocol}.toml"
    path = path if path.is_file() else Path(name)
    presets = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.toml")))
    where = f"judge.template={path}"
    if not path.is_file():
        raise UserError(f"judge.template={name}: there is no such file; presets are {presets}")
    try:
        said = tomllib.loads(read_text(path))
        system, user = (str(said.pop(key)).removeprefix("\n") for key in ("system", "user"))
        labels, passing = ([str(label) for label in [] + said.pop(key, [])] for key in ("labels", "passing"))
        template = Template(path.stem, tuple(labels), system, user, tuple(passing))
        named = columns(template)
    except (tomllib.TOMLDecodeError, LookupError, TypeError) as error:
        raise UserError(f"{where}: must be TOML with the texts system and user and the list labels: {error}") from None
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: cannot be read as Jinja: {error}") from None
    answers = slot_columns(SLOTS[protocol])
    if missing := [column for column in answers if column not in named]:
        raise UserError(
            f"{where}: names no {{{{ {missing[0]} }}}}, so that the judge would not see it; judge.protocol={protocol} "
            f"shows {', '.join(answers)}"
        )
    allowed = {"prompt", "reference_answer", "fence", *answers}
    if unknown := sorted(named - allowed):
        raise UserError(f"{where}: names {unknown[0]}; there are {', '.join(sorted(allowed))}")
    if said:
        raise UserError(f"{where}: the key {min(said)}; allowed are labels, passing, system and user")
    numbers = all(re.fullmatch(r"\d+", label) for label in labels)  # RewardBench 2 has -1 for no rating
    wanted = {
        "compare": (labels == ["A", "B"], '["A", "B"]'),
        "choose": (labels == ["A", "B", "C", "D"], '["A", "B", "C", "D"]'),
    }.get(protocol, (numbers if not passing else {*passing} < {*labels}, "numbers, or some are `passing`"))
    if len(labels) < 2 or len(set(labels)) < len(labels) or not wanted[0]:
        raise UserError(f"{where}: labels are {show(labels)}; with judge.protocol={protocol} they must be {wanted[1]}")
    return template


@cache
def _compiled(text: str) -> jinja2.Template:
    return JINJA.from_string(text)


@cache
def columns(template: Template) -> frozenset[str]:
    """The columns that it names."""
    parsed = (JINJA.parse(text) for text in (template.system, template.user))
    return frozenset[str]().union(*map(jinja2.meta.find_undeclared_variables, parsed))


def request_text(prompt: tuple[Message, ...]) -> str:
    """The request as the judge reads it: the text itself, or the whole dialogue with its speakers named."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def fence(texts: Iterable[str]) -> str:
    """Eight letters that depend on all the texts, whatever their order: a text that holds them has others."""
    digest = hashlib.sha256(repr(sorted(texts)).encode()).digest()
    return "".join(chr(ord("a") + byte % 26) for byte in digest[:8])


def judge_messages(
    prompt: tuple[Message, ...],
    answers: Sequence[str],
    template: Template,
    *,
    sighted: bool = True,
    reference: str = "",
) -> tuple[Message, ...]:
    """The judge's messages for the answers in their slots; a blind judge is not shown the request.

    A mark of the row like <|im_end|>, [/INST] or </s> is broken up: who serves an endpoint may read it as a turn's.
    UserError where the template does not name what there is to show, or writes what there is not.
    """
    given = dict(zip(slot_columns(len(answers)), answers, strict=True))
    given |= {"prompt": request_text(prompt)} if sighted else {}
    given |= {"reference_answer": reference} if reference else {}
    if unused := sorted(given.keys() - columns(template)):
        hide = {"prompt": "judge.sighted=false", "reference_answer": "judge.reference_answer=false"}[unused[0]]
        raise UserError(f"judge.template={template.name} does not name the column {unused[0]}; name it, or set {hide}")
    given = {column: TURN_MARK.sub(r"\1 ", text) for column, text in given.items()}
    given["fence"] = fence(given.values())
    try:
        system, user = (_compiled(text).render(given) for text in (template.system, template.user))
    except jinja2.TemplateError as error:
        raise UserError(
            f"judge.template={template.name}: {error}, for this row has none or judge.sighted=false hides it; write it "
            "within {% if prompt %} or {% if reference_answer %}"
        ) from error
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:  # of its own expressions
        raise UserError(f"judge.template={template.name}: cannot be filled in: {error!r}; mend what it does") from error
    for column in slot_columns(len(answers)):
        if given[column].strip() not in system + user:
            raise UserError(f"judge.template={template.name}: hides some of {column}; no if or filter may cut it")
    return {"role": "system", "content": system}, {"role": "user", "content": user}


# ---- the questions of a row


def _compare(row: Row, pairs: Pairs, seed: int) -> list[tuple[str, ...]]:
    return [order for i, j in pairs for two in [(row.chosen[i], row.rejected[j])] for order in (two, two[::-1])]


def chosen_slot(row: Row, seed: int) -> int:
    """In which of the four slots the right answer of `choose` stands."""
    return random.Random(f"slot {seed} {row.id}").randrange(4)


def _choose(row: Row, pairs: Pairs, seed: int) -> list[tuple[str, ...]]:
    """The first chosen answer, exchanged with what stands in its slot, and the first three rejected ones."""
    if len(row.rejected) < 3:
        raise UserError(f"judge.protocol=choose: needs three rejected answers, the row has {len(row.rejected)}")
    answers, slot = [row.chosen[0], *row.rejected[:3]], chosen_slot(row, seed)
    answers[0], answers[slot] = answers[slot], answers[0]
    return [tuple(answers)]


def _rate(row: Row, pairs: Pairs, seed: int) -> list[tuple[str, ...]]:
    return [(answer,) for answer in (*row.chosen, *row.rejected)]


QUESTIONS: dict[str, Callable[[Row, Pairs, int], list[tuple[str, ...]]]] = {
    "compare": _compare,
    "choose": _choose,
    "rate": _rate,
    "ties": _rate,
}
"""judge.protocol -> from a row, its pairs that are judged and the seed of the slots, the answers of each question."""


def asks(protocol: str, row: Row) -> bool:
    """Whether it asks of the row: RewardBench 2 asks no best of four where several answers are right."""
    of_ties = bool(TIES_ID.fullmatch(row.id))
    return {"choose": not of_ties, "ties": of_ties}.get(protocol, True)


COMPARE, RATE, TIES = (read_template("", protocol) for protocol in ("compare", "rate", "ties"))


def asked_by(template: Template, row: Row) -> Template:
    """What the row is asked by: as RewardBench 2 does, `rate` asks its rows of Ties in the words of `ties`."""
    return TIES if template == RATE and TIES_ID.fullmatch(row.id) else template
