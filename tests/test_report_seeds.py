"""What a report says of several runs: by subset which judge leads, and of seeds how far they lie apart."""

import json
from pathlib import Path

import pytest
from test_report import SUBSETS, markdown_rows, percent, results_of_a_run, verdicts, verdicts_of_a_run, write_run

from dpo.judge.local import write_verdicts
from dpo.judge.statistics import Verdict, averaged_scores, compare_subsets, consistent_scores
from dpo.judged import read_run
from dpo.report import write_report
from dpo.report_seeds import over_runs
from dpo.sweep_figures import over_seeds


def write_seeds(home: Path) -> tuple[list[Path], list[list[Verdict]]]:
    """Three runs of one configuration but for its seed, which judged the same rows, and what their judges say."""
    folders, said = [], []
    results = results_of_a_run()
    results["data"]["test_sha256"] = "of the rows"
    for seed, skill in enumerate((0.3, 0.5, 1.0)):
        folders.append(write_run(home / f"run{seed}", results, log={"plots": False}))
        config = json.loads((folders[-1] / "config.json").read_text())
        (folders[-1] / "config.json").write_text(json.dumps(config | {"seed": seed}))
        said.append(verdicts(skill, 0.3, seed=seed))
        write_verdicts(folders[-1] / "verdicts.jsonl", verdicts_of_a_run() | {"trained": said[-1]})
    return folders, said


def test_runs_that_differ_in_their_seeds_alone_are_told_together_and_others_are_not(tmp_path: Path) -> None:
    folders, said = write_seeds(tmp_path)
    home = write_report(folders)
    told = json.loads((home / "report.json").read_text())["seeds"]
    rows = {row[0]: row for row in markdown_rows((home / "report.md").read_text())}
    for name, score in (("order-averaged", averaged_scores), ("consistent", consistent_scores)):
        scores = [score(of) for of in said]
        means = [float(of.mean()) for of in scores]
        mean, (low, high) = over_seeds(scores, [[verdict.group for verdict in of] for of in said], share=True)
        spread = (sum((one - mean) ** 2 for one in means) / 2) ** 0.5
        assert told[name]["by_seed"] == means and told[name]["deviation"] == pytest.approx(spread)
        by_seed = ", ".join(f"{100 * one:.1f}" for one in means)
        figure = f"{percent(mean)} [{100 * low:.1f}, {100 * high:.1f}]"
        assert rows[name] == [name, figure, f"{100 * spread:.1f} points", by_seed]
    assert "**Over 3 seeds: accuracy order-averaged " in (home / "report.md").read_text()
    config = json.loads((folders[1] / "config.json").read_text())
    config["loss"]["beta"] *= 2
    (folders[1] / "config.json").write_text(json.dumps(config))
    home = write_report(folders)
    assert json.loads((home / "report.json").read_text())["seeds"] == {}
    assert "Over the seeds" not in (home / "report.md").read_text()


def test_rows_that_each_seed_makes_are_not_one_group_by_their_name(tmp_path: Path) -> None:
    folders, said = write_seeds(tmp_path)
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        results["data"]["test_sha256"] = folder.name
        (folder / "results.json").write_text(json.dumps(results))
    told = over_runs([read_run(folder) for folder in folders])["order-averaged"]
    groups = [[f"{number} {verdict.group}" for verdict in of] for number, of in enumerate(said)]
    assert told["interval"] == over_seeds([averaged_scores(of) for of in said], groups, share=True)[1]


def test_the_last_judge_of_several_runs_is_tested_against_the_first_within_each_subset(tmp_path: Path) -> None:
    folders, said = write_seeds(tmp_path)
    home = write_report([folders[0], folders[2]])
    tests = compare_subsets(said[2], said[0], 0)
    whose = "trained, seed=2 less trained, seed=0"
    assert json.loads((home / "report.json").read_text())["subsets"] == {whose: tests}
    rows = markdown_rows((home / "report.md").read_text())
    table = [row for row in rows if row[-1] == whose or row[-2].endswith("chance")]
    assert table[0][0] == "subset" and {row[0] for row in table[1:]} == {" ".join(name.split()) for name in SUBSETS}
    for row in table[1:]:
        test = tests[row[0]]
        p = "< 1e-4" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.2g}"
        assert row[-1] == f"{round(100 * test['difference'], 1) + 0.0:+.1f} points, p {p}"
