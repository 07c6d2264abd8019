"""What a sweep's report says: no more than its verdicts do, and what is quoted of it elsewhere is what it says."""

import gzip
import itertools
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from dpo.judge.statistics import (
    Verdict,
    averaged_scores,
    cluster_interval,
    mcnemar_exact,
    rows_by_seeds_bootstrap,
    share_interval,
    student_p,
    verdict_record,
    wilson_interval,
)
from dpo.report import main
from dpo.results import Results
from dpo.sweep import whole_s
from dpo.sweep_figures import Judged, difference, mean_of, over_seeds, read_kept, slope, student
from dpo.sweep_report import write_sweep_report
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(path.parent for path in (ROOT / "experiments" / "results").glob("*/arms.json"))


def judge(rights: list[bool], groups: int = 10**9) -> list[Verdict]:
    return [
        Verdict(f"r{i}", "All", f"g{i % groups}", (0, 0), *((1.0, -1.0) if r else (-1.0, 1.0)))
        for i, r in enumerate(rights)
    ]


def run(trained: list[bool]) -> Judged:
    return {"base": judge([False] * len(trained)), "trained": judge(trained)}


def groups_of(runs: list[list[Verdict]]) -> list[list[str]]:
    return [[verdict.group for verdict in one] for one in runs]


@pytest.mark.parametrize(("rights", "groups", "wilsons"), [([True] * 40, 40, True), ([True, False] * 20, 4, False)])
def test_one_seed_has_the_wider_of_wilsons_and_the_clustered_interval(
    rights: list[bool], groups: int, wilsons: bool
) -> None:
    verdicts = judge(rights, groups)
    scores = averaged_scores(verdicts)
    clustered = cluster_interval(scores, *groups_of([verdicts]), 0)
    wider = wilson_interval(sum(rights), 40) if wilsons else clustered  # of four groups two all right, two all wrong
    assert over_seeds([scores], groups_of([verdicts]), share=True) == (sum(rights) / 40, list(wider))


def test_seeds_that_disagree_widen_the_interval_as_student_says() -> None:
    runs = [judge([True] * n + [False] * (100 - n)) for n in (60, 70, 80)]
    mean, (low, high) = over_seeds([averaged_scores(run) for run in runs], groups_of(runs), share=True)
    half = 4.303 * 0.1 / 3**0.5  # t of 2 degrees of freedom, standard deviation 0.1, three seeds
    assert (mean, low, high) == pytest.approx((0.7, 0.7 - half, 0.7 + half))


def test_rows_and_seeds_drawn_together_vary_by_both() -> None:
    """Owen: the variance is at least that of rows plus that of seeds; here both are known."""
    rng = np.random.default_rng(0)
    row, seed = rng.normal(size=200), np.linspace(-1, 1, 8)
    values = [row + of for of in seed]
    groups = [[str(i) for i in range(200)]] * 8
    low, high = rows_by_seeds_bootstrap(values, groups, 0)
    spread = (row.var() / 200 + seed.var() / 8) ** 0.5
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)
    apart = [[f"{s} {i}" for i in range(200)] for s in range(8)]  # each seed its own rows: the rows' part is an eighth
    assert (row.var() / 1600 + seed.var() / 8) ** 0.5 < spread
    assert np.diff(rows_by_seeds_bootstrap(values, apart, 0))[0] < high - low


