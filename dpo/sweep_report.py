"""The page of a sweep: every setting, every two of them, every axis, and first what was named before.

    arms.json and a verdicts file an arm, as dpo/sweep.py keeps them -> report.md, report.html, report.json, plots/

It reads nothing else, so `python -m dpo.report FOLDER` makes all of it again. No dimension letters.
Read next: dpo/sweep_figures.py, where the figures come from.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np

from dpo.judge.controls import CONTROLS
from dpo.judge.robustness import LOOKS
from dpo.judge.statistics import Floats
from dpo.page import Block, Page, Plot, Table, Text, to_html, to_markdown
from dpo.plots import Axis, Mark, bars, chart, file_text
from dpo.report_run import NOTES, p_value
from dpo.sweep_figures import (
    READOUTS,
    Difference,
    Figure,
    Judged,
    Kept,
    Settings,
    Standing,
    attacks_of,
    by_subset,
    contrast_of,
    difference,
    differences,
    mean_of,
    over_seeds,
    read_kept,
    slope,
    standing,
)
from models.errors import UserError
from models.files import atomic_write_text

# --- the page ---------------------------------------------------------------------------------------------------------


def _percent(figure: Figure, sign: str = "") -> str:
    mean, *ends = (f"{100 * share:{sign}z.1f}" for share in (figure[0], *figure[1]))
    return f"{mean} [{', '.join(ends)}]"


def _matrix(
    title: str, corner: str, cells: Mapping[str, Mapping[str, str]], note: str, order: Iterable[str] = ()
) -> list[Block]:
    """A table of what each row says of each column, and its note; neither without any column."""
    said = dict.fromkeys(name for of in cells.values() for name in of)
    names = sorted(said, key=[*order, *said].index)
    rows = [(corner, *names), *((row, *(of.get(name, "") for name in names)) for row, of in cells.items())]
    return [Table(title, rows), *([Text("paragraph", NOTES["sweep"][note])] if note else [])] if names else []


def _contrast(kept: Kept, found: tuple[Difference, float] | None) -> str:
    named = kept["contrast"]
    if not named:
        return "No comparison was named before the runs: all of this is exploratory."
    told = f"Named before the runs: {named['a']} less {named['b']}, {named['readout']}"
    if found is None:
        return f"{told}: not told, for not both have arms that finished with it."
    of, p = found
    told_p = p_value(p) if p < 1e-4 else f"= {p_value(p)}"
    verdict = "resolved" if p <= 0.01 and not of.difference[1][0] <= 0 <= of.difference[1][1] else "not resolved"
    if kept.get("planned", 0) > len(kept["arms"]):
        verdict = f"so far {verdict}"
    return (
        f"{told}: {_percent(of.difference, '+')} points over {len(of.seeds)} paired seeds, {of.pairs:,} judged pairs; "
        f"sign-flip test over the seeds p {told_p}: {verdict} (at .01)."
    )


def _prefers_longer(judged: Judged, role: str) -> tuple[Floats, list[str]]:
    """1 for each pair of which the judge prefers the clearly longer answer and 0 of the others, and their groups."""
    lead = {(of.id, of.pair): of.first for of in judged.get("longer answer", [])}
    of_pairs = [(of.first - of.second, lead.get((of.id, of.pair), 0.0), of.group) for of in judged.get(role, [])]
    told = [
        (odds * longer > 0, group)
        for odds, longer, group in of_pairs
        if abs(longer) > LOOKS["longer"][1] and abs(odds) > 0
    ]
    return np.array([float(prefers) for prefers, _ in told]), [group for _, group in told]


def _standings(standings: Sequence[Standing], settings: Settings, role: str) -> list[Block]:
    shown = [readout for readout in READOUTS if any(readout in one.figures for one in standings)]
    rows = [("setting", "seeds", "pairs", *shown, "averaged, its seeds", "prefers the longer")]
    for one in standings:
        figures = [_percent(one.figures[readout]) if readout in one.figures else "" for readout in shown]
        seeds = " to ".join(f"{100 * share:.1f}" for share in one.averaged_range)
        liked = [_prefers_longer(judged, role) for judged in settings[one.setting].values()]
        told = _percent(over_seeds(*zip(*liked, strict=True), share=True)) if all(len(of) for of, _ in liked) else ""
        rows.append((one.setting, ", ".join(map(str, one.seeds)), f"{one.pairs:,}", *figures, seeds, told))
    shares = {one.setting: [one.figures.get(readout) for readout in shown] for one in standings}
    title = "Every setting"
    plot = Plot("settings", title, bars(title, shares, shown))
    return [plot, Table(title, rows), Text("paragraph", NOTES["sweep"]["settings"])]


def _subsets(figures: Mapping[str, Mapping[str, Figure]]) -> list[Block]:
    told = {setting: {name: _percent(one) for name, one in of.items()} for setting, of in figures.items() if of}
    return _matrix("By subset", "setting", told, "") if len({name for of in told.values() for name in of}) > 1 else []


def _controls(settings: Settings) -> list[Block]:
    """Every setting's lead over each control that all its runs have."""
    told: dict[str, dict[str, str]] = {}
    for setting, by_seed in settings.items():
        for name in CONTROLS:
            of = {seed: {"trained": judged.get(name, [])} for seed, judged in by_seed.items()}
            own = any(judged.get(name) is judged["trained"] for judged in by_seed.values())  # a judge of blind training
            lead = None if own else difference({name: of, setting: by_seed}, name, setting, "averaged")
            if lead and len(lead.seeds) == len(by_seed):
                told.setdefault(setting, {})[name] = _percent(lead.difference, "+")
    return _matrix("Controls", "order-averaged, lead over", told, "controls", CONTROLS)


