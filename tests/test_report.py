"""The report of a made-up run whose verdicts are drawn, but whose statistics are the product's own."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dpo.alarms import alarms_of
from dpo.config import Config, config_dict
from dpo.judge.controls import conclude
from dpo.judge.local import write_verdicts
from dpo.judge.statistics import Verdict, compare, summarise
from dpo.page import Page as Blocks
from dpo.page import Plot, Table, Text, to_html, to_markdown
from dpo.plots import HEIGHT, LEFT, RIGHT, TOP, Axis, Mark, chart
from dpo.report import main, write_report
from models.errors import UserError

NASTY = "<b>&|*x*_y_`z` [a](http://b) </td>"
PLOTS = {"loss", "margins", "accuracy", "subsets", "calibration", "coverage"}
SUBSETS = {"Focus": (2.5, 0.4), "Precise IF": (1.2, 0.4), "Math": (0.05, 0.4), NASTY: (0.0, 0.4)}


def verdicts(skill: float, bias: float, n: int = 320, seed: int = 3) -> list[Verdict]:
    """Four subsets in turn, groups of four rows; a judge of this skill (times the subset's) and preference for A."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        subset, (strength, noise) = list(SUBSETS.items())[i % 4]
        signal = skill * strength + noise * rng.standard_normal()
        made.append(Verdict(f"row {i}", subset, f"group {i // 16}-{i % 4}", (0, 0), signal + bias, -signal + bias))
    return made


def verdicts_of_a_run() -> dict[str, list[Verdict]]:
    trained = verdicts(1.0, 0.3, seed=2)
    trained[7] = Verdict("row 7", NASTY, trained[7].group, (0, 0), math.nan, math.nan)
    return {"base": verdicts(0.02, 1.6, seed=1), "trained": trained}


def results_of_a_run() -> dict:
    base, trained = verdicts_of_a_run().values()
    controls = {
        "always A": verdicts(0.0, 9.0),
        "longer answer": verdicts(0.1, 0.0, seed=5),
        "calibrated base": verdicts(0.02, 0.0, seed=1),
    }
    judged = {"base": summarise(base), "trained": summarise(trained), "comparison": compare(trained, base, 0)}
    counts = {"train": 960, "validation": 160, "test": 320}
    return {
        "step0_loss": 0.6931471805599453,
        "step0_max_difference": 0.0,
        "reference": {"hits": 1234, "misses": 5678},
        "judge": {**judged, **conclude(trained, controls, seed=0)},
        "train": {
            "steps": 120,
            "pairs": 1920,
            "tokens": 345_678,
            "time_s": 421.5,
            "tokens_per_s": 820.1,
            "peak_rss_mib": 2345.6,
            "best_step": 90,
            "dtype": "float32",
        },
        "alarms": alarms_of([{"step": 41, "alarm/both_rewards_fall": -3.21}]),
        "data": {
            "split": "group",
            "rows": counts,
            "pairs": counts,
            "groups": {"train": 240, "validation": 40, "test": 80},
            "subsets": {name: {"train": 240, "validation": 40, "test": 80} for name in SUBSETS},
            "unused_rows": 0,
            "dropped": {"equal scores": 1234},
            "leaks": {"group": 0, "prompt": 0, "answer": 0},
            "too_long": {"train": 3, "validation": 0, "test": 1},
            "truncated": {"train": 0, "validation": 0, "test": 0},
            "boundary_differs": {"train": 0, "validation": 0, "test": 0},
        },
        "time_s": {"inputs": 3.2, "reference": 61.0, "train": 421.5, "judge trained": 33.3},
    }


def metrics_of_a_run(steps: int = 120) -> list[dict]:
    rng = np.random.default_rng(0)
    lines: list[dict] = []
    for step in range(1, steps + 1):
        done = step / steps
        noise = 0.05 * rng.standard_normal()
        line = {
            "step": step,
            "epoch": done,
            "loss": 0.693 - 0.3 * done + noise,
            "rewards/margins": 2 * done + 4 * noise,
        }
        lines.append({**line, "rewards/chosen": done, "rewards/rejected": -done, "lr": 5e-5, "grad_norm": 3.0})
        if step % 30 == 0:
            evaluated = {"eval/loss": 0.70 - 0.25 * done, "eval/rewards/margins": 1.5 * done}
            accuracies = {"eval/accuracy": 0.4 * done, "eval/averaged_accuracy": 0.5 + 0.2 * done}
            lines.append({"step": step, **evaluated, **accuracies, "eval/raw_a_rate": 0.9})
    lines[10]["loss"] = None
    return lines


def write_run(folder: Path, results: dict | None = None, **changes: object) -> Path:
    """A run folder; `changes` are sections of the configuration."""
    folder.mkdir(parents=True)
    config = config_dict(Config(exp="quickstart"))
    for section, values in changes.items():
        config[section] |= values
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results_of_a_run() if results is None else results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_of_a_run()))
    environment = {"command": "python -m dpo.train exp=quickstart 'data.path=a & b.jsonl'", "cpu": "A CPU", "cores": 2}
    environment |= {"packages": {"torch": "2.13.0"}, "git": {"commit": "abc123", "dirty": True}, "gpu": None}
    (folder / "env.json").write_text(json.dumps(environment))
    write_verdicts(folder / "verdicts.jsonl", verdicts_of_a_run())
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "20261124-120000-0")
    write_report([folder])
    return folder


