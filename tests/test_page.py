"""Pages of runs over rows that attack them: what they hold is text, in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpo.config import Config, config_dict
from dpo.escape import visible
from dpo.inputs import load_splits
from dpo.judge.local import write_verdicts
from dpo.judge.statistics import Verdict, averaged_scores, compare, summarise
from dpo.judged import MOST_CHARACTERS, judges_of, read_run, shared_pairs
from dpo.page import SAYS, Page, Table, to_html, to_markdown
from dpo.plots import Axis, Mark, bars, chart
from dpo.report import main, write_report
from dpo.rows import read_rows

OWN = "document.documentElement.dataset.owned=1"
ATTACKS = [
    f"<script>{OWN}</script>",
    f"</script><script>{OWN}</script>",
    f'"><img src=x onerror="{OWN}">',
    f"'><svg/onload={OWN}>",
    f"</div></details></main><iframe srcdoc='<script>parent.{OWN}</script>'></iframe>",
    f'<a href="javascript:{OWN}">here</a><base href="http://example.com/">',
    "{{constructor.constructor('alert(1)')()}} ${7*7} <%= 7 %> {0} %s",
    "<!-- <style>*{display:none}</style> --> ]]> &lt;b&gt; &#60;script&#62;",
    "safe \u202etxt.exe\u202c \u200bhidden\U000e0041 \u2066x",
    "A" * 1_000_000,
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


def write_rows_file(path: Path) -> None:
    """A row for every attack, named by it."""
    rows = [
        {"id": f"{number} {text[:60]}", "subset": text[:40], "prompt": f"{number} {text}", "chosen": f"right {text}",
         "rejected": f"wrong {text}", "group": f"g{number}"}
        for number, text in enumerate(ATTACKS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_judging(folder: Path, data: Path, judge: str, odds: dict[int, tuple[float, float]]) -> Path:
    """The folder of a run that judged the test rows with these numbers in `data`."""
    folder.mkdir(parents=True)
    config = Config.model_validate({"exp": "judge", "data": {"path": str(data)}})
    rows = {row.id: row for row in read_rows(data)}
    said = [
        Verdict(row.id, row.subset, row.group, (0, 0), *odds[int(name.split()[0])])
        for name, row in rows.items()
        if int(name.split()[0]) in odds
    ]
    endpoint = {"found": 0, "prompt_tokens": 900, "completion_tokens": 20, "cost": 0.01, "time_s": 2.0}
    results = {
        "judge": {judge: summarise(said)},
        "data": load_splits(config, judging=True).report,
        "time_s": {"judge": 3.0},
        "endpoint": endpoint,
    }
    environment = {"command": f"python -m dpo.judge '{ATTACKS[0]}'", "cpu": "A CPU", "cores": 2, "gpu": None}
    environment |= {"packages": {"torch": "2"}, "git": None}
    for name, value in (("config", config_dict(config)), ("results", results), ("env", environment)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    write_verdicts(folder / "verdicts.jsonl", {judge: said})
    return folder


ODDS = {number: (2.0 - number, -1.5 if number > 1 and number % 3 else 2.5) for number in range(len(ATTACKS))}
OTHER_ODDS = {number: (0.5, -0.25 * number) for number in range(2, len(ATTACKS))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    home = tmp_path_factory.mktemp("judged")
    write_rows_file(home / "rows.jsonl")
    names = {f"one {ATTACKS[2]}": ODDS, f"other {ATTACKS[0]}": OTHER_ODDS}
    return [
        write_judging(home / f"run{number}", home / "rows.jsonl", *judge) for number, judge in enumerate(names.items())
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_report(runs) / "report.html"


# what is said of several judges ---------------------------------------------------------------------------------------


def test_two_runs_are_compared_on_the_rows_that_they_share(runs: list[Path], page: Path) -> None:
    one, other = judges_of([read_run(run) for run in runs])
    shared = [key for key in one.verdicts if key in other.verdicts]
    assert len(shared) == len(OTHER_ODDS) < len(one.verdicts)
    of_one, of_other = ([judge.verdicts[key] for key in shared] for judge in (one, other))
    told = json.loads(page.with_name("report.json").read_text())["comparisons"]
    expected = compare(of_other, of_one, 0)
    of_rows = {key: told[0][key] for key in ("p_holm", "changed")}
    assert told == [{"judge": other.name, "against": one.name, "pairs": 8, **expected, **of_rows}]
    assert expected["averaged"]["difference"] == averaged_scores(of_other).mean() - averaged_scores(of_one).mean() != 0
    assert "on 8 shared pairs" in page.with_name("report.md").read_text()


def test_rows_that_cannot_be_read_again_are_shared_by_runs_that_judged_the_same_alone(
    runs: list[Path], tmp_path: Path
) -> None:
    for digest, expected in (("", 10), ("other", 0)):
        other = write_judging(tmp_path / f"of {digest}", runs[0].parent / "rows.jsonl", "other", ODDS)
        results = json.loads((other / "results.json").read_text())
        results["data"]["test_sha256"] = digest or results["data"]["test_sha256"]
        (other / "results.json").write_text(json.dumps(results))
        config = json.loads((other / "config.json").read_text())
        config["data"]["path"] = str(tmp_path / "gone.jsonl")
        (other / "config.json").write_text(json.dumps(config))
        assert len(shared_pairs(*judges_of([read_run(runs[0]), read_run(other)]))[0]) == expected


def test_a_best_of_four_is_not_compared_with_a_verdict_on_a_pair(runs: list[Path], tmp_path: Path) -> None:
    for protocol, expected in (("rate", 10), ("choose", 0)):
        other = write_judging(tmp_path / protocol, runs[0].parent / "rows.jsonl", "other", ODDS)
        config = json.loads((other / "config.json").read_text())
        config["judge"]["protocol"] = protocol
        (other / "config.json").write_text(json.dumps(config))
        assert len(shared_pairs(*judges_of([read_run(runs[0]), read_run(other)]))[0]) == expected


def test_what_changed_is_told_row_by_row(runs: list[Path], page: Path) -> None:
    """By hand: of the pairs 2 to 9, `one` is right where first > 0 > second, `other` where number > 0."""

    def outcome(first: float, second: float) -> str:
        return "win" if first > 0 > second else "loss" if first < 0 < second else "tie"

    expected = {
        number: (outcome(*ODDS[number]), outcome(*OTHER_ODDS[number]))
        for number in OTHER_ODDS
        if outcome(*ODDS[number]) != outcome(*OTHER_ODDS[number])
    }
    [told] = json.loads(page.with_name("report.json").read_text())["comparisons"]
    assert {int(one["id"].split()[0]): (one["was"], one["now"]) for one in told["changed"]} == expected != {}
    table = page.with_name("report.md").read_text().partition("## What changed")[2].partition("## Rows")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")
    ]
    counts = {cells[row][0].strip(): [int(cell) for cell in cells[row][1:]] for row in range(2, 6)}
    stayed = [sum(counts[says][place] for place, says in enumerate(SAYS.values()))]
    assert stayed[0] == 8 - len(expected) and sum(map(sum, counts.values())) == 8


def test_rows_of_one_name_and_other_texts_are_not_shared(runs: list[Path], tmp_path: Path) -> None:
    lines = (runs[0].parent / "rows.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"rejected": "attacked"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    attacked = write_judging(tmp_path / "run", tmp_path / "rows.jsonl", "attacked", ODDS)
    one, other = judges_of([read_run(runs[0]), read_run(attacked)])
    assert {key[0] for key in one.verdicts if key not in other.verdicts} == {row["id"]}


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_texts_of_rows_that_are_gone_or_changed_are_left_out_and_it_is_said(tmp_path: Path, fault: str) -> None:
    write_rows_file(tmp_path / "rows.jsonl")
    run = write_judging(tmp_path / "run", tmp_path / "rows.jsonl", "judge", ODDS)
    write_report([run])
    assert "Rejected answer" in (run / "report.html").read_text()
    if fault == "gone":
        (tmp_path / "rows.jsonl").unlink()
    else:
        (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("right ", "RIGHT "))
    write_report([run])
    for name in ("report.html", "report.md"):
        text = (run / name).read_text()
        assert "Rejected answer" not in text
        assert {"gone": "there is no such file", "changed": "no longer holds the rows"}[fault] in text


def test_a_judge_that_says_what_another_one_said_is_compared_all_the_same(runs: list[Path], tmp_path: Path) -> None:
    again = write_judging(tmp_path / "run", runs[0].parent / "rows.jsonl", "again", ODDS)
    text = (write_report([runs[0], again]) / "report.md").read_text()
    assert "again: order-averaged accuracy" in text and "(+0.0 points" in text and "on 10 shared pairs" in text


def test_the_command_compares_runs_and_says_where(runs: list[Path], capsys) -> None:
    assert main([*map(str, runs)]) == 0
    assert capsys.readouterr().out == f"report: {runs[0] / 'compared' / 'report.html'}\n"


# what the page is -----------------------------------------------------------------------------------------------------


def test_a_long_answer_is_cut_with_a_note(page: Path) -> None:
    text = page.read_text()
    assert f"[cut: the first {MOST_CHARACTERS:,} of 1,000,006 characters]" in text
    assert "A" * (MOST_CHARACTERS + 1) not in text and len(text) < 400_000


def test_marks_that_turn_or_hide_text_are_spelled_out() -> None:
    nasty = "a\u202eb\u200bc\x00d\ud800e\U000e0041f é 漢 \u200d"
    page = Page(nasty, [], {"rows": [Table(nasty, [(nasty, nasty)])]})
    line = chart(nasty, Axis(nasty), Axis(nasty), [Mark(nasty, [0, 1], [0, 1])])
    for text in (to_html(page), to_markdown(page), bars(nasty, {nasty: [(0.5, (0.4, 0.6))]}, [nasty]), line):
        assert "a[U+202E]b[U+200B]c[U+0000]d[U+D800]e[U+E0041]f é 漢 \u200d" in text
        assert not re.search("[\u202e\u200b\x00\ud800\U000e0041]", text)
        text.encode()


def test_tables_pictures_and_filters_are_named_for_those_who_do_not_see_them(page: Path) -> None:
    text = page.read_text()
    assert text.count("<table>") == text.count("<caption>") > 10 and '<html lang="en">' in text
    assert not re.search(r"<th(?! scope=\"(row|col)\")[ >]", text)
    assert text.count("<svg ") == text.count('role="img"><title>') > 2
    assert text.count("<select ") == text.count("<label>") == 4
    assert [len(re.findall(f"<{landmark}[ >]", text)) for landmark in ("header", "nav", "main", "h1")] == [1, 1, 1, 1]
    assert len(re.findall(r'<div class="wide" role="region" tabindex="0" aria-label="', text)) == text.count("<table>")


# in a browser ---------------------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path, probe: str = "", *, dark: bool = False, width: int = 500) -> str:
    """The document as the browser has it after its scripts; a `probe` is one more, on a copy that allows it.

    A window is never narrower than 500, so that narrower ones are a frame of it, which media queries go by as well.
    """
    if probe:
        text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
        page = folder / "probed.html"
        page.write_text(text.replace("</body>", f"<script>(top ?? self).postMessage({probe}, '*')</script></body>"))
        frame = folder / "frame.html"
        tell = "<script>onmessage = (told) => (document.documentElement.dataset.told = told.data)</script>"
        style = f"style='width: {width}px; height: 900px; border: 0; color-scheme: light dark'"
        frame.write_text(f"<!doctype html>{tell}<iframe src='{page.name}' {style}></iframe>")
        page = frame
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    options += [f"--window-size={width + 40},900", "--virtual-time-budget=2000"]
    options += ["--blink-settings=preferredColorScheme=0"] * dark
    command = [str(BROWSER), *options, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def ask(page: Path, folder: Path, probe: str, *, dark: bool = False, width: int = 500) -> Any:
    """What a function in JavaScript, run in the page with all of it open, returns."""
    opened = "for (const one of document.querySelectorAll('details')) one.open = true;"
    told = browse(page, folder, f"JSON.stringify((() => {{ {opened} return ({probe})(); }})())", dark=dark, width=width)
    found = re.search('data-told="([^"]*)"', told)
    assert found, "the probe said nothing"
    return json.loads(html.unescape(found[1]))


@in_a_browser
def test_rows_with_markup_are_inert(page: Path, tmp_path: Path) -> None:
    document = browse(page, tmp_path)
    assert "data-owned" not in document
    source = page.read_text()
    for tag in ("script", "details", "main", "style", "section", "table", "svg"):
        assert document.count(f"<{tag}") == source.count(f"<{tag}") > 0
    for tag in ("img", "iframe", "base", "b"):
        assert not re.search(f"<{tag}[ />]", document)
    for text in ATTACKS[:7]:
        shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f"wrong {shown}" in document
    assert " rows shown" in document  # its own script ran


@in_a_browser
def test_the_policy_stops_a_script_that_would_come_through(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</main>", f"<script>{OWN}</script><img src=x onerror='{OWN}'></main>"))
    document = browse(copy, tmp_path)
    assert "data-owned" not in document and " rows shown" in document


FILTER = """() => {
  const out = [], cases = [...document.querySelectorAll("#cases > details")];
  const set = (values) => {
    for (const name of ["why", "subset", "judge", "outcome"]) form.elements[name].value = values[name] ?? "";
    form.dispatchEvent(new Event("change"));
    out.push(cases.filter((one) => !one.hidden).map((one) => one.dataset.said).join("|"));
  };
  set({}); set({ outcome: "win" }); set({ judge: "0", outcome: "tie" }); set({ subset: "3" });
  return out;
}"""


@in_a_browser
def test_the_filters_show_what_fits_and_hide_the_rest(page: Path, tmp_path: Path) -> None:
    every, wins, ties, subset = (part.split("|") for part in ask(page, tmp_path, FILTER))
    assert len(every) == page.read_text().count("<details id=")
    assert wins == [said for said in every if "win" in said.split()] != every
    assert ties == [said for said in every if said.split()[0] == "tie"] != [] and len(subset) == 1


LIST = """() => {
  const list = document.querySelector("details.list"), select = list.querySelector("select"), out = [];
  for (const { value } of select.options) {
    select.value = value;
    select.dispatchEvent(new Event("change"));
    const there = [...list.querySelectorAll("tbody tr")].filter((row) => row.offsetHeight > 0);
    out.push([value, there.map((row) => [...row.cells].map((cell) => cell.textContent))]);
  }
  form.elements.judge.value = "0";
  form.elements.outcome.value = "invalid";
  form.dispatchEvent(new Event("change"));
  const hidden = document.querySelectorAll("#cases > [hidden]").length;
  for (const one of document.querySelectorAll("#cases > details")) one.open = false;
  const link = list.querySelector("a"), linked = document.querySelector(link.hash);
  link.click();
  return [out, hidden, link.textContent, linked.querySelector(".id").textContent, linked.open, linked.hidden];
}"""


@in_a_browser
def test_the_list_of_what_changed_is_filtered_and_leads_to_the_rows(page: Path, tmp_path: Path) -> None:
    [told] = json.loads(page.with_name("report.json").read_text())["comparisons"]
    expected = [[SAYS[one["was"]], SAYS[one["now"]]] for one in told["changed"]]
    (every, *kinds), hidden, name, linked, opened, away = ask(page, tmp_path, LIST)
    assert every[0] == "" and [[cell.split(" ", 1)[1] for cell in row[2:]] for row in every[1]] == expected
    assert [row[0] for row in every[1]] == [visible(one["id"]) for one in told["changed"]]
    assert [row[1] for row in every[1]] == [visible(one["subset"]) for one in told["changed"]]
    assert sorted(row for _, rows in kinds for row in rows) == sorted(every[1]) and len(kinds) > 1
    assert all(" → ".join(row[2:]) == kind for kind, rows in kinds for row in rows)
    assert hidden > 0 and (name, opened, away) == (linked, True, False)


def test_a_long_list_of_what_changed_is_cut_with_a_note(runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dpo.report.MOST_CHANGED", 2)
    home = write_report(runs, home=tmp_path)
    [told] = json.loads((home / "report.json").read_text())["comparisons"]
    [listed] = re.findall('<details class="list">.*?</details>', (home / "report.html").read_text(), flags=re.S)
    note = f"{len(told['changed'])} pairs that "
    assert note in listed and listed.count("<tr>") == 1 + 2 < len(told["changed"])
    for name in ("report.html", "report.md"):
        assert (
            note in (text := (home / name).read_text()) and "(cut: the first 2; all of them are in report.json)" in text
        )


@in_a_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_answers_stand_side_by_side_where_there_is_room_and_nothing_scrolls_the_page(
    page: Path, tmp_path: Path, width: int
) -> None:
    probe = """() => [
      innerWidth,
      document.documentElement.scrollWidth,
      [...document.querySelectorAll(".texts")].map((one) =>
        [...one.children].slice(1).map((part) => part.getBoundingClientRect()).map(({ top, left }) => [top, left])),
      [...document.querySelectorAll("svg.plot text")].filter((text) => {
        const { left, right } = text.getBoundingClientRect(), around = text.closest("svg").getBoundingClientRect();
        return left < around.left || right > around.right;
      }).map((text) => text.textContent),
    ]"""
    inner, scrolled, answers, cut = ask(page, tmp_path, probe, width=width)
    assert inner == scrolled == width and len(answers) > 5 and cut == []
    for (top, left), (other_top, other_left) in answers:
        assert (
            (top == other_top and left + 300 < other_left) if width > 1000 else (top < other_top and left == other_left)
        )


KEYS = """() => {
  const seen = (one) => one.checkVisibility({ visibilityProperty: true });
  const all = [...document.body.querySelectorAll("*")].filter(seen);
  const stops = all.filter((one) => one.matches("a[href], button, input, select, textarea, summary, [tabindex]"));
  const scrolls = all.filter((one) => /auto|scroll/.test(getComputedStyle(one).overflow));
  const named = (one) => one.ariaLabel || (one.labels ? (one.labels[0]?.firstChild.data ?? "") : one.textContent);
  return {
    kinds: [...new Set(stops.map((one) => one.localName))].sort(),
    order: stops.filter((one) => one.tabIndex !== 0).length,
    unreachable: scrolls.filter((one) => !stops.includes(one)).length,
    unnamed: stops.filter((one) => !named(one).trim()).length,
    unseen: stops.filter((one) => {
      one.focus();
      const { outlineStyle, outlineWidth, outlineColor } = getComputedStyle(one), box = one.getBoundingClientRect();
      const there = box.width > 0 && box.right > 0 && document.activeElement === one;
      return !there || outlineStyle !== "solid" || parseFloat(outlineWidth) < 2 || /, 0\\)/.test(outlineColor);
    }).map((one) => one.outerHTML.slice(0, 80)),
    headings: all.filter((one) => /^h[1-6]$/.test(one.localName)).map((one) => +one.localName[1]),
  };
}"""


@in_a_browser
def test_all_that_can_be_used_is_reached_by_keyboard_in_order_is_named_and_shows_its_focus(
    page: Path, tmp_path: Path
) -> None:
    told = ask(page, tmp_path, KEYS)
    assert told["kinds"] == ["a", "div", "pre", "select", "summary"]
    assert [told[fault] for fault in ("order", "unreachable", "unnamed", "unseen")] == [0, 0, 0, []]
    levels = told["headings"]
    assert levels[0] == 1 and levels.count(1) == 1 and {2, 3} < set(levels)
    assert all(level <= before + 1 for before, level in zip(levels, levels[1:], strict=False))


CONTRAST = """() => {
  const parsed = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (one) => {
    const [r, g, b, alpha = 1] = one ? parsed(getComputedStyle(one).backgroundColor) : [255, 255, 255];
    return alpha === 0 ? paper(one.parentElement) : [r, g, b];
  };
  const found = {};
  for (const one of document.querySelectorAll("body, body *")) {
    const own = [...one.childNodes].some((part) => part.nodeType === 3 && part.data.trim());
    if (!own || /^(script|title|desc)$/.test(one.localName)) continue;
    const style = getComputedStyle(one), ink = parsed(one.closest("svg") ? style.fill : style.color);
    const [high, low] = [light(ink), light(paper(one))].sort((a, b) => b - a);
    const kind = `${one.localName}.${one.getAttribute("class") ?? ""}`;
    found[kind] = Math.min(found[kind] ?? 99, (high + 0.05) / (low + 0.05));
  }
  return found;
}"""


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_paper_light_and_dark(page: Path, tmp_path: Path, dark: bool) -> None:
    told = ask(page, tmp_path, CONTRAST, dark=dark)
    assert {"a.", "p.verdict", "caption.", "span.chip win", "span.chip loss", "div.text", "text.", "bdi.id"} < set(told)
    assert {kind: ratio for kind, ratio in told.items() if ratio < 4.5} == {}


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_dark_where_the_reader_has_it_so(page: Path, tmp_path: Path, dark: bool) -> None:
    probe = "() => [getComputedStyle(document.body)].map((of) => [of.backgroundColor, of.color])[0]"
    paper, ink = (sum(map(int, re.findall(r"\d+", colour))) for colour in ask(page, tmp_path, probe, dark=dark))
    assert (paper < ink) == dark
