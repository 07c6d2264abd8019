"""python -m dpo.report RUN...: finished runs on one page, as report.md, report.html (one file) and report.json.

    run folders -> dpo/judged.py: judges and what they said -> blocks -> dpo/page.py: markdown, HTML

One run is reported in its own folder; several are compared in the folder `compared` of the first. Everything comes from
the files, so a report can be made again at any time. No dimension letters. Read next: dpo/report_run.py, dpo/judged.py,
dpo/page.py, and dpo/judge/statistics.py, where the figures come from.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dpo import report_judges, report_run, report_seeds
from dpo.card import model_card
from dpo.judge.local import OF_ANSWERS
from dpo.judge.statistics import PairedTest, Summary, compare_subsets, reliability
from dpo.judged import (
    Compared,
    Judge,
    Key,
    Run,
    cases,
    comparisons,
    judges_of,
    named,
    read_run,
    shared_pairs,
    transitions,
)
from dpo.page import MARKS, SAYS, Block, Case, Cases, Page, Plot, Table, Text, to_html, to_markdown
from dpo.plots import bars, file_text, training_plots
from dpo.report_run import NOTES, change, p_value, percent, points
from dpo.rows import Row
from dpo.sweep_report import write_sweep_report
from models.errors import UserError, exit_code
from models.files import atomic_write_text

MOST_CHANGED = 2000  # pairs listed on a page
USAGE = "usage: python -m dpo.report RUN_FOLDER...   or sweeps' results, e.g. experiments/results/*"


def report_page(runs: Sequence[Run]) -> tuple[Page, dict[str, object]]:
    """The page, of one run all that there is to say, of several what compares their judges; and report.json."""
    judges, seeds = judges_of(runs), report_seeds.over_runs(runs)
    compared, shown, (whose, tests) = comparisons(judges), cases(judges), _subset_tests(judges)
    trained = [run for run in runs if run.trained]
    sections: dict[str, Sequence[Block]] = {
        "Verdicts": [*_verdicts(judges, compared), *report_seeds.blocks(seeds)],
        "By subset": _by_subset(judges, whose, tests),
        "Benchmark": report_judges.benchmarks(judges),
        "Position and looks": [*report_judges.position(judges), *report_judges.biases(judges)],
        "Calibration": report_judges.calibration(judges),
        "Cost and speed": report_judges.costs(judges),
        "Attacks": report_judges.attacks(judges),
        "Training": _curves(trained),
    }
    lone = runs[0] if len(runs) == 1 else None
    if lone and lone.trained:
        results, controls = lone.results, "Controls: judges that have learnt nothing about judging"
        sections[controls] = report_run.controls(results["judge"])
        sections["Training"] = [report_run.training(results), *report_run.critiques(results), *sections.pop("Training")]
        sections["Alarms"] = report_run.alarms(results["alarms"])
    sections |= {"What changed": _changed(compared, shown), "Rows": _rows(runs, shown)}
    if lone:
        sections["Data"] = report_run.data(lone.results, lone.config)
        sections["Time"] = [report_run.times(lone.results["time_s"])]
    sections["Again"] = [block for run in runs for block in report_run.again(run)]
    title = f"{len(judges)} judges compared"
    lead = [Text("verdict", line) for line in ([report_seeds.lead(seeds)] if seeds else _lead(judges, compared))]
    if lone:
        title = f"{lone.config.exp}: is it a better judge?" if lone.trained else "How good a judge is it?"
        lead = report_run.summary(lone) if lone.trained else [Text("verdict", _standing(judge)) for judge in judges]
    page = Page(title, lead, {name: blocks for name, blocks in sections.items() if blocks})
    return page, _figures(runs, judges, compared) | {"seeds": seeds, "subsets": {whose: tests}}


def _standing(judge: Judge) -> str:
    of, known = judge.summary, f"chance has {100 * judge.chance:.0f} %"
    if judge.ordered:
        known = "a judge that always says A has 50 % of the one and 0 % of the other"
    return (
        f"{judge.name}: order-averaged accuracy {percent(of['averaged_accuracy'], of['averaged_interval'])}, "
        f"consistent {percent(of['accuracy'], of['accuracy_interval'])}, on {of['n']:,} pairs; {known}."
    )


def _last(judges: Sequence[Judge]) -> list[Judge]:
    """Each run's last judge that was asked."""
    return list({judge.run.folder: judge for judge in judges if judge.role not in OF_ANSWERS}.values())


