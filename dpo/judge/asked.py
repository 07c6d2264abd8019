"""Replies of a judge that writes: a protocol's questions asked in words, the answers read strictly.

Letters: Q questions of a row, L labels of the template. Read next: dpo/judge/protocols.py, which reads the replies.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from dpo.judge.calibration import Floats
from dpo.judge.endpoint import Answer, Ask
from dpo.judge.prompts import QUESTIONS, judge_messages
from dpo.rows import Row, pairs_of
from dpo.trees import TreeSettings
from models.errors import UserError


def ask_rows(rows: Sequence[Row], ask: Ask, settings: TreeSettings) -> tuple[list[Floats], list[Answer]]:
    """reply_QL of each row (dpo/judge/protocols.py), and the answers that they are read from, one a question."""
    labels, prompts, counts = settings.template.labels, [], []
    for row in rows:
        reference = row.reference_answer if settings.reference_answer else ""
        try:
            questions = QUESTIONS[settings.protocol](row, pairs_of(row, settings.pairs_per_row), settings.seed)
            for shown in questions:
                messages = judge_messages(
                    row.prompt, shown, settings.template, sighted=settings.sighted, reference=reference
                )
                prompts.append(messages)
        except UserError as error:
            raise UserError(f"{row.where or row.id}: {error}") from error
        counts.append(len(questions))
    read = READERS.get(settings.protocol, written_label)
    answers = ask(prompts, lambda answer: not math.isnan(read(answer, labels)[0]))
    reply_QL = np.array([read(answer, labels) for answer in answers])
    return np.split(reply_QL, np.cumsum(counts)[:-1]), answers


def written_label(answer: Answer, labels: Sequence[str]) -> list[float]:
    """log p of each label: 0 of the one that is written, -inf of the others; NaN where none is.

    It is the last one in [[ ]] on the last line, else one on a line of its own, the first or the last: in an answer
    that is quoted between them may stand any.
    """
    last = answer.text.strip().rpartition("\n")[2]
    boxed = re.findall(rf"\[\[({'|'.join(map(re.escape, labels))})\]\]", last)
    found = None if answer.finish == "error" else boxed[-1] if boxed else _own_line(answer.text, tuple(labels))
    label = found if found is None or isinstance(found, str) else found[1]
    if label is None:
        return [math.nan] * len(labels)
    return [0.0 if one.lower() == label.lower() else -math.inf for one in labels]


def written_verdict(answer: Answer) -> str:
    """The letter of the better answer, or "Tie", where verdict_odds would look for it; "" where there is neither."""
    found = _own_line(answer.text, ("A", "B", "Tie")) if answer.finish != "error" else None
    return found[1].capitalize() if found else ""


def compared(answer: Answer, labels: Sequence[str]) -> list[float]:
    """The log-odds of "A" and 0."""
    return [verdict_odds(answer), 0.0]


READERS: dict[str, Callable[[Answer, Sequence[str]], list[float]]] = {"compare": compared}
"""judge.protocol -> how an answer is read, where not by written_label."""


def verdict_odds(answer: Answer) -> float:
    """log p("A") - log p("B") (nats) where the answer gives its verdict; NaN where it gives none.

    The verdict is a letter on a line of its own, the first or the last. Its odds are from what the endpoint says of the
    tokens in that place, whatever spaces and marks they have; a letter that it does not name is as likely as it can be:
    as the least likely one named, or as all that are not. Without such tokens the odds are 1 or -1.
    """
    found = _own_line(answer.text, ("A", "B")) if answer.finish != "error" else None
    if found is None:
        return math.nan
    place = found.start(1)
    at = "".join(token for token, _ in answer.tokens).rfind(answer.text) + place
    for token, top in answer.tokens:
        if 0 <= at < len(token) and top:
            unnamed = min(*top.values(), math.log(max(1e-9, 1 - sum(map(math.exp, top.values())))))
            a, b = (_log_sum([p for other, p in top.items() if _letters(other) == label], unnamed) for label in "AB")
            if a != b:
                return a - b
        at -= len(token)
    return 1.0 if answer.text[place] == "A" else -1.0


@cache
def _line_pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    of_words = [f"(?i:{re.escape(label)})" if len(label) > 1 else re.escape(label) for label in labels]
    said = "(?:the )?(?:better |best )?(?:answer|verdict|choice|winner|rating|score)(?: is)?"
    signed, out_of = "", ""
    if all(label.isdecimal() for label in labels):  # "-2" is no 2, and "8/5" none of ten
        signed, out_of = r"(?<![-−])", rf"(?:\s*/\s*{max(map(int, labels))})?"
    return re.compile(rf"[\W_]*(?:(?i:{said})[\W_]+)?{signed}({'|'.join(of_words)}){out_of}[\W_]*")


def _own_line(text: str, labels: tuple[str, ...]) -> re.Match[str] | None:
    lines = [line.span() for line in re.finditer(r"\S.*", text)]
    pattern = _line_pattern(labels)
    found = [match for match in (pattern.fullmatch(text, *line) for line in lines[:1] + lines[-1:]) if match]
    return found[0] if len({match[1].lower() for match in found}) == 1 else None


def _letters(token: str) -> str:
    return re.sub(r"[\W_]", "", token)


def _log_sum(log_p: Sequence[float], empty: float) -> float:
    total = sum(map(math.exp, log_p))
    return math.log(total) if total else empty