class Page(HTMLParser):
    """Text and cells of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "img", "br") else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\xa0", " ")


def html_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of all tables as a reader of GitHub's markdown sees them."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell.strip()) for cell in row] for row in rows]
    return [row for row in cells if not all(re.fullmatch("-+:?", cell) for cell in row)]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def share(judged: dict, key: str) -> str:
    low, high = judged["intervals"][key]
    return f"{percent(judged[key])} [{100 * low:.1f}, {100 * high:.1f}]"


# the figures ----------------------------------------------------------------------------------------------------------


def test_the_first_sentence_is_the_verdict_with_interval_and_p(run_folder: Path) -> None:
    judge = json.loads((run_folder / "results.json").read_text())["judge"]
    test = judge["comparison"]["averaged"]
    assert judge["conclusion"] == "better than all controls" and test["p"] < 1e-4
    low, high = test["interval"]
    sentence = (
        f"Order-averaged accuracy {percent(judge['base']['averaged_accuracy'])} -> "
        f"{percent(judge['trained']['averaged_accuracy'])} ({100 * test['difference']:+.1f} points, 95 % interval "
        f"[{100 * low:+.1f}, {100 * high:+.1f}], p < 1e-4) on 320 held-out rows; better than all controls."
    )
    markdown = (run_folder / "report.md").read_text()
    assert markdown.splitlines()[2] == f"**{sentence}**"
    assert (
        f'<p class="verdict">{sentence.replace("->", "-&gt;").replace("<", "&lt;")}</p>'
        in (run_folder / "report.html").read_text()
    )


def test_the_larger_of_the_two_p_values_is_quoted(tmp_path: Path) -> None:
    results = results_of_a_run()
    results["judge"]["comparison"]["averaged"] |= {"p": 1e-9, "p_clustered": 0.0314}
    results["judge"]["conclusion"] = "not better than longer answer"
    write_report([write_run(tmp_path / "run", results, log={"plots": False})])
    sentence = (tmp_path / "run" / "report.md").read_text().splitlines()[2]
    assert "p = 0.031)" in sentence and sentence.endswith("; not better than longer answer.**")


def test_every_figure_of_the_judges_stands_in_both_renderings(run_folder: Path) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    rows = {row[0]: row for row in html_page(run_folder).rows}
    for column, name in ((1, "base"), (2, "trained")):
        judged = results["judge"][name]
        low, high = judged["accuracy_interval"]
        shown = {
            "judged pairs": str(judged["n"]),
            "consistent accuracy": f"{percent(judged['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]",
            "wins / losses / ties / invalid": " / ".join(
                str(judged[outcome]) for outcome in ("wins", "losses", "ties", "invalid")
            ),
            "same verdict in both orders": share(judged, "position_consistency"),
            "says A": share(judged, "raw_a_rate"),
            "kappa": f"{judged['kappa']:.3f}",  # of 80 groups too few for an interval
            "Brier score": "{:.3f} [{:.3f}, {:.3f}]".format(judged["brier"], *judged["intervals"]["brier"]),
            "calibration error": f"{judged['calibration_error']:.3f}",
        }
        assert {row: rows[row][column] for row in shown} == shown
        assert rows["order-averaged accuracy"][column].startswith(percent(judged["averaged_accuracy"]))
    assert rows["wins / losses / ties / invalid"][2].endswith(" / 1")  # the NaN verdict
    for name, control in results["judge"]["controls"].items():
        shares = [percent(control["accuracy"]), percent(control["averaged_accuracy"])]
        assert rows[name][1:4] == [*shares, f"{100 * control['averaged']['difference']:+.1f}"]
    assert rows["pairs"][1:] == ["960", "160", "320"] and rows["tokens"][1] == "345,678"
    assert rows["reference log-probs"][1] == "1,234 found, 5,678 computed"
    assert rows["loss before the first update"][1] == "0.693147" and rows["train"][1] == "7 min 02 s"


def test_what_was_dropped_while_reading_is_told_with_its_reason(run_folder: Path) -> None:
    assert (
        "; dropped, equal scores: 1,234; rows left out as too long: 3 train, 0 validation, 1 test."
        in (run_folder / "report.md").read_text()
    )


def test_markdown_and_html_hold_the_same_tables(run_folder: Path) -> None:
    html = re.sub("<details.*?</details>", "", (run_folder / "report.html").read_text(), flags=re.S)
    rows = Page(html).rows
    assert len(rows) > 40
    assert markdown_rows((run_folder / "report.md").read_text()) == [
        [" ".join(cell.split()) for cell in row] for row in rows
    ]


def test_subsets_at_chance_are_marked_by_the_interval_that_is_shown(run_folder: Path) -> None:
    rows = [row for row in html_page(run_folder).rows if len(row) == 7 and row[-1].endswith("chance")]
    marks = {row[0]: row[-1] for row in rows}
    assert marks == {"Focus": "above chance", "Precise IF": "above chance", "Math": "at chance", NASTY: "at chance"}
    for row in rows:
        low, high = map(float, re.findall(r"[\d.]+", row[3])[1:])
        assert (low <= 50 <= high) == (row[-1] == "at chance")


def test_a_subset_is_not_below_chance_for_verdicts_that_cannot_be_read(tmp_path: Path) -> None:
    results = results_of_a_run()
    math_now = results["judge"]["trained"]["subsets"]["Math"] | {"averaged_interval": [0.2, 0.4]}
    for invalid, said in ((0, "below chance"), (math_now["n"] // 2, "at chance")):
        results["judge"]["trained"]["subsets"]["Math"] = math_now | {"invalid": invalid}
        write_report([write_run(tmp_path / str(invalid), results, log={"plots": False})])
        assert [row[-1] for row in html_page(tmp_path / str(invalid)).rows if row[0] == "Math" and len(row) == 7] == [
            said
        ]


def test_figures_of_results_from_before_their_intervals_stand_without_these(tmp_path: Path) -> None:
    results = results_of_a_run()
    del results["judge"]["trained"]["intervals"]
    write_report([write_run(tmp_path / "run", results, log={"plots": False})])
    rows = {row[0]: row for row in html_page(tmp_path / "run").rows}
    assert rows["says A"][1] == share(results["judge"]["base"], "raw_a_rate")
    assert rows["says A"][2] == percent(results["judge"]["trained"]["raw_a_rate"])
    assert "[" not in rows["Brier score"][2]


# the pages ------------------------------------------------------------------------------------------------------------


def test_the_html_is_well_formed_and_needs_no_other_file(run_folder: Path) -> None:
    page = html_page(run_folder)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("html") == tags.count("body") == tags.count("h1") == 1
    assert not {"link", "iframe", "b", "img"} & set(tags) and tags.count("script") == 1
    assert not [attributes for _, attributes in page.seen if {"src", "srcset", "action"} & attributes.keys()]
    assert all(attributes["href"].startswith("#") for tag, attributes in page.seen if tag == "a")
    assert "viewport" in [attributes.get("name") for _, attributes in page.seen]
    assert not re.search(r"url\(|@import", (run_folder / "report.html").read_text())


def test_names_from_the_data_cannot_become_markup(run_folder: Path) -> None:
    markdown = (run_folder / "report.md").read_text()
    assert NASTY in html_page(run_folder).text and NASTY not in markdown
    assert r"\<b>\&\|\*x\*\_y\_\`z\` [a\](http://b) \</td>" in markdown
    assert "**commit" not in markdown and "    python -m dpo.train exp=quickstart 'data.path=a & b.jsonl'" in markdown


def test_blocks_are_escaped_in_every_place() -> None:
    nasty = '<i>"&'
    texts = [Text(kind, nasty) for kind in ("verdict", "paragraph", "command")]
    blocks = [*texts, Table(nasty, [(nasty, "n"), (nasty, nasty)])]
    page = Page(to_html(Blocks(nasty, texts, {nasty: blocks})))
    assert "i" not in [tag for tag, _ in page.seen]
    assert page.text.count(nasty) == 14  # title twice, three texts twice, section and its link, caption, three cells
    lines = to_markdown(Blocks(nasty, texts, {nasty: [*blocks, Plot("loss", "Loss", "")]})).splitlines()
    assert lines[0] == r'# \<i>"\&' and lines[-1] == "![Loss](plots/loss.svg)"


def test_the_plots_are_drawings_of_their_own_and_stand_in_the_page(run_folder: Path) -> None:
    html = (run_folder / "report.html").read_text()
    drawn = {path.stem: path.read_text() for path in (run_folder / "plots").glob("*.svg")}
    assert drawn.keys() == PLOTS
    for svg in drawn.values():
        names = [element.tag.partition("}")[2] for element in ElementTree.fromstring(svg).iter()]
        assert names.count("path") > 5 and names.count("text") > 8 and {"title", "desc", "style"} <= {*names}
        assert re.sub("<style>.*?</style>", "", svg, flags=re.S) in html and not re.search(r"\b(nan|inf)\b", svg)


def test_a_chart_places_what_it_is_given() -> None:
    marks = [Mark("a", [0, 5, 10], [0.0, math.nan, 1.0]), Mark("b", [10], [0.5], 1, "points", [(0.25, 0.75)])]
    svg = chart("A chart", Axis("x", (0, 10)), Axis("y", (0, 1), percent=True), marks)
    assert f'd="M {LEFT} {TOP + HEIGHT} \nM {RIGHT} {TOP} \n"' in svg  # the NaN breaks the line
    whisker = f"M {RIGHT} {TOP + HEIGHT * 3 / 4:g} \nL {RIGHT} {TOP + HEIGHT / 4:g} \n"
    assert f'x="{RIGHT}" y="{TOP + HEIGHT / 2:g}"' in svg and whisker in svg
    ticks = ["0", "2", "4", "6", "8", "10", "0%", "20%", "40%", "60%", "80%", "100%"]
    assert re.findall(r">([\d.]+%?)<", svg) == ticks


@pytest.mark.parametrize("values", [[], [0.0], [-3.0, -3.0], [1e-9, 2e-9], [0, 1e12], [math.nan]])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_holds_any_values(values: list[float], log: bool) -> None:
    x = [abs(value) + 1e-12 for value in values if value == value] if log else [float(i) for i in range(len(values))]
    svg = chart("A chart", Axis("x", log=log), Axis("y"), [Mark("a", x, values[: len(x)], kind="points")])
    ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf)\b", svg)


def test_the_plots_show_what_the_metrics_say(tmp_path: Path, run_folder: Path) -> None:
    other = write_run(tmp_path / "run")
    lines = [
        {**line, "loss": 0.5, "eval/averaged_accuracy": 0.9, "rewards/margins": 1.0} for line in metrics_of_a_run()
    ]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([other])
    for name in ("loss", "margins", "accuracy"):
        assert (other / "plots" / f"{name}.svg").read_text() != (run_folder / "plots" / f"{name}.svg").read_text()


def test_a_report_made_again_is_the_same(run_folder: Path) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    write_report([run_folder])
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


# what may be missing, and what may not --------------------------------------------------------------------------------


def test_without_plots_there_are_no_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", log={"plots": False})
    write_report([folder])
    assert {path.stem for path in (folder / "plots").iterdir()} == {"subsets", "calibration", "coverage"}


CORE = "step0_loss step0_max_difference reference reference.misses judge judge.base judge.trained.ties judge.comparison"
CORE += " judge.controls judge.conclusion train train.steps data data.leaks time_s"


def run_with(folder: Path, key: str, *value: object) -> Path:
    """A run folder whose results.json has this value at the key, or lacks it."""
    results = results_of_a_run()
    part = results
    *above, last = key.split(".")
    for name in above:
        part = part[name]
    del part[last]
    if value:
        part[last] = value[0]
    return write_run(folder, results)


@pytest.mark.parametrize("key", CORE.split())
def test_a_missing_core_key_is_named_and_nothing_is_written(tmp_path: Path, key: str) -> None:
    folder = run_with(tmp_path / "run", key)
    with pytest.raises(UserError, match=rf"results\.json .*: without the key '{key.split('.')[-1]}'"):
        write_report([folder])
    assert not (folder / "report.md").exists() and not (folder / "plots").exists()


@pytest.mark.parametrize("key", ["step0_loss", "judge", "judge.base.accuracy_interval", "train.steps", "data.rows"])
@pytest.mark.parametrize("value", [None, "many", [[]]])
def test_an_altered_value_is_told_and_nothing_is_written(tmp_path: Path, key: str, value: object) -> None:
    folder = run_with(tmp_path / "run", key, value)
    with pytest.raises(UserError, match=r"results\.json .*: not as a run writes it"):
        write_report([folder])
    assert not (folder / "report.md").exists() and not (folder / "plots").exists()


@pytest.mark.parametrize("name", ["config.json", "env.json", "results.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", "{}", '{"step": 1}\n{"broken', "[1, 2]"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, capsys, name: str, content: str | None) -> None:
    folder = write_run(tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and str(folder / name) in message and len(message.splitlines()) == 1
    assert not (folder / "report.md").exists()


def test_an_altered_configuration_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", loss={"beta": -1.0})
    with pytest.raises(UserError, match=r"config\.json: loss\.beta: "):
        write_report([folder])


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["nowhere"]])
def test_the_command_refuses_what_is_no_run_folder(tmp_path: Path, monkeypatch, capsys, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "run folder" in captured.err and captured.out == ""


def test_the_command_works_from_a_shell(tmp_path: Path) -> None:
    write_run(tmp_path / "run", log={"plots": False})
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "dpo.report"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    good = subprocess.run([*command, "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "") and (tmp_path / "run" / "report.html").is_file()
    bad = subprocess.run([*command, "gone"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: gone: ") and "Traceback" not in bad.stderr