def _subset_tests(judges: Sequence[Judge]) -> tuple[str, Mapping[str, PairedTest]]:
    """By subset, and whose: of one run trained less base, of several the last one's last judge less the first one's."""
    first, last = _last(judges)[0], _last(judges)[-1]
    if first is last:
        known = last.run.results["judge"].get("subset_tests", {}) if last.role == "trained" else {}
        return "trained less base", known
    of_first, of_last = shared_pairs(first, last)
    return f"{last.name} less {first.name}", compare_subsets(of_last, of_first, first.run.config.seed)


def _lead(judges: Sequence[Judge], compared: Sequence[Compared]) -> list[str]:
    """A sentence for each run's last judge against the first run's."""
    first, *others = (judge.name for judge in _last(judges))
    lines = [
        f"{first} -> {one.b.name}: order-averaged accuracy "
        f"{change(one.before, one.after, one.test['averaged'], one.p_holm)} on {one.n:,} shared pairs."
        for one in compared
        if one.a.name == first and one.b.name in others
    ]
    return lines or ["The runs have no judged pair in common: their figures stand side by side, and say nothing more."]


# --- sections -------------------------------------------------------------------------------------------------------


def _verdicts(judges: Sequence[Judge], compared: Sequence[Compared]) -> list[Block]:
    of = [judge.summary for judge in judges]
    kappa = ["-" if j.chance < 0.5 else _known(j.summary["kappa"], _interval(j.summary, "kappa")) for j in judges]
    figures = [
        ("judge", *(judge.name for judge in judges)),
        ("judged pairs", *(f"{j['n']:,}" for j in of)),
        ("order-averaged accuracy", *(percent(j["averaged_accuracy"], j["averaged_interval"]) for j in of)),
        ("consistent accuracy", *(percent(j["accuracy"], j["accuracy_interval"]) for j in of)),
        ("wins / losses / ties / invalid", *("{wins} / {losses} / {ties} / {invalid}".format(**j) for j in of)),
        ("same verdict in both orders", *(_of_orders(j, "position_consistency") for j in judges)),
        ("says A", *(_of_orders(j, "raw_a_rate") for j in judges)),
        ("a tie counts one half", *(percent(j["tie_half_accuracy"], j["tie_half_interval"]) for j in of)),
        ("of decided pairs", *(percent(j["decided_accuracy"], j["decided_interval"]) for j in of)),
        ("kappa", *kappa),
        ("Brier score", *(_known(j["brier"], _interval(j, "brier")) for j in of)),
        ("calibration error", *(_known(j["calibration_error"]) for j in of)),
    ]
    blocks: list[Block] = [Table("The judges", figures), Text("paragraph", NOTES["judges"])]
    if not compared:
        return blocks
    many = len(compared) > 1
    header = ("difference", "pairs", "points", "95 % interval", "p, exact", "p, by group")
    tests = [(*header, *["p, corrected"] * many, "better / worse", "points that show")]
    for one in compared:
        for name, test in (("order-averaged", one.test["averaged"]), ("consistent", one.test["consistent"])):
            corrected = [p_value(one.p_holm) if test is one.test["averaged"] else ""] * many
            p = p_value(test["p"]), p_value(test["p_clustered"]), *corrected
            better = f"{test['wins_only_a']} / {test['wins_only_b']}"
            shows = f"{100 * test['minimum_detectable']:.1f}" if test["minimum_detectable"] else "-"
            tests.append((f"{one.b.name} less {one.a.name}, {name}", f"{one.n:,}", *points(test), *p, better, shows))
    text = NOTES["differences"].format(corrected=", corrected by Holm over the comparisons" * many)
    return [*blocks, Table("Their differences on the same pairs", tests), Text("paragraph", text)]


def _interval(of: Summary, key: str) -> Sequence[float]:
    return of.get("intervals", {}).get(key, ())