def _differences(found: Sequence[Difference]) -> list[Block]:
    cells: dict[str, dict[str, str]] = {}
    for one in found:
        p = f"p {p_value(one.p)}, corrected {p_value(one.p_holm)}"
        told = f"{_percent(one.difference, '+')}, {p}{'' if one.resolved else ': not resolved'}"
        cells.setdefault(f"{one.b} less {one.a}", {})[one.readout] = told
    return _matrix("Every two settings", "difference", cells, "differences", READOUTS)


def _axes(kept: Kept, settings: Settings, standings: Sequence[Standing], readout: str) -> list[Block]:
    """A plot for each swept number, a line for each setting of the rest; along a long axis also the slope."""
    of_arm = {arm["setting"]: arm["axes"] for arm in kept["arms"]}
    figures = {one.setting: one.figures[readout] for one in standings if readout in one.figures}
    blocks: list[Block] = []
    for axis in dict.fromkeys(key for axes in of_arm.values() for key in axes if key != "seed"):
        lines: dict[str, list[tuple[float, str]]] = {}
        for setting, axes in of_arm.items():
            rest = ", ".join(f"{key}={value}" for key, value in axes.items() if key not in (axis, "seed"))
            if setting in figures and axis in axes:
                value = axes[axis]
                number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
                lines.setdefault(rest or readout, []).append((number, setting))
        places = {place for line in lines.values() for place, _ in line}
        if len(places) < 2 or any(math.isnan(place) for place in places):
            continue  # words: their settings stand in the bars
        log = min(places) > 0 and max(places) >= 8 * min(places)
        marks = []
        for tone, (name, line) in enumerate(lines.items()):
            x, names = zip(*sorted(line), strict=True)
            y, whiskers = zip(*(figures[one] for one in names), strict=True)
            marks.append(Mark(name, x, y, tone, "joined", whiskers))
        if log:
            of_line = {name: {place: settings[one] for place, one in line} for name, line in lines.items()}
            blocks += _slopes(axis, readout, of_line)
        title = f"{axis}: {readout}"
        svg = chart(title, Axis(axis, log=log, ticks=sorted(places)), Axis(readout, percent=True), marks)
        blocks.insert(0, Plot(axis.replace(".", "-"), title, svg))
    return blocks


def _slopes(axis: str, readout: str, lines: Mapping[str, Mapping[float, Mapping[int, Judged]]]) -> list[Block]:
    """The slope of every line from each place on that leaves three, and of every two lines what they differ by."""
    places = sorted({place for line in lines.values() for place in line})
    starts = [place for place in places if any(sum(x >= place for x in line) > 2 for line in lines.values())]

    def told(name: str, start: float, less: str = "") -> str:
        x = sorted(place for place in lines[name] if place >= start and place in lines[less or name])
        of, other = ([lines[line][place] for place in x] if line else [] for line in (name, less))
        return _percent(found, "+") if len(x) > 2 and (found := slope(x, of, readout, other)) else ""

    title = f"points of {readout} a doubling of {axis}"
    rows = [(title, *(f"from {start:g} on" for start in starts))]
    rows += [(name, *(told(name, start) for start in starts)) for name in lines]
    rows += [(f"{b} less {a}", *(told(b, start, a) for start in starts)) for a, b in combinations(lines, 2)]
    if not any(cell for _, *cells in rows[1:] for cell in cells):
        return []
    return [Table(title[0].upper() + title[1:], rows), Text("paragraph", NOTES["sweep"]["slopes"])]


