"""What a sweep's verdicts say in figures: every setting's, the differences of any two, slopes along an axis.

    arms.json and a verdicts file an arm, as dpo/sweep.py keeps them -> settings -> standings, differences, slopes

A row is known by its id and where it came from: of a file it is one row in all seeds, of checkable rows one in those
that made the same. No dimension letters. Read next: dpo/judge/statistics.py, where intervals and tests come from.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import NotRequired, TypedDict, cast

import numpy as np

from dpo.judge.local import read_verdicts
from dpo.judge.robustness import Success, successes
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
from models.files import read_json_object

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
    attacks: NotRequired[list[Success]]  # which of them training saw; an older version kept these, and no verdicts


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

Line = Sequence[Mapping[int, Judged]]
"""The settings along an axis, by seed."""


@dataclass(frozen=True)
class Standing:
    """All runs of one setting, which differ in their seeds alone."""

    setting: str
    seeds: list[int]
    pairs: int  # judged, of all seeds
    figures: dict[str, Figure]  # by readout
    averaged_range: list[float]  # the lowest and the highest of its seeds


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


def standing(setting: str, by_seed: Mapping[int, Judged]) -> Standing:
    """One setting's figures, by every readout that all its runs have."""
    figures = {}
    for readout, (role, score) in READOUTS.items():
        if all(role in judged for judged in by_seed.values()):
            of = [judged[role] for judged in by_seed.values()]
            figures[readout] = over_seeds([*map(score, of)], [*map(_groups, of)], share=True)
    trained = [judged["trained"] for judged in by_seed.values()]
    means = [float(averaged_scores(of).mean()) for of in trained]
    return Standing(setting, list(by_seed), sum(map(len, trained)), figures, [min(means), max(means)])


def by_subset(by_seed: Mapping[int, Judged], readout: str) -> dict[str, Figure]:
    """One setting's figure by subset; none where not all its runs have the readout."""
    role, score = READOUTS[readout]
    read = [judged[role] for judged in by_seed.values()] if all(role in of for of in by_seed.values()) else []
    figures = {}
    for name in sorted({verdict.subset for of in read for verdict in of}):
        parts = [part for of in read if (part := [verdict for verdict in of if verdict.subset == name])]
        figures[name] = over_seeds([*map(score, parts)], [*map(_groups, parts)], share=True)
    return figures


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
        of = [one for a, b in combinations(settings, 2) if (one := difference(settings, a, b, readout))]
        corrected = holm([one.p for one in of])
        found += [replace(one, p_holm=p) for one, p in zip(of, corrected, strict=True)]
    return found


def slope(x: Sequence[float], line: Line, readout: str, less: Line = ()) -> Figure | None:
    """The least-squares slope of a readout over log2 x, a share a doubling, or that less the slope of another line.

    `line`: the settings at these x. Read pair by pair, of the pairs of each seed that all settings have, so that its
    interval is over rows and seeds as a difference's is; None of fewer than two seeds.
    """
    role, score = READOUTS[readout]
    centred = np.log2(x) - np.mean(np.log2(x))
    weights = centred / (centred**2).sum()
    weights = np.concatenate([weights, -weights]) if less else weights
    reach = float(np.abs(weights).sum()) / 2  # of scores from 0 to 1
    settings = [*line, *less]
    slopes: list[Floats] = []
    groups: list[list[str]] = []
    for seed in (seed for seed in settings[0] if all(seed in by_seed for by_seed in settings)):
        by_pair = [{(v.id, v.pair, v.group): v for v in by_seed[seed].get(role, [])} for by_seed in settings]
        pairs = [pair for pair in by_pair[0] if all(pair in of for of in by_pair)]
        if pairs:
            scores = [score([of[pair] for pair in pairs]) for of in by_pair]
            slopes.append(weights @ np.array(scores) / reach)
            groups.append([group for _, _, group in pairs])
    if len(slopes) < 2:
        return None
    mean, interval = over_seeds(slopes, groups, share=False)
    return reach * mean, [reach * end for end in interval]


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
    return kept, ({"base": next(iter(bases.values()))} if len(bases) == 1 else bases) | settings


def attacks_of(arm: KeptArm, settings: Settings) -> list[Success]:
    """How often attacks won over the arm's judges, by their verdicts; of an older version's by the counts it kept."""
    judged, counts = settings[arm["setting"]][arm["seed"]], arm.get("attacks", [])
    seen = [of["attack"] for of in counts if of["trained_on"]]
    again = [of for role in ("base", "trained") for of in successes(role, judged, seen, arm["seed"])]
    return again or counts


def contrast_of(kept: Kept, settings: Settings) -> tuple[Difference, float] | None:
    """The comparison named before, as b less a, and the p of its sign-flip test over seeds; None where it has none."""
    named = kept["contrast"]
    if not named or not {named["a"], named["b"]} <= set(settings):
        return None
    found = difference(settings, named["b"], named["a"], named["readout"])
    return (found, sign_flip_p(found.by_seed, [str(seed) for seed in found.seeds], 0)) if found else None
