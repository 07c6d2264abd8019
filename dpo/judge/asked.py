"""Replies of a judge that writes: a protocol's questions asked in words, the answers read strictly.

Letters: Q questions of a row, L labels of the template. Read next: dpo/judge/protocols.py, which reads the replies.
"""

import math
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from dpo.judge.calibration import Floats
from dpo.judge.endpoint import Answer, Ask
from dpo.judge.prompts import QUESTIONS, asked_by, judge_messages
from dpo.rows import Message, Row, pairs_of
from dpo.trees import TreeSettings
from models.errors import UserError


def ask_rows(rows: Sequence[Row], ask: Ask, settings: TreeSettings) -> tuple[list[Floats], list[Answer]]:
    """reply_QL of each row (dpo/judge/protocols.py), and the answers that they are read from, one a question."""
    counts = []
    prompts: list[tuple[Message, ...]] = []
    for row in rows:
        reference = row.reference_answer if settings.reference_answer else ""
        try:
            questions = QUESTIONS[settings.protocol](row, pairs_of(row, settings.pairs_per_row), settings.seed)
            words = asked_by(settings.template, row)
            prompts += [
                judge_messages(row.prompt, shown, words, sighted=settings.sighted, reference=reference)
                for shown in questions
            ]
        except UserError as error:
            raise UserError(f"{row.where or row.id}: {error}") from error
        counts.append(len(questions))
    answers = ask(prompts, lambda answer: not math.isnan(read_reply(answer, settings)[0]))
    reply_QL = np.array([read_reply(answer, settings) for answer in answers])
    return np.split(reply_QL, np.cumsum(counts)[:-1]), answers


def read_reply(answer: Answer, settings: TreeSettings) -> list[float]:
    """reply_L of a question's answer; in `compare` the log-odds of "A" and 0."""
    if settings.protocol == "compare":
        return [verdict_odds(answer), 0.0]
    return written_label(answer, settings.template.labels)


def written_label(answer: Answer, labels: Sequence[str]) -> list[float]:
    """log p of each label: 0 of the one that is written, -inf of the others; NaN where none is.

    It is the only one in [[ ]] on the last line, or one on a line of its own, the first or the last: in an answer that
    is quoted between them may stand any.
    """
    found = _found(answer, tuple(labels))
    if found is None:
        return [math.nan] * len(labels)
    return [0.0 if one.lower() == found[1].lower() else -math.inf for one in labels]


def written_verdict(answer: Answer) -> str:
    """The letter of the better answer, or "Tie", where verdict_odds would look for it; "" where there is neither."""
    found = _found(answer, ("A", "B", "Tie"))
    return found[1].capitalize() if found else ""


def verdict_odds(answer: Answer) -> float:
    """log p("A") - log p("B") (nats) where the answer gives its verdict; NaN where it gives none.

    The verdict stands where written_label looks for it. Its odds are from what the endpoint says of the tokens in that
    place, whatever spaces and marks they have; a letter that it does not name is as likely as it can be: as the least
    likely one named, or as all that are not. Without such tokens the odds are 1 or -1.
    """
    found = _found(answer, ("A", "B"))
    if found is None:
        return math.nan
    place = found.start(1)
    begins = "".join(token for token, _ in answer.tokens).rfind(answer.text)
    at = begins + place
    for token, top in answer.tokens if begins >= 0 else ():  # half a character is a token that joins to no text
        if 0 <= at < len(token) and top:
            unnamed = min(*top.values(), math.log(max(1e-9, 1 - sum(map(math.exp, top.values())))))
            named = [(re.sub(r"[\W_]", "", other), math.exp(log_p)) for other, log_p in top.items()]
            shares = [sum(share for letter, share in named if letter == label) for label in "AB"]
            a, b = (math.log(share) if share else unnamed for share in shares)
            if a != b:
                return a - b
        at -= len(token)
    return 1.0 if answer.text[place] == "A" else -1.0


HEADING = re.compile(r"(#+[\W_]*(?i:answer)\s+\w+|[\W_]*(?i:answer)[\s*_]+\w+[\s*_]*:)[\W_]*")
"""A first line over what is said of one answer, no verdict: "**Answer A:**", "### Answer A"."""


@cache
def _line_pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    of_words = [f"(?i:{re.escape(label)})" if len(label) > 1 else re.escape(label) for label in labels]
    said = "(?:the )?(?:better |best )?(?:answer|verdict|choice|winner|rating|score)(?: is)?"
    signed, out_of = "", ""
    if all(label.isdecimal() for label in labels):  # "-2" is no 2, and "8/5" none of ten
        signed, out_of = r"(?<![-−])", rf"(?:\s*/\s*{max(map(int, labels))})?"
    return re.compile(rf"[\W_]*(?:(?i:{said})[\W_]+)?{signed}({'|'.join(of_words)}){out_of}[\W_]*")


def _found(answer: Answer, labels: tuple[str, ...]) -> re.Match[str] | None:
    """Where the answer gives one of the labels as its verdict: group 1."""
    if answer.finish == "error":
        return None
    last_line = answer.text.rstrip().rfind("\n") + 1
    boxes = re.compile(rf"\[\[({'|'.join(map(re.escape, labels))})\]\]")
    boxed = list(boxes.finditer(answer.text, last_line))
    if boxed:
        return boxed[-1] if len({match[1] for match in boxed}) == 1 else None
    lines = [line.span() for line in re.finditer(r"\S.*", answer.text)]
    heads = len(lines) > 1 and HEADING.fullmatch(answer.text, *lines[0])
    pattern, ends = _line_pattern(labels), lines[bool(heads) : 1] + lines[-1:]
    found = [match for match in (pattern.fullmatch(answer.text, *line) for line in ends) if match]
    return found[0] if len({match[1].lower() for match in found}) == 1 else None
