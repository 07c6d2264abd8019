"""What a sweep's verdicts say: every setting, every two of them, every axis, and first what was named before.

    arms.json and a verdicts file an arm, as dpo/sweep.py keeps them -> report.md, report.html, report.json, plots/

It reads nothing else, so `python -m dpo.report FOLDER` makes all of it again. A row is known by its id and where
it came from: of a file it is one row in all seeds, of checkable rows one in those that made the same. No dimension
letters.
Read next: dpo/judge/statistics.py, where intervals and tests come from.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import NotRequired, TypedDict, cast

import numpy as np

from dpo.judge.controls import CONTROLS
from dpo.judge.local import read_verdicts
from dpo.judge.robustness import LOOKS, Success
from dpo.judge.statistics import (
    Floats,
    Verdict,
    averaged_scores,
    consistent_scores,
    holm,
    mcnemar_exact,
    paired_interval,
    rows_by_seeds_bootstrap,
    says_a_scores,
    share_interval,
    sign_flip_p,
    student_p,
    widest,
)
from dpo.page import Block, Page, Plot, Table, Text, to_html, to_markdown
from dpo.plots import Axis, Mark, bars, chart, file_text
from dpo.report_run import NOTES, p_value
from models.errors import UserError
from models.files import atomic_write_text, read_json_object

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of 2, 3, ... 10 seeds; for more seeds the last, which is a little wide."""


READOUTS: dict[str, tuple[str, Callable[[Sequence[Verdict]], Floats]]] = {
    "averaged": ("trained", averaged_scores),
    "consistent": ("trained", consistent_scores),
    "rewards": ("rewards", averaged_scores),
    "likelihood": ("likelihood", averaged_scores),
    "judged sighted": ("sighted", averaged_scores),
    "judged blind": ("blind", averaged_scores),
    "says A": ("trained", says_a_scores),
}
"""By name: which of an arm's judges is read, and a pair's score. All but the last are accuracies."""


Figure = tuple[float, list[float]]
"""A mean and its 95 % interval."""


class KeptArm(TypedDict):
    """A finished arm as arms.json has it."""

    setting: str
    axes: dict[str, object]  # what is its own: by swept key, and "arm", the value
    seed: int
    sighted: bool  # judge.sighted
    verdicts: str  # its file
    rows: str  # where its rows are from: the file's name, or of checkable rows, a seed's own, a hash of the test rows
    source: str  # that of the product it ran under
    config: NotRequired[dict[str, object]]  # its keys that are not the default
    read: NotRequired[dict[str, object]]  # digests of the rows and weights that it was of
    ran: NotRequired[dict[str, object]]  # when, on what, from which commit
    steps: float
    tokens: float  # that training ran forward
    train_s: float
    whole_s: float
    reference_computed: int  # completions that the reference was run on
    attacks: NotRequired[list[Success]]


class Kept(TypedDict):
    """arms.json."""

    name: str
    question: str
    command: str
    contrast: dict[str, str] | None
    primary: NotRequired[str]  # the readout that it is about
    planned: NotRequired[int]  # arms
    arms: list[KeptArm]
    failed: dict[str, int]  # exit codes by arm


Judged = dict[str, list[Verdict]]
"""One run's verdicts, by judge."""

Settings = dict[str, dict[int, Judged]]
"""By setting and seed."""


@dataclass(frozen=True)
class Standing:
    """All runs of one setting, which differ in their seeds alone."""

    setting: str
    seeds: list[int]
    pairs: int  # judged, of all seeds
    figures: dict[str, Figure]  # by readout
    averaged_range: list[float]  # the lowest and the highest of its seeds
    subsets: dict[str, Figure]  # by the readout asked for, where its runs have it


@dataclass(frozen=True)
class Difference:
    """Setting b less setting a on the pairs of the seeds that both have."""

    a: str
    b: str
    readout: str
    seeds: list[int]
    pairs: int
    by_seed: list[float]
    difference: Figure
    p: float  # the largest of McNemar's over pairs, sign flips over groups, Student's over seeds
    p_holm: float = math.nan  # over all differences of the readout

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out 0, and the corrected p is at most .05."""
        low, high = self.difference[1]
        return not low <= 0 <= high and self.p_holm <= 0.05


# --- figures ----------------------------------------------------------------------------------------------------------


def student(means: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean of two or more seeds' means."""
    half = T_975[min(len(means) - 2, len(T_975) - 1)] * stdev(means) / math.sqrt(len(means))
    return [fmean(means) - half, fmean(means) + half]