def test_students_p_is_the_tables() -> None:
    for n, t, p in ((2, 12.706, 0.05), (3, 4.303, 0.05), (8, 2.365, 0.05), (8, 3.499, 0.01)):
        values = np.r_[np.ones(n // 2), -np.ones(n - n // 2)] if n > 2 else np.array([1.0, -1.0])
        values = (values - values.mean()) / values.std(ddof=1) + t / n**0.5
        assert student_p(values.tolist()) == pytest.approx(p, rel=1e-3)
    assert student_p([0.5, 0.5]) == 0 and student_p([0.0, 0.0]) == 1
    assert student_p([0.5, 0.5], 0.1) == pytest.approx(student_p([0.5 + 0.1 / 2**0.5, 0.5 - 0.1 / 2**0.5]))


def test_seeds_that_agree_by_chance_resolve_nothing() -> None:
    """Two seeds of 16 rows, of which each gains six: their spread is 0, but by their rows alone it would not be."""
    runs = [run([True] * 6 + [False] * 10) for _ in range(2)]
    settings = {"base": {seed: {"trained": of["base"]} for seed, of in enumerate(runs)}, "b": dict(enumerate(runs))}
    found = difference(settings, "base", "b", "averaged")
    assert found and found.by_seed == [0.375, 0.375] and found.p > 0.1


def test_a_share_without_a_single_exception_is_as_uncertain_as_its_groups_are_few() -> None:
    scores, groups = np.zeros(684), [str(i % 57) for i in range(684)]
    assert share_interval(scores, groups, 0) == [*wilson_interval(0, 57)]
    assert share_interval(np.ones(40), [str(i) for i in range(40)], 0) == [*wilson_interval(40, 40)]


def test_the_mean_of_seeds_is_no_surer_than_their_spread_and_their_own_intervals() -> None:
    wide = [(0.5, [0.3, 0.8])] * 4
    assert mean_of(wide) == (0.5, [pytest.approx(0.4), pytest.approx(0.65)])
    assert mean_of(wide, shared=True) == (0.5, [pytest.approx(0.3), pytest.approx(0.8)])
    apart = [(share, [share, share]) for share in (0.6, 0.7, 0.8)]
    assert mean_of(apart) == (pytest.approx(0.7), [pytest.approx(end) for end in student([0.6, 0.7, 0.8])])
    assert mean_of(wide[:1]) == wide[0]


def test_two_settings_are_compared_on_the_same_pairs_of_the_same_seeds_only() -> None:
    settings = {
        "first": {0: run([True] * 4 + [False] * 6), 1: run([True] * 5 + [False] * 5)},
        "better": {0: run([True] * 10), 1: run([True] * 10)},
        "other rows": {0: {"trained": [replace(verdict, group="other") for verdict in judge([True] * 10)]}},
        "fewer rows": {0: {"trained": judge([True] * 5)}},
        "one seed": {1: run([True] * 10)},
    }
    better, one = (difference(settings, "first", name, "averaged") for name in ("better", "one seed"))
    assert difference(settings, "first", "other rows", "averaged") is None
    assert difference(settings, "first", "better", "rewards") is None
    fewer = difference(settings, "first", "fewer rows", "averaged")
    assert fewer and (fewer.pairs, fewer.difference[0]) == (5, pytest.approx(0.2))
    assert better and better.difference[0] == pytest.approx(0.55) and better.by_seed == [0.6, 0.5]
    least = (sum(np.var([1.0] * n + [0.0] * (10 - n) + [1.0, -1.0]) for n in (6, 5)) / 20) ** 0.5
    assert better.p == pytest.approx(student_p([0.6, 0.5], least)) and not better.resolved  # not corrected yet
    assert one and one.difference[0] == 0.5 and one.p == mcnemar_exact(5, 0) and one.seeds == [1]


# --- a made sweep -----------------------------------------------------------------------------------------------------


def made(
    folder: Path,
    *,
    gain: float = 0.2,
    seeds: int = 8,
    rows: int = 60,
    sighted: tuple[bool, ...] = (True, True, True),
    sizes: tuple[int, ...] = (100, 1600),
) -> None:
    """Results of the arms "few" and "many" on the same rows, the second right more often by `gain`."""
    rng = np.random.default_rng(1)
    arms = []
    folder.mkdir(parents=True)
    for seed in range(seeds):
        base = judge((rng.random(rows) < 0.5).tolist())
        for place, (name, size) in enumerate(zip(("few", "many", "most"), sizes, strict=False)):
            other = judge((rng.random(rows) < 0.5).tolist())
            judged = {"base": base if sighted[place] == sighted[0] else other}
            judged["trained"] = judge((rng.random(rows) < 0.5 + gain * place).tolist())
            judged |= {"rewards": other} | ({} if sighted[place] else {"sighted": judged["trained"]})
            # Of every other pair the right answer is 50 characters longer, of the rest 10 shorter.
            leads = [replace(v, first=50.0, second=-50.0) if i % 2 else v for i, v in enumerate(judge([False] * rows))]
            judged["longer answer"] = [replace(v, first=10 * v.first) if abs(v.first) == 1 else v for v in leads]
            lines = [json.dumps({"judge": role, **verdict_record(v)}) for role, of in judged.items() for v in of]
            file = f"{name},seed={seed}.jsonl.gz"
            (folder / file).write_bytes(gzip.compress("\n".join(lines).encode()))
            axes = {"data.rows": size, "seed": seed}
            arm = {"setting": name, "axes": axes, "seed": seed, "sighted": sighted[place], "verdicts": file}
            arm |= {"rows": "abc", "source": "s", "steps": 3, "tokens": 99, "train_s": 1.5, "whole_s": 4.0}
            arms.append(arm | {"reference_computed": 0})
    contrast = {"a": "many", "b": "few", "readout": "averaged"}
    kept = {
        "name": "q",
        "question": "Do more rows help?",
        "command": "",
        "contrast": contrast,
        "arms": arms,
        "failed": {},
    }
    (folder / "arms.json").write_text(json.dumps(kept))


def test_the_named_contrast_comes_first_with_an_exact_test_over_seeds(tmp_path: Path) -> None:
    made(tmp_path / "clear", gain=0.4)
    text = write_sweep_report(tmp_path / "clear")
    verdict = next(line for line in text.splitlines() if line.startswith("**"))
    assert "many less few, averaged: +" in verdict and "8 paired seeds, 480 judged pairs" in verdict
    assert "p = 0.0078: resolved" in verdict  # of 2^8 signs two are as far
    figures = json.loads((tmp_path / "clear" / "report.json").read_text())
    assert figures["contrast"]["p_seeds"] == 2 / 256
    assert {one["setting"] for one in figures["settings"]} == {"base", "few", "many"}
    made(tmp_path / "none", gain=0.0)
    assert "not resolved (at .01)" in write_sweep_report(tmp_path / "none")


def test_every_pair_is_corrected_and_what_is_not_resolved_says_so(tmp_path: Path) -> None:
    made(tmp_path / "q", gain=0.0)
    text = write_sweep_report(tmp_path / "q")
    of = [one for one in json.loads((tmp_path / "q" / "report.json").read_text())["differences"]]
    averaged = [one for one in of if one["readout"] == "averaged"]
    assert len(averaged) == 3 and all(one["p_holm"] >= one["p"] for one in averaged)
    assert max(one["p_holm"] for one in averaged) > max(one["p"] for one in averaged) or averaged[0]["p_holm"] == 1
    assert text.count("not resolved") >= 3 and "rewards" in text


def test_a_swept_number_has_its_plot_and_the_slope_of_its_means(tmp_path: Path) -> None:
    made(tmp_path / "q", sizes=(100, 400, 1600))
    text = write_sweep_report(tmp_path / "q")
    _, settings = read_kept(tmp_path / "q")
    names = ("few", "many", "most")
    means = [np.mean([averaged_scores(run["trained"]).mean() for run in settings[name].values()]) for name in names]
    told = 100 * (means[2] - means[0]) / 4  # of three even steps the ends' alone; 100 to 1,600 are four doublings
    assert "| points of averaged a doubling of data.rows | " in text
    assert re.search(rf"^\| averaged +\| {re.escape(f'{told:+.1f}')} \[", text, flags=re.M)
    assert "plots/data-rows.svg" in text and (tmp_path / "q" / "plots" / "data-rows.svg").is_file()
    assert "plots/settings.svg" in text


def line(shares: tuple[float, ...], seeds: int = 3) -> list[dict[int, Judged]]:
    """Settings along an axis, of so many right pairs of 100 in every seed."""
    right = [[row < round(100 * share) for row in range(100)] for share in shares]
    return [{seed: {"trained": judge(of)} for seed in range(seeds)} for of in right]


def test_a_slope_is_of_rows_and_seeds_and_two_are_compared() -> None:
    x = (100.0, 200.0, 400.0, 800.0)
    straight = slope(x, line((0.5, 0.55, 0.6, 0.65)), "averaged")
    assert straight and straight[0] == pytest.approx(0.05)
    assert straight[1][0] < 0.049 and straight[1][1] > 0.051  # seeds that agree do not make it exact
    found = slope(x, line((0.5, 0.5, 0.6, 0.8)), "averaged", line((0.5, 0.55, 0.6, 0.65)))
    assert found and found[0] == pytest.approx(np.polyfit(np.log2(x), (0.5, 0.5, 0.6, 0.8), 1)[0] - 0.05)
    assert slope(x, line((0.5, 0.5, 0.6, 0.8), seeds=1), "averaged") is None
    assert slope(x, line((0.5, 0.5, 0.6, 0.8)), "rewards") is None


def test_of_a_resumed_run_all_its_training_counts() -> None:
    stages = {"inputs": 1.0, "train": 2.0, "judge trained": 3.0}  # of the last process
    for trained, whole in ((10.0, 14.0), (1.9, 6.0)):
        assert whole_s(cast(Results, {"time_s": stages, "train": {"time_s": trained}})) == whole


def test_judges_of_both_sights_have_a_base_and_a_readout_of_their_own(tmp_path: Path) -> None:
    made(tmp_path / "q", sighted=(True, False), seeds=2)
    _, settings = read_kept(tmp_path / "q")
    assert list(settings) == ["base of few", "base of many", "few", "many"]
    assert settings["few"][0]["sighted"] == settings["few"][0]["trained"]
    assert settings["many"][0]["blind"] == settings["many"][0]["trained"] == settings["many"][0]["sighted"]


def test_the_plot_of_settings_has_what_each_of_them_has(tmp_path: Path) -> None:
    made(tmp_path / "q", seeds=2)
    write_sweep_report(tmp_path / "q")
    drawn = (tmp_path / "q" / "plots" / "settings.svg").read_text()
    assert "few, rewards: " in drawn and "base, averaged: " in drawn and "base, rewards: " not in drawn
    assert len(re.findall(r">\d+\.\d%<", drawn)) == 3 * 4 - 1  # of base, few, many; but a base has no implicit reward


def test_a_sweep_is_read_by_its_primary_readout_and_says_that_it_is_not_over(tmp_path: Path) -> None:
    made(tmp_path / "q")
    kept = json.loads((tmp_path / "q" / "arms.json").read_text())
    (tmp_path / "q" / "arms.json").write_text(json.dumps(kept | {"primary": "consistent", "planned": 24}))
    text = write_sweep_report(tmp_path / "q")
    assert "data.rows: consistent" in text and re.search(r"over the seeds p = [\d.]+: so far ", text)
    assert "Interim: 16 of 24 arms have finished." in text


def told(share: float, ends: Iterable[float], sign: str = "") -> str:
    low, high = (f"{100 * end:{sign}.1f}" for end in ends)
    return f"{100 * share:{sign}.1f} [{low}, {high}]"


def test_leads_over_controls_and_the_liking_of_length_are_those_of_the_verdicts(tmp_path: Path) -> None:
    made(tmp_path / "q")
    text = write_sweep_report(tmp_path / "q")
    runs = [judged["trained"] for judged in read_kept(tmp_path / "q")[1]["many"].values()]
    groups = groups_of(runs)  # of the same rows in all seeds
    longer = np.arange(60) % 2  # the control is right on every other pair
    lead = over_seeds([averaged_scores(run) - longer for run in runs], groups, share=False)
    line = next(of for of in text.partition("## Controls")[2].splitlines() if of.startswith("| many "))
    assert line.split("|")[2].strip() == told(*lead, "+")
    liked = over_seeds([averaged_scores(run)[1::2] for run in runs], [of[1::2] for of in groups], share=True)
    line = next(line for line in text.splitlines() if line.startswith("| many "))
    assert line.split("|")[-2].strip() == told(*liked)


def test_subsets_are_read_as_the_contrast_reads(tmp_path: Path) -> None:
    made(tmp_path / "q")
    kept = json.loads((tmp_path / "q" / "arms.json").read_text())
    of = {}
    for readout in ("averaged", "rewards"):
        kept["contrast"]["readout"] = readout
        (tmp_path / "q" / "arms.json").write_text(json.dumps(kept))
        write_sweep_report(tmp_path / "q")
        settings = json.loads((tmp_path / "q" / "report.json").read_text())["settings"]
        of[readout] = {one["setting"]: one for one in settings if one["setting"] == "many"}["many"]
        (subset,) = of[readout]["subsets"].values()  # there is one, so it is the whole
        assert subset == of[readout]["figures"][readout]
    assert of["averaged"]["subsets"] != of["rewards"]["subsets"]


def test_attacks_on_a_settings_trained_judges_have_a_table(tmp_path: Path) -> None:
    made(tmp_path / "q", seeds=2)
    kept = json.loads((tmp_path / "q" / "arms.json").read_text())
    for arm in kept["arms"]:
        of = {"attack": "verdict", "trained_on": True, "n": 10, "interval": [0.0, 0.5]}
        wins = 1 + 2 * arm["seed"]
        arm["rows"] = str(arm["seed"])  # each seed its own
        arm["attacks"] = [of | {"judge": "base", "wins": 9}, of | {"judge": "trained", "wins": wins}]
    (tmp_path / "q" / "arms.json").write_text(json.dumps(kept))
    text = write_sweep_report(tmp_path / "q")
    table = text.partition("## Attacks")[2].partition("##")[0]
    rows = dict(re.findall(r"^\| (\w+) +\| +(.*?) \|$", table, flags=re.M))
    assert rows["few"] == "20.0 [0.0, 100.0]" and rows["base"] == "90.0 [26.4, 100.0]"  # 90 - (90 - 0) / sqrt(2)
    kept["arms"][-1]["attacks"][0]["wins"] = 5  # where bases differ, each is told
    (tmp_path / "q" / "arms.json").write_text(json.dumps(kept))
    text = write_sweep_report(tmp_path / "q")
    assert "| base of few " in text and "| base of many " in text

    # Where verdicts under attack are kept, the counts of an older version are not read.
    shares = []
    for arm in kept["arms"]:
        file = tmp_path / "q" / arm["verdicts"]
        lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        losing = [one for one in lines if one["judge"] == "trained" and one["first"] > one["second"]]
        under = [one | {"judge": "trained under verdict", "first": -9.0} for one in losing[:5]]  # these win now
        under += [one | {"judge": "trained under verdict"} for one in losing[5:]]
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines + under)).encode()))
        shares += [5 / len(losing)] if arm["setting"] == "few" else []
    cells = re.search(r"^\| few +\| +([\d.]+) .*$", write_sweep_report(tmp_path / "q").partition("## Attacks")[2], re.M)
    assert cells and cells[1] == f"{100 * np.mean(shares):.1f}"


