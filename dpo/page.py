"""A page of blocks, written as GitHub-flavoured markdown and as one HTML file that needs no other.

    Page -> to_markdown; Page + page.css + page.js -> to_html

Whatever came from rows, names or commands is text here: escaped, with marks that turn or hide text spelled out, and the
HTML's own policy lets no script run but page.js. No dimension letters. Read next: dpo/page.js.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    sections = (f"## {_escaped(name)}\n\n{markdown(blocks)}" for name, blocks in page.sections.items())
    return "\n".join([f"# {_escaped(page.title)}\n\n{markdown(page.lead)}", *sections])


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks, one after another."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


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
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    places = {name: f"section-{number}" for number, name in enumerate(page.sections, 1)}
    links = "".join(
        f'<li><a href="#{place}">{escaped(name.partition(":")[0])}</a></li>' for name, place in places.items()
    )
    sections = "\n".join(
        f'<section aria-labelledby="{places[name]}">\n<h2 id="{places[name]}">{escaped(name)}</h2>\n{_html(blocks)}\n'
        "</section>"
        for name, blocks in page.sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy};">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(page.title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the figures</a>\n<header>\n<h1>{escaped(page.title)}</h1>\n'
        f'{_html(page.lead)}\n</header>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="main">\n{sections}\n</main>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _html(blocks: Sequence[Block]) -> str:
    """Blocks one after another; plots that follow each other stand side by side where there is room."""
    parts = []
    for before, block in zip((None, *blocks), blocks, strict=False):
        if isinstance(block, Plot) != isinstance(before, Plot):
            parts.append('<div class="plots">' if isinstance(block, Plot) else "</div>" if before else "")
        parts.append(_block(block))
    return "\n".join([*parts, "</div>" if blocks and isinstance(blocks[-1], Plot) else ""])


def _block(block: Block) -> str:
    match block:
        case Table():
            header, *rows = block.rows
            head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
            body = "\n".join(
                f'<tr><th scope="row">{_link(name, case)}</th>{"".join(f"<td>{_kept(of)}</td>" for of in cells)}</tr>'
                for (name, *cells), case in zip(rows, block.cases or [0] * len(rows), strict=True)
            )
            table = (
                f'<div class="wide" role="region" tabindex="0" aria-label="{escaped(block.caption)}"><table>'
                f"<caption>{escaped(block.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
                f"<tbody>\n{body}\n</tbody></table></div>"
            )
            closed = f'<details class="list"><summary>{escaped(block.caption)}</summary>{table}</details>'
            return closed if block.cases else table
        case Plot():
            return f"<figure>{block.svg}</figure>"
        case Cases():
            return _cases(block.cases)
        case Text(kind="command"):
            return f'<pre tabindex="0"><code>{escaped(block.text)}</code></pre>'
        case _:
            return f'<p class="{block.kind}">{escaped(block.text)}</p>'


def _kept(cell: str) -> str:
    """Escaped; no line ends within an interval, or between a figure and its unit."""
    return re.sub(r"(?<=\d) (?=[%p])|(?<=\d,) (?=\S+\])|(?<=\bp) (?=[&=\d])|(?<=&lt;) (?=\d)", "\xa0", escaped(cell))


def _link(name: str, case: int) -> str:
    return f'<a href="#case-{case}">{escaped(name)}</a>' if case else escaped(name)


def _cases(cases: Sequence[Case]) -> str:
    """The pairs, each closed until it is opened, and the filters over them, which are hidden without the script."""
    subsets = sorted({case.subset for case in cases})
    judges = list(dict.fromkeys(name for case in cases for name in case.outcomes))
    whys = list(dict.fromkeys(why for case in cases for why in case.why))
    choices: dict[str, tuple[str, str, Mapping[int, str] | Mapping[str, str]]] = {
        "why": ("Show", "all", dict(enumerate(whys))),
        "subset": ("Subset", "all", dict(enumerate(subsets))),
        "judge": ("Judge", "any", dict(enumerate(judges))),
        "outcome": ("Outcome", "any", SAYS),
    }
    filters = ""
    for name, (label, all_of_them, options) in choices.items():
        listed = "".join(f'<option value="{value}">{escaped(shown)}</option>' for value, shown in options.items())
        filters += (
            f'<label>{label} <select id="{name}"><option value="">{all_of_them}</option>{listed}</select></label>'
        )
    listed = "\n".join(_case(number, case, subsets, judges, whys) for number, case in enumerate(cases, 1))
    return (
        f'<form class="filters" id="filters" hidden>{filters}</form>\n<p id="shown" role="status"></p>\n'
        f'<div id="cases">\n{listed}\n</div>'
    )


def _case(number: int, case: Case, subsets: Sequence[str], judges: Sequence[str], whys: Sequence[str]) -> str:
    said = " ".join(case.outcomes.get(name, "none") for name in judges)
    why = " ".join(str(whys.index(one)) for one in case.why)
    chips = "".join(
        f' <span class="chip {outcome}">{MARKS[outcome]} <bdi>{escaped(name)}</bdi> {SAYS[outcome]}</span>'
        for name, outcome in case.outcomes.items()
    )
    odds: list[tuple[str, ...]] = [("judge", "chosen first", "chosen second", "averaged")]
    odds += [(name, *(f"{nats:+.2f}" for nats in (*of, sum(of) / 2))) for name, of in case.odds.items()]
    texts = "".join(
        f'<div><h3>{escaped(name)}</h3><div class="text" dir="auto" tabindex="0" role="group" '
        f'aria-label="{escaped(name)}">{escaped(text)}</div></div>'
        for name, text in case.texts.items()
    )
    return (
        f'<details id="case-{number}" data-subset="{subsets.index(case.subset)}" data-said="{said}" data-why="{why}">'
        f'<summary><bdi>{escaped(case.subset)}</bdi> · <bdi class="id">{escaped(case.id)}</bdi>{chips}</summary>\n'
        f'<ul>{"".join(f"<li>{escaped(why)}</li>" for why in case.why)}</ul><div class="texts">{texts}</div>\n'
        f"{_block(Table('Log-odds of the chosen answer (nats)', odds))}</details>"
    )