def mean_of(figures: Sequence[Figure], *, shared: bool = False) -> Figure:
    """The mean of the seeds' figures, with the wider of Student's interval and of the mean of their own.

    That is narrower than theirs by the root of their number, unless the rows of the seeds are `shared`.
    """
    means = [figure[0] for figure in figures]
    mean, root = fmean(means), 1.0 if shared else math.sqrt(len(figures))
    below, above = (fmean(abs(ends[side] - of) for of, ends in figures) / root for side in (0, 1))
    low, high = widest([mean - below, mean + above], *([student(means)] if len(means) > 1 else []))
    return mean, [max(low, 0.0), min(high, 1.0)]


def over_seeds(scores: Sequence[Floats], groups: Sequence[Sequence[str]], *, share: bool) -> Figure:
    """The mean of the seeds' scores, a score a verdict, with the widest of its 95 % intervals.

    These are: over groups of rows, a group's pairs of all seeds together, share_interval's of a `share`, of differences
    paired_interval's; with more than one seed that over rows and seeds, and Student's over the means of the seeds.
    """
    pooled, names = np.concatenate(scores), [name for of in groups for name in of]
    intervals = [share_interval(pooled, names, 0) if share else paired_interval(pooled, names, 0)]
    if len(scores) > 1:
        start, end = student([float(score.mean()) for score in scores])
        low = 0.0 if share else -1.0
        intervals += [[*rows_by_seeds_bootstrap(scores, groups, 0)], [max(low, start), min(1.0, end)]]
    return float(pooled.mean()), widest(*intervals)


def _groups(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.group for verdict in verdicts]


def standing(setting: str, by_seed: Mapping[int, Judged], by_subset: str = "averaged") -> Standing:
    """One setting's figures, by every readout that all its runs have; a readout's also by subset."""
    figures = {}
    for readout, (role, score) in READOUTS.items():
        if all(role in judged for judged in by_seed.values()):
            of = [judged[role] for judged in by_seed.values()]
            figures[readout] = over_seeds([*map(score, of)], [*map(_groups, of)], share=True)
    trained = [judged["trained"] for judged in by_seed.values()]
    means = [float(averaged_scores(of).mean()) for of in trained]
    subsets = {}
    role, score = READOUTS[by_subset]
    read = [judged.get(role, []) for judged in by_seed.values()] if by_subset in figures else []
    for name in sorted({verdict.subset for of in read for verdict in of}):
        parts = [part for of in read if (part := [verdict for verdict in of if verdict.subset == name])]
        subsets[name] = over_seeds([*map(score, parts)], [*map(_groups, parts)], share=True)
    return Standing(setting, list(by_seed), sum(map(len, trained)), figures, [min(means), max(means)], subsets)


def difference(settings: Settings, a: str, b: str, readout: str) -> Difference | None:
    """b less a on the same pairs of the same seeds; None without any."""
    role, score = READOUTS[readout]
    leads: list[Floats] = []
    groups: list[list[str]] = []
    seeds = []
    for seed in (seed for seed in settings[a] if seed in settings[b]):
        by_pair, of_b = ({(v.id, v.pair, v.group): v for v in settings[name][seed].get(role, [])} for name in (a, b))
        one, other = ([of[pair] for pair in by_pair if pair in of_b] for of in (by_pair, of_b))
        if one:
            leads.append(score(other) - score(one))
            groups.append(_groups(one))
            seeds.append(seed)
    if not seeds:
        return None
    pooled, means = np.concatenate(leads), [float(lead.mean()) for lead in leads]
    tests = [mcnemar_exact(int((pooled > 0).sum()), int((pooled < 0).sum()))]
    tests.append(sign_flip_p(pooled, [name for of in groups for name in of], 0))
    # The spread of few seeds may be small by chance; their rows alone make one, Bonett and Price's pairs among them.
    variances = [float(np.var([*lead, 1.0, -1.0])) / len(lead) for lead in leads]
    tests += [student_p(means, math.sqrt(fmean(variances)))] if len(means) > 1 else []
    return Difference(a, b, readout, seeds, len(pooled), means, over_seeds(leads, groups, share=False), max(tests))