def test_the_command_makes_the_reports_of_several_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        made(folder, seeds=1)
    assert main([str(folder) for folder in folders]) == 0
    assert capsys.readouterr().out.splitlines() == [f"report: {folder / 'report.html'}" for folder in folders]
    assert all((folder / "report.html").is_file() for folder in folders)
    assert main([str(folders[0]), str(tmp_path)]) == 2
    assert f"{folders[0]}: results of a sweep" in capsys.readouterr().err


def test_damaged_results_are_named(tmp_path: Path) -> None:
    made(tmp_path / "q", seeds=1)
    file = tmp_path / "q" / "few,seed=0.jsonl.gz"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="few,seed=0.jsonl.gz: cannot be read"):
        write_sweep_report(tmp_path / "q")


# --- what is quoted of results ----------------------------------------------------------------------------------------

NUMBER = r"[-+]?\d+\.\d+(?:e-\d+)?"
COUNT = r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+)(?![\d.,]*\d)"


def numbers(text: str) -> set[str]:
    """Every number with a point, and every one with its interval."""
    text = text.replace(" %", "")
    return {*re.findall(NUMBER, text), *re.findall(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]", text)}


def unbacked(text: str, results: Path) -> set[str]:
    """The numbers in paragraphs that name results/NAME, and in tables behind these, which its report does not have."""
    wrong: set[str] = set()
    named: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        found = re.findall(r"experiments/results/([\w-]+)", block)
        named = found or (named if block.lstrip().startswith("|") else [])
        if named:
            reports = [(results / name / "report.md").read_text() for name in named]
            wrong |= numbers(block) - set[str]().union(*map(numbers, reports))
            counts = set(re.findall(rf"{COUNT} (?:\w+ )*?(?:pairs|seeds)", block))
            wrong |= counts - {count for report in reports for count in re.findall(COUNT, report)}
        if block.startswith("| `experiments/results/"):
            wrong |= misplaced(block, results / named[0])
    return wrong


def misplaced(table: str, folder: Path) -> set[str]:
    """Cells of a table by setting and readout that are not what the report's table of settings has there."""
    report = (folder / "report.md").read_text().splitlines()
    first = next(place for place, line in enumerate(report) if re.match(r"\| setting +\| +seeds ", line))
    told = cells_of(itertools.takewhile(lambda line: line.startswith("|"), report[first:]))
    quoted = cells_of(table.splitlines())
    return {
        f"{setting}, {readout}: {cell}"
        for setting, cells in quoted.items()
        for readout, cell in cells.items()
        if told.get(setting, {}).get(readout) != cell
    }


def cells_of(lines: Iterable[str]) -> dict[str, dict[str, str]]:
    """A table's cells by the first of their row and by column."""
    (_, *header), _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines)
    return {name: dict(zip(header, cells, strict=True)) for name, *cells in rows}