def _attacks(kept: Kept, settings: Settings) -> list[Block]:
    """How often each attack wins over the trained judges of a setting, and did before: the means of its seeds."""
    shared = len({arm["seed"] for arm in kept["arms"]}) > 1 and len({arm["rows"] for arm in kept["arms"]}) == 1
    found = [(arm["setting"], of) for arm in kept["arms"] for of in attacks_of(arm, settings)]

    def won(role: str) -> dict[str, dict[str, str]]:  # by setting and attack
        shares: dict[str, dict[str, list[Figure]]] = {}
        for setting, of in found:
            if of["judge"] == role:
                by_name = shares.setdefault(setting, {})
                by_name.setdefault(of["attack"], []).append((of["wins"] / of["n"], of["interval"]))
        return {
            setting: {name: _percent(mean_of(of, shared=shared)) for name, of in by_name.items()}
            for setting, by_name in shares.items()
        }

    bases: dict[str, dict[str, str]] = {}  # where two have no other figure, one, by the name of its first setting
    for setting, cells in won("base").items():
        alike = (of for of, known in bases.items() if all(known[name] == cells[name] for name in known.keys() & cells))
        first = next(alike, setting)
        bases[first] = bases.get(first, {}) | cells
    told = {"base" if len(bases) == 1 else f"base of {setting}": cells for setting, cells in bases.items()}
    return _matrix("Attacks on the judges", "setting", told | won("trained"), "attacks")


def _costs(kept: Kept) -> list[Block]:
    rows: list[tuple[str, ...]] = [
        ("setting", "arms", "steps", "tokens forward in training", "training, s", "all, s", "reference runs")
    ]
    for setting in dict.fromkeys(arm["setting"] for arm in kept["arms"]):
        of = [arm for arm in kept["arms"] if arm["setting"] == setting]
        means = [fmean(arm[key] for arm in of) for key in ("steps", "tokens", "train_s", "whole_s")]  # type: ignore[literal-required]
        computed = sum(arm["reference_computed"] for arm in of)
        rows.append((setting, str(len(of)), *(f"{mean:,.0f}" for mean in means), f"{computed:,}"))
    return [Table("What the arms took", rows), Text("paragraph", NOTES["sweep"]["costs"])]


def sweep_page(kept: Kept, settings: Settings) -> tuple[Page, dict[str, object]]:
    """The page, and its figures for report.json."""
    readout = kept.get("primary") or (kept["contrast"] or {"readout": "averaged"})["readout"]
    standings = [standing(name, by_seed) for name, by_seed in settings.items()]
    found = differences(settings)
    told = dict.fromkeys([readout, "judged sighted", "judged blind"])  # the last two of runs that have them
    subsets = {name: {setting: by_subset(of, name) for setting, of in settings.items()} for name in told}
    sources = {arm["source"] for arm in kept["arms"]}
    named = contrast_of(kept, settings)
    lead = [Text("paragraph", kept["question"]), Text("verdict", _contrast(kept, named))]
    lead += [Text("command", kept["command"])] if kept["command"] else []
    if (planned := kept.get("planned", 0)) > len(kept["arms"]):
        lead.append(Text("paragraph", f"Interim: {len(kept['arms'])} of {planned} arms have finished."))
    lead += [Text("paragraph", f"{name} failed with exit code {code}.") for name, code in kept["failed"].items()]
    if len(sources) > 1:
        lead.append(Text("paragraph", f"The arms were run by {len(sources)} versions of the product."))
    sections: dict[str, Sequence[Block]] = {
        "Settings": _standings(standings, settings, READOUTS[readout][0] if readout == "rewards" else "trained"),
        "Differences": _differences(found),
        "Controls": _controls({arm["setting"]: settings[arm["setting"]] for arm in kept["arms"]}),
        "Axes": _axes(kept, settings, standings, readout),
        **{f"By subset: {name}": _subsets(of) for name, of in subsets.items()},
        "Attacks": _attacks(kept, settings),
        "Cost": _costs(kept),
    }
    contrast = named and asdict(named[0]) | {"p_seeds": named[1]}
    if contrast:
        del contrast["p_holm"]  # it is one, and is not corrected
    figures: dict[str, object] = {
        "contrast": contrast,
        "settings": [asdict(one) | {"subsets": subsets[readout][one.setting]} for one in standings],
        "differences": [{**asdict(one), "resolved": one.resolved} for one in found],
    }
    return Page(kept["name"], lead, {name: blocks for name, blocks in sections.items() if blocks}), figures


def write_sweep_report(folder: Path) -> str:
    """Write report.md, .html, .json and plots/*.svg from what is kept there; the text of report.md."""
    try:
        page, figures = sweep_page(*read_kept(folder))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'arms.json'}: not as a sweep keeps it ({error!r}); the file was altered") from error
    for block in (block for blocks in page.sections.values() for block in blocks if isinstance(block, Plot)):
        atomic_write_text(folder / "plots" / f"{block.name}.svg", file_text(block.svg))
    text = to_markdown(page)
    atomic_write_text(folder / "report.md", text)
    atomic_write_text(folder / "report.html", to_html(page))
    atomic_write_text(folder / "report.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return text