def differences(settings: Settings) -> list[Difference]:
    """Every two settings by every readout, in this order, corrected by Holm within the readout."""
    found = []
    for readout in READOUTS:
        pairs = combinations(settings, 2)
        of = [one for a, b in pairs if (one := difference(settings, a, b, readout))]
        corrected = holm([one.p for one in of])
        found += [replace(one, p_holm=p) for one, p in zip(of, corrected, strict=True)]
    return found


# --- from files -------------------------------------------------------------------------------------------------------


def read_kept(folder: Path) -> tuple[Kept, Settings]:
    """arms.json, and the verdicts by setting and seed; what judged before training is the setting "base".

    UserError for what is missing or damaged. Where the arms' bases differ, each is named by the first of its settings.
    """
    kept = cast(Kept, read_json_object(folder / "arms.json"))
    both = len({arm["sighted"] for arm in kept["arms"]}) > 1
    bases: Settings = {}
    settings: Settings = {}
    for arm in kept["arms"]:
        judged = {
            role: [replace(verdict, group=f"{arm['rows']} {verdict.group}") for verdict in of]
            for role, of in read_verdicts(folder / arm["verdicts"]).items()
        }
        if both:
            judged["sighted" if arm["sighted"] else "blind"] = judged["trained"]
        settings.setdefault(arm["setting"], {})[arm["seed"]] = judged
    role_of = {"base": "trained", "base likelihood": "likelihood", "longer answer": "longer answer"}
    for setting, by_seed in settings.items():
        own = {seed: {role_of[role]: of[role] for role in role_of if role in of} for seed, of in by_seed.items()}
        shared = ((of, own.keys() & of.keys()) for of in bases.values())
        same = next((of for of, seeds in shared if seeds and all(of[seed] == own[seed] for seed in seeds)), None)
        if same is None:
            bases[f"base of {setting}"] = own
        else:
            same.update(own)
    if len(bases) == 1:
        bases = {"base": next(iter(bases.values()))}
    return kept, bases | settings


def contrast_of(kept: Kept, settings: Settings) -> tuple[Difference, float] | None:
    """The comparison named before, as b less a, and the p of its sign-flip test over seeds; None where it has none."""
    named = kept["contrast"]
    if not named or not {named["a"], named["b"]} <= set(settings):
        return None
    found = difference(settings, named["b"], named["a"], named["readout"])
    return (found, sign_flip_p(found.by_seed, [str(seed) for seed in found.seeds], 0)) if found else None


# --- the page ---------------------------------------------------------------------------------------------------------


def _percent(figure: Figure, sign: str = "") -> str:
    mean, *ends = (f"{100 * share:{sign}z.1f}" for share in (figure[0], *figure[1]))
    return f"{mean} [{', '.join(ends)}]"


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
    text = NOTES["sweep"]["settings"]
    shares = {one.setting: [one.figures.get(readout) for readout in shown] for one in standings}
    title = "Every setting"
    return [Plot("settings", title, bars(title, shares, shown)), Table(title, rows), Text("paragraph", text)]


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
    names = [name for name in CONTROLS if any(name in of for of in told.values())]
    rows = [("order-averaged, lead over", *names)]
    rows += [(setting, *(of.get(name, "") for name in names)) for setting, of in told.items()]
    return [Table("Controls", rows), Text("paragraph", NOTES["sweep"]["controls"])] if names else []