def _of_orders(judge: Judge, key: Literal["position_consistency", "raw_a_rate"]) -> str:
    return percent(judge.summary[key], _interval(judge.summary, key)) if judge.ordered else "-"


def _known(figure: float | None, interval: Sequence[float] = ()) -> str:
    ends = ", ".join(f"{end:.3f}" for end in interval)
    return "-" if figure is None else f"{figure:.3f}" + (f" [{ends}]" if ends else "")


def _by_subset(judges: Sequence[Judge], whose: str, tests: Mapping[str, PairedTest]) -> list[Block]:
    """The last judge's standing is told, with what training did to it or its lead, and that of all is drawn."""
    judges = [judge for judge in judges if judge.role not in OF_ANSWERS] or judges
    of = [judge.summary["subsets"] for judge in judges]
    names = [judge.name for judge in judges]
    chance = judges[-1].chance
    columns = [f"{reading}, {name}" for reading in ("averaged", "consistent") for name in names]
    rows, shares = [("subset", "pairs", *columns, "is", *[whose] * bool(tests))], {}
    for subset in dict.fromkeys(name for subsets in reversed(of) for name in subsets):
        last = next(subsets[subset] for subsets in reversed(of) if subset in subsets)
        there = [subsets.get(subset) for subsets in of]
        averaged = [percent(j["averaged_accuracy"], j["averaged_interval"]) if j else "" for j in there]
        consistent = [percent(j["accuracy"], j["accuracy_interval"]) if j else "" for j in there]
        low, high = last["averaged_interval"]
        high += chance * last["invalid"] / last["n"]  # what guesses in their place would win
        what = "above chance" if low > chance else "below chance" if high < chance else "at chance"
        test = tests.get(subset)
        moved = [f"{points(test)[0]} points, p {p_value(test['p_holm'])}" if test else ""] * bool(tests)
        rows.append((subset, f"{last['n']:,}", *averaged, *consistent, what if subset in of[-1] else "", *moved))
        if all(there):
            shares[f"{subset} ({last['n']:,})"] = [(j["averaged_accuracy"], j["averaged_interval"]) for j in there if j]
    meaning = f"At chance: {names[-1]}'s interval, invalid verdicts as guesses, holds {100 * chance:.0f} %."
    meaning += f" {whose}: on the pairs that both judged; p is corrected by Holm over the subsets." * bool(tests)
    title = "Order-averaged accuracy by subset"
    drawn = [Plot("subsets", title, bars(title, shares, names))] if shares else []
    return [*drawn, Table(title, rows), Text("paragraph", meaning)]


def _curves(trained: Sequence[Run]) -> list[Block]:
    plots: list[Block] = []
    for number, run in enumerate(trained, 1):
        for name, (title, svg) in training_plots(run.metrics, run.results).items() if run.config.log.plots else ():
            told = (f"{name}-{number}", f"{run.folder.name}: {title}") if len(trained) > 1 else (name, title)
            plots.append(Plot(*told, svg))
    return plots


def _changed(compared: Sequence[Compared], shown: Mapping[Key, Case]) -> list[Block]:
    """Of each two judges the counts, and row by row what differs, up to MOST_CHANGED rows in all."""
    tables: list[Block] = []
    places, most = {key: place for place, key in enumerate(shown, 1)}, MOST_CHANGED // max(1, len(compared))
    marked = {outcome: f"{MARKS[outcome]} {says}" for outcome, says in SAYS.items()}
    for one in compared:
        both = transitions(one.a, one.b)
        counts = Counter(both.values())
        rows = [("was \\ now", *SAYS.values())]
        rows += [(says, *(f"{counts[was, now]:,}" for now in SAYS)) for was, says in SAYS.items()]
        tables.append(Table(f"Pairs by what {one.a.name} (rows) and {one.b.name} (columns) made of both orders", rows))
        pairs = {key: (was, now) for key, (was, now) in both.items() if was != now}
        rows = [(named(key), one.a.verdicts[key].subset, marked[was], marked[now]) for key, (was, now) in pairs.items()]
        title = f"{len(pairs):,} pairs that {one.b.name} judges otherwise than {one.a.name}"
        title += f" (cut: the first {most:,}; all of them are in report.json)" * (len(pairs) > most)
        listed = [("pair", "subset", "was", "now"), *rows[:most]]
        tables += [Table(title, listed, [places.get(key, 0) for key in pairs][:most])] if pairs else []
    return tables