def test_a_quoted_figure_is_the_reports_or_is_found(tmp_path: Path) -> None:
    made(tmp_path / "q")
    report = write_sweep_report(tmp_path / "q")
    figure = re.search(rf"\*\*.*?({NUMBER} \[.*?\])", report)
    assert figure
    table = "\n".join(line for line in report.splitlines() if line.startswith("| "))
    text = f"Found 9.9 elsewhere.\n\nIn `experiments/results/q`: {figure[1]}.\n\n{table}\n\nAnd 9.9 again."
    assert unbacked(text, tmp_path) == set()
    mean = re.match(NUMBER, figure[1])
    assert mean
    wrong = f"{float(mean[0]) + 0.1:+.1f}{figure[1][mean.end() :]}"
    assert wrong in unbacked(text.replace(figure[1], wrong), tmp_path)
    assert unbacked(text.replace("| few ", "| few 12.345 "), tmp_path) == {"12.345"}
    assert unbacked("`experiments/results/q`: 8 seeds, 480 pairs.\n\n- 4.8", tmp_path) == set()
    assert unbacked("- `experiments/results/q`: 80 seeds.\n- `experiments/results/q`: 481 pairs.", tmp_path) == {
        "80",
        "481",
    }

    (averaged,) = re.findall(r"^\| many +\| [^|]*\| [^|]*\| (.*?) \|", report, flags=re.M)[:1]
    table = f"| `experiments/results/q` | averaged |\n|---|---|\n| many | **{averaged}** |"
    assert unbacked(table, tmp_path) == set()
    assert unbacked(table.replace("| many", "| few"), tmp_path) == {f"few, averaged: {averaged}"}
    assert (
        unbacked(table.replace("averaged |", "consistent |"), tmp_path) == set()
    )  # all of these are right in both orders
    assert unbacked(table.replace("averaged |", "rewards |"), tmp_path) == {f"many, rewards: {averaged}"}


def test_what_the_log_and_the_readme_quote_of_results_is_what_these_say() -> None:
    log, readme = ((ROOT / name).read_text() for name in ("experiments/LOG.md", "README.md"))
    for text in (log, readme):
        assert unbacked(text, ROOT / "experiments" / "results") == set()
    assert [path.name for path in RESULTS if f"experiments/results/{path.name}" not in log] == []
    size = sum(file.stat().st_size for path in RESULTS for file in path.rglob("*") if file.is_file())
    assert size < 20e6


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_a_report_is_what_its_verdicts_give(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("report.*", "plots"))
    assert write_sweep_report(tmp_path / "again") == (folder / "report.md").read_text()
    plots = sorted(path.relative_to(folder) for path in folder.glob("plots/*"))
    assert plots and all((tmp_path / "again" / path).read_bytes() == (folder / path).read_bytes() for path in plots)