def _differences(found: Sequence[Difference]) -> list[Block]:
    shown = list(dict.fromkeys(one.readout for one in found))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for one in found:
        p = f"p {p_value(one.p)}, corrected {p_value(one.p_holm)}"
        told = f"{_percent(one.difference, '+')}, {p}{'' if one.resolved else ': not resolved'}"
        cells.setdefault((one.b, one.a), {})[one.readout] = told
    rows = [("difference", *shown)]
    rows += [(f"{b} less {a}", *(of.get(readout, "") for readout in shown)) for (b, a), of in cells.items()]
    return [Table("Every two settings", rows), Text("paragraph", NOTES["sweep"]["differences"])]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


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
                lines.setdefault(rest or readout, []).append((_number(axes[axis]), setting))
        places = {place for line in lines.values() for place, _ in line}
        if len(places) < 2 or any(math.isnan(place) for place in places):
            continue  # words: their settings stand in the bars
        log = min(places) > 0 and max(places) >= 8 * min(places)
        marks = []
        for tone, (name, line) in enumerate(lines.items()):
            x, names = zip(*sorted(line), strict=True)
            y, whiskers = zip(*(figures[one] for one in names), strict=True)
            marks.append(Mark(name, x, y, tone, "joined", whiskers))
            if log and len(x) > 2:
                slopes = _slopes(x, [settings[name] for name in names], readout)
                if len(slopes) > 1:
                    told = _percent((fmean(slopes), student(slopes)), "+")
                    blocks.append(Text("paragraph", f"{name}: {told} points of {readout} a doubling of {axis}."))
        title = f"{axis}: {readout}"
        svg = chart(title, Axis(axis, log=log, ticks=sorted(places)), Axis(readout, percent=True), marks)
        blocks.insert(0, Plot(axis.replace(".", "-"), title, svg))
    return blocks


def _slopes(x: Sequence[float], line: Sequence[Mapping[int, Judged]], readout: str) -> list[float]:
    """The least-squares slope of the means over log2 x, of each seed that all settings of the line have."""
    role, score = READOUTS[readout]
    seeds = [seed for seed in line[0] if all(seed in by_seed for by_seed in line)]
    means = [[float(score(by_seed[seed][role]).mean()) for by_seed in line] for seed in seeds]
    return [float(np.polyfit(np.log2(x), of_seed, 1)[0]) for of_seed in means]


def _attacks(kept: Kept) -> list[Block]:
    """How often each attack wins over the trained judges of a setting, and did before: the means of its seeds."""
    shared = len({arm["seed"] for arm in kept["arms"]}) > 1 and len({arm["rows"] for arm in kept["arms"]}) == 1

    def won(role: str) -> dict[str, dict[str, str]]:  # by setting and attack
        shares: dict[str, dict[str, list[Figure]]] = {}
        for arm in kept["arms"]:
            for of in arm.get("attacks", []):
                if of["judge"] == role:
                    by_name = shares.setdefault(arm["setting"], {})
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
    names = list(dict.fromkeys(of["attack"] for arm in kept["arms"] for of in arm.get("attacks", [])))
    rows = [("setting", *names)]
    rows += [(who, *(of.get(name, "") for name in names)) for who, of in [*told.items(), *won("trained").items()]]
    return [Table("Attacks on the judges", rows), Text("paragraph", NOTES["sweep"]["attacks"])] if names else []


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
    standings = [standing(name, by_seed, readout) for name, by_seed in settings.items()]
    found = differences(settings)
    subsets = list(dict.fromkeys(name for one in standings for name in one.subsets))
    by_subset = [("setting", *subsets)]
    for one in standings:
        by_subset.append((one.setting, *(_percent(one.subsets[s]) if s in one.subsets else "" for s in subsets)))
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
        "Differences": _differences(found) if found else [],
        "Controls": _controls({arm["setting"]: settings[arm["setting"]] for arm in kept["arms"]}),
        "Axes": _axes(kept, settings, standings, readout),
        f"By subset: {readout}": [Table("By subset", by_subset)] if len(subsets) > 1 else [],
        "Attacks": _attacks(kept),
        "Cost": _costs(kept),
    }
    contrast = named and asdict(named[0]) | {"p_seeds": named[1]}
    if contrast:
        del contrast["p_holm"]  # it is one, and is not corrected
    figures: dict[str, object] = {
        "contrast": contrast,
        "settings": [asdict(one) for one in standings],
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