def _rows(runs: Sequence[Run], shown: Mapping[Key, Case]) -> list[Block]:
    missing = dict.fromkeys(run.rows.missing for run in runs if run.rows.missing)
    return [*(Text("paragraph", why) for why in (NOTES["rows"], *missing)), Cases([*shown.values()])]


# --- from folders to files ------------------------------------------------------------------------------------------


def _figures(runs: Sequence[Run], judges: Sequence[Judge], compared: Sequence[Compared]) -> dict[str, object]:
    """What the page says, for machines; verdicts.jsonl of each run holds every pair."""
    return {
        "runs": [{"folder": str(run.folder), "exp": run.config.exp, **run.environment} for run in runs],
        "judges": {
            judge.name: {
                **judge.summary,
                **report_judges.pace(judge),
                "run": judge.run.folder.name,
                "reliability": [] if judge.summary["brier"] is None else reliability(list(judge.verdicts.values())),
            }
            for judge in judges
        },
        "comparisons": [
            {"judge": one.b.name, "against": one.a.name, "pairs": one.n, **one.test, "p_holm": one.p_holm}
            | {"changed": [_change(one, key, *of) for key, of in transitions(one.a, one.b).items() if of[0] != of[1]]}
            for one in compared
        ],
        "attacks": [{**one, "judge": judge.name} for judge in judges for one in judge.attacks],
        "biases": [{**one, "judge": judge.name} for judge in judges for one in judge.biases],
    }


def _change(one: Compared, key: Key, was: str, now: str) -> dict[str, object]:
    return {"id": key[0], "pair": key[1], "subset": one.a.verdicts[key].subset, "was": was, "now": now}


def write_report(folders: Sequence[Path], rows: Sequence[Row] = (), home: Path | None = None) -> Path:
    """Write report.md, .html and .json, (log.plots) plots/*.svg, and the card of what a lone run exported; the folder.

    That is `home`, else the run's, or of several `compared` in the first. `rows`: those that a lone run judged, where
    they are at hand. UserError where a file is missing or damaged.
    """
    runs = [read_run(folder, rows) for folder in folders]
    try:  # with files as the runs wrote them there is nothing that could raise
        page, told = report_page(runs)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fault = f"without the key {error}" if isinstance(error, KeyError) else f"not as a run writes it ({error})"
        place = " or ".join(str(folder / name) for folder in folders for name in ("results.json", "env.json"))
        raise UserError(f"{place}: {fault}; the file was altered, or is of another version") from error
    home = home or (folders[0] / "compared" if len(folders) > 1 else folders[0])
    for block in (block for blocks in page.sections.values() for block in blocks if isinstance(block, Plot)):
        atomic_write_text(home / "plots" / f"{block.name}.svg", file_text(block.svg))
    exported = folders[0] / "export" / "model"
    if len(runs) == 1 and exported.is_dir():
        atomic_write_text(exported / "README.md", model_card(runs[0], page.sections, exported))
    atomic_write_text(home / "report.md", to_markdown(page))
    atomic_write_text(home / "report.json", json.dumps(told, indent=2) + "\n")
    atomic_write_text(home / "report.html", to_html(page))  # last: with it the run is finished
    return home


def main(argv: list[str]) -> int:
    """The command line: 0 when the report is written, else exit_code's."""

    def command() -> None:
        if not argv:
            raise UserError(f"give a run folder, or several to compare. {USAGE}")
        folders = [Path(argument) for argument in argv]
        sweeps = [folder for folder in folders if (folder / "arms.json").is_file()]
        if sweeps and len(sweeps) < len(folders):
            named = ", ".join(map(str, sweeps))
            raise UserError(f"{named}: results of a sweep, and the other folders are not; name either alone. {USAGE}")
        for folder in sweeps:
            write_sweep_report(folder)
        for home in sweeps or [write_report(folders)]:
            print(f"report: {home / 'report.html'}")

    return exit_code(command, argv, USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
