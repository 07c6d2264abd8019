"""What runs that differ in nothing but their seeds say together: the mean judge, and how far the seeds lie apart.

No dimension letters. Read next: dpo/sweep_report.py, which says the same of every setting of a sweep.
"""

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TypedDict

from dpo.config import config_dict
from dpo.judge.statistics import averaged_scores, consistent_scores
from dpo.judged import Run
from dpo.page import Block, Table, Text
from dpo.report_run import NOTES, percent
from dpo.runs import flat
from dpo.sweep_figures import over_seeds


class OverSeeds(TypedDict):
    """An accuracy over runs of several seeds."""

    mean: float
    interval: list[float]  # over_seeds'
    deviation: float  # between the seeds, a standard deviation
    by_seed: list[float]


def over_runs(runs: Sequence[Run]) -> dict[str, OverSeeds]:
    """Both accuracies of the trained or only judge of runs that differ in nothing but their seeds; {} of other runs."""
    own = [
        {key: value for key, value in flat(config_dict(run.config)).items() if not key.startswith(("run.", "log."))}
        for run in runs
    ]
    seeds = {of.pop("seed") for of in own}
    alike = all(of == own[0] for of in own) and len({run.trained for run in runs}) == 1
    if not alike or len(seeds) < max(2, len(runs)):
        return {}
    said = [run.verdicts["trained" if run.trained else next(iter(run.verdicts))] for run in runs]
    made = runs[0].config.data.path == "checkable"  # by each seed its own, whose groups' names are the same
    rows = [run.results["data"].get("test_sha256", str(run.folder)) if made else "" for run in runs]
    groups = [[f"{of} {verdict.group}" for verdict in one] for of, one in zip(rows, said, strict=True)]
    found = {}
    for name, score in (("order-averaged", averaged_scores), ("consistent", consistent_scores)):
        scores = [score(one) for one in said]
        mean, interval = over_seeds(scores, groups, share=True)
        means = [float(of.mean()) for of in scores]
        found[name] = OverSeeds(mean=mean, interval=interval, deviation=stdev(means), by_seed=means)
    return found


def lead(told: Mapping[str, OverSeeds]) -> str:
    """The page's first sentence about over_runs' figures."""
    figures = ", ".join(f"{name} {percent(of['mean'], of['interval'])}" for name, of in told.items())
    return f"Over {len(told['consistent']['by_seed'])} seeds: accuracy {figures}."


def blocks(told: Mapping[str, OverSeeds]) -> list[Block]:
    """The table of over_runs' figures; nothing of none."""
    if not told:
        return []
    seeds = len(told["consistent"]["by_seed"])
    rows = [("accuracy", f"over {seeds} seeds", "standard deviation between seeds", "by seed")]
    for name, of in told.items():
        by_seed = ", ".join(f"{100 * mean:.1f}" for mean in of["by_seed"])
        rows.append((name, percent(of["mean"], of["interval"]), f"{100 * of['deviation']:.1f} points", by_seed))
    return [Table("Over the seeds", rows), Text("paragraph", NOTES["seeds"])]
