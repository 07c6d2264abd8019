"""Attacks on a judge: what a wrong answer can do to win.

An attack rewrites the wrong answers of a row, seeded by the row. No code proves that a rewritten answer is still wrong:
where a request asks for a form (no capitals, say), a few are right by accident. No dimension letters. Read next:
dpo/inputs.py, which attacks training rows (data.attack_share) and test rows (judge.attacks); dpo/attack.py, which
writes them; dpo/judge/robustness.py, how often they win.
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from dpo.rows import Row, Rows, keep_rows
from models.errors import UserError
from models.files import atomic_write_text, read_json_object

Rewrite = Callable[[str, Random], str]


def _worded(wordings: Sequence[str]) -> Rewrite:
    """One of the wordings with one of each (this|that); @ is the answer."""

    def rewrite(answer: str, rng: Random) -> str:
        text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda these: rng.choice(these[1].split("|")), rng.choice(wordings))
        return text.replace("@", answer)

    return rewrite


def _styled(answer: str, rng: Random) -> str:
    """Its sentences as a list under a heading, the first word of each bold."""
    items = [re.sub(r"\S+", r"**\g<0>**", sentence, count=1) for sentence in re.split(r"(?<=[.!?])\s+", answer.strip())]
    return "\n".join((f"## {rng.choice(('Answer', 'Summary', 'Key points'))}\n", *(f"- {item}" for item in items)))


WORDINGS = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text(encoding="utf-8"))
ATTACKS: dict[str, Rewrite] = {family: _worded(of) for family, of in WORDINGS.items()} | {"style": _styled}
"""data.attacks, judge.attacks -> what becomes of a wrong answer."""


def attacked(row: Row, family: str, seed: int) -> Row:
    """The row with its wrong answers attacked; what was thought before one stays with it."""
    new = {
        answer: ATTACKS[family](answer, Random(f"{family} {seed} {row.id} {place}"))
        for place, answer in enumerate(row.rejected)
    }
    thinking = tuple((new.get(answer, answer), thought) for answer, thought in row.thinking)
    return replace(row, rejected=tuple(new[answer] for answer in row.rejected), thinking=thinking)


def families_of(asked: Sequence[str]) -> list[str]:
    """What judge.attacks asks for: each once, "all" being each there is."""
    return list(ATTACKS) if "all" in asked else list(dict.fromkeys(asked))


def attacked_rows(rows: Rows, asked: Sequence[str], seed: int, folder: Path) -> dict[str, Rows]:
    """All rows under each family of judge.attacks, kept in `folder`."""
    families = families_of(asked)
    return {family: keep_rows((attacked(row, family, seed) for row in rows), folder) for family in families}


def attack_share(
    rows: Rows, share: float, families: Sequence[str], seed: int, folder: Path
) -> tuple[Rows, dict[str, int]]:
    """The rows, each with the probability `share` under one of the families, and the number under each.

    A larger share takes the same rows and more.
    """
    counts: Counter[str] = Counter()

    def drawn(row: Row) -> Row:
        rng = Random(f"attack {seed} {row.id}")
        if rng.random() >= share:
            return row
        counts[family := rng.choice(families)] += 1
        return attacked(row, family, seed)

    return keep_rows(map(drawn, rows), folder), counts


# ---- which of them a training saw: what we export says so, that a later run need not guess

SEEN = "attacks_seen.json"  # in a folder of exported weights


def write_seen(folder: Path, families: Sequence[str]) -> None:
    """Say in each of the folders model/ and adapter/ that stand in `folder` which families their training saw."""
    for place in (folder / "model", folder / "adapter"):
        if place.is_dir():
            atomic_write_text(place / SEEN, json.dumps({"families": list(families)}) + "\n")


def read_seen(folders: Sequence[Path]) -> list[str] | None:
    """The families that the trainings of the weights in these folders saw; None, not known, where none was ours."""
    files = [folder / SEEN for folder in folders if (folder / SEEN).is_file()]
    seen: dict[str, None] = {}
    for file in files:
        families = read_json_object(file).get("families")
        if not isinstance(families, list) or not all(isinstance(family, str) for family in families):
            raise UserError(f'{file}: must hold {{"families": ["verdict", ...]}}; it was altered: mend or remove it')
        seen |= dict.fromkeys(families)
    return list(seen) if files else None
