"""A page of blocks, written as GitHub-flavoured markdown and as one HTML file that needs no other.

    Page -> to_markdown; Page + page.html + page.css + page.js -> to_html

Whatever came from rows, names or commands is text here: escaped, with marks that turn or hide text spelled out, and the
HTML's own policy lets no script run but page.js. No dimension letters. Read next: dpo/page.html.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from dpo.escape import escaped, visible
from dpo.plots import STYLE

MARKS = {"win": "✓", "loss": "✗", "tie": "⇄", "invalid": "–"}
SAYS = {"win": "right", "loss": "wrong", "tie": "flips", "invalid": "no verdict"}


@dataclass(frozen=True)
class Text:
    """One line of text; a `command` may have several."""

    kind: Literal["verdict", "paragraph", "command"]
    text: str


@dataclass(frozen=True)
class Table:
    """The first row is the header; the first column holds names, the others figures."""

    caption: str
    rows: Sequence[tuple[str, ...]]
    cases: Sequence[int] = ()  # of a list, which is closed until it is opened: each row's case, from 1, 0 for none


@dataclass(frozen=True)
class Plot:
    """`name` is that of its file in plots/."""

    name: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Case:
    """One judged pair with its texts; `outcomes` and `odds` (nats for the chosen answer: first, second) by judge."""

    id: str
    subset: str
    outcomes: Mapping[str, str]
    odds: Mapping[str, tuple[float, float]]
    why: Sequence[str]
    texts: Mapping[str, str]  # by heading, or nothing where they are not to be had

    @property
    def log_odds(self) -> Table:
        """The odds, and their average."""
        rows: list[tuple[str, ...]] = [("judge", "chosen first", "chosen second", "averaged")]
        rows += [(name, *(f"{nats:+.2f}" for nats in (*of, sum(of) / 2))) for name, of in self.odds.items()]
        return Table("Log-odds of the chosen answer (nats)", rows)


@dataclass(frozen=True)
class Cases:
    """The pairs to read; in markdown only that they are there."""

    cases: Sequence[Case]


Block = Text | Table | Plot | Cases


@dataclass(frozen=True)
class Page:
    title: str
    lead: Sequence[Text]
    sections: Mapping[str, Sequence[Block]]


# --- markdown -------------------------------------------------------------------------------------------------------


def to_markdown(page: Page) -> str:
    """The page as GitHub-flavoured markdown; its plots are files in plots/."""
    headed: list[tuple[str, Sequence[Block]]] = [(f"# {_escaped(page.title)}", page.lead)]
    headed += [(f"## {_escaped(name)}", blocks) for name, blocks in page.sections.items()]
    return "\n".join("\n\n".join((head, *map(_markdown, blocks))) + "\n" for head, blocks in headed)


def _markdown(block: Block) -> str:
    match block:
        case Table() if block.cases:
            return f"{_escaped(block.caption)}: row by row in report.html."
        case Table():
            cells = [[_escaped(cell) for cell in row] for row in block.rows]
            widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
            rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            header, *rows = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
            return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
        case Plot():
            return f"![{_escaped(block.alt)}](plots/{block.name}.svg)"
        case Cases():
            return f"{len(block.cases):,} of them, with what they say, stand in report.html."
        case Text(kind="command"):
            return "\n".join(f"    {line}" for line in visible(block.text).splitlines())
        case _:
            return f"**{_escaped(block.text)}**" if block.kind == "verdict" else _escaped(block.text)


def _escaped(text: str) -> str:
    """Any text as one line of plain markdown; a bracket is only escaped where it would begin a link's target."""
    text = " ".join(visible(text).split())
    return re.sub(r"[\\`*|~$&]|<(?=[A-Za-z/!?])|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


# --- HTML -----------------------------------------------------------------------------------------------------------


def to_html(page: Page) -> str:
    """The page as one file that opens from disk; it reads whole without its script, which only filters the rows."""
    html, style, script = (
        Path(__file__).with_name(f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return JINJA.from_string(html).render(
        page=page, style=STYLE + style, script=script, digest=digest, marks=MARKS, says=SAYS
    )


def _kept(cell: str) -> str:
    """Escaped; no line ends within an interval, or between a figure and its unit."""
    return re.sub(r"(?<=\d) (?=[%p])|(?<=\d,) (?=\S+\])|(?<=\bp) (?=[&=\d])|(?<=&lt;) (?=\d)", "\xa0", escaped(cell))


JINJA = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
JINJA.filters |= {"e": escaped, "kept": _kept}
JINJA.globals |= {"enumerate": enumerate}
JINJA.tests |= {
    "table": lambda block: isinstance(block, Table),
    "plot": lambda block: isinstance(block, Plot),
    "cases": lambda block: isinstance(block, Cases),
}
