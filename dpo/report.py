"""python -m dpo.report RUN_FOLDER: a run on one page, as report.md, as report.html (one file) and as plots.

    config.json + env.json + results.json + metrics.jsonl -> blocks -> markdown, and the same blocks -> HTML

Everything comes from the files, so a report can be made again at any time. No dimension letters. Read next:
dpo/plots.py, and dpo/judge/statistics.py, where the figures come from.
"""

import base64
import html
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pydantic import ValidationError

from dpo.alarms import ALARMS
from dpo.config import Config
from dpo.judge.statistics import PairedTest
from dpo.plots import PLOTS, draw
from dpo.results import Alarm, Environment, Judgement, Results, read_metrics, widest_interval
from models.errors import UserError
from models.files import atomic_write_bytes, atomic_write_text, read_json_object

USAGE = "usage: python -m dpo.report RUN_FOLDER"


@dataclass(frozen=True)
class Text:
    """One line of text; a `plot` is given by its name, a `command` may have several lines."""

    kind: Literal["title", "heading", "verdict", "paragraph", "command", "plot"]
    text: str


@dataclass(frozen=True)
class Table:
    """The first row is the header; the first column holds names, the others figures."""

    rows: Sequence[tuple[str, ...]]


Block = Text | Table


# --- numbers in words -----------------------------------------------------------------------------------------------


def _percent(share: float, interval: Sequence[float] = ()) -> str:
    ends = ", ".join(f"{100 * end:.1f}" for end in interval)
    return f"{100 * share:.1f} %" + (f" [{ends}]" if ends else "")


def _points(test: PairedTest) -> tuple[str, str]:
    """The difference and its interval in percentage points, never as -0.0."""
    lead, low, high = (f"{round(100 * share, 1) + 0.0:+.1f}" for share in (test["difference"], *test["interval"]))
    return lead, f"[{low}, {high}]"


def _p(*p: float) -> str:
    """The largest of them."""
    return "< 1e-4" if max(p) < 1e-4 else f"{max(p):.2g}"


def _duration(time_s: float) -> str:
    if time_s < 60:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- what the page says ---------------------------------------------------------------------------------------------


def report_blocks(config: Config, results: Results, environment: Environment, folder_name: str) -> list[Block]:
    """The page."""
    judge = results["judge"]
    plots = [Text("plot", name) for name in PLOTS if config.log.plots]
    sections: dict[str, Sequence[Block]] = {
        "Before and after": _before_and_after(judge),
        "By subset": _by_subset(judge),
        "Controls: judges that have learnt nothing about judging": _controls(judge),
        "Training": [_training(results), *plots],
        "Alarms": _alarms(results["alarms"]),
        "Data": _data(results, config),
        "Time": [_time(results["time_s"])],
        "Again": _again(config, environment, folder_name),
    }
    page = [Text("title", f"{config.exp}: is it a better judge?"), *_summary(judge, config, folder_name)]
    return [*page, *(block for name, blocks in sections.items() for block in (Text("heading", name), *blocks))]


def _summary(judge: Judgement, config: Config, folder_name: str) -> list[Text]:
    """The sentence that says it all, the same for the other accuracy, and what was run."""
    base, trained, tests = judge["base"], judge["trained"], judge["comparison"]

    def change(before: float, after: float, test: PairedTest) -> str:
        (lead, interval), p = _points(test), _p(test["p"], test["p_clustered"])
        p = p if p.startswith("<") else f"= {p}"
        return f"{_percent(before)} -> {_percent(after)} ({lead} points, 95 % interval {interval}, p {p})"

    lora, loss, train = config.lora, config.loss, config.train
    unit = "rows" if config.judge.pairs_per_row == 1 else "pairs"
    how = f"{'DoRA' if lora.dora else 'LoRA'} of rank {lora.rank}" if lora.rank else "full fine-tuning"
    how += f", going on from {config.model.adapter}" if config.model.adapter else ""
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs} epochs"
    verdict = (
        f"Order-averaged accuracy "
        f"{change(base['averaged_accuracy'], trained['averaged_accuracy'], tests['averaged'])} on {trained['n']:,} "
        f"held-out {unit}; {judge['conclusion']}."
    )
    consistent = (
        f"Consistent accuracy {change(base['accuracy'], trained['accuracy'], tests['consistent'])}. It counts a "
        "verdict as right only if both orders of the answers give it: a coin that sticks to its verdict has 50 %, a "
        "judge that always says A has 0 %. In the order-averaged accuracy the preferred place cancels, and both have "
        "50 %."
    )
    losses = " + ".join((loss.name, *loss.mix))
    setup = (
        f"Run {folder_name}: {config.model.path}, objective {config.objective}, {losses} loss with beta "
        f"{loss.beta:g}, {how}, learning rate {train.lr:g} ({train.schedule}), {epochs}, seed {config.seed}; rows: "
        f"{config.data.path}. The judge {'sees the request' if config.judge.sighted else 'does not see the request'}, "
        "and is asked in both orders."
    )
    return [Text("verdict", verdict), Text("paragraph", consistent), Text("paragraph", setup)]


def _before_and_after(judge: Judgement) -> list[Block]:
    judges = (judge["base"], judge["trained"])
    figures = [
        ("judge", "base", "trained"),
        ("judged pairs", *(f"{j['n']:,}" for j in judges)),
        ("order-averaged accuracy", *(_percent(j["averaged_accuracy"], widest_interval(j)) for j in judges)),
        ("consistent accuracy", *(_percent(j["accuracy"], j["accuracy_interval"]) for j in judges)),
        ("wins / losses / ties / invalid", *("{wins} / {losses} / {ties} / {invalid}".format(**j) for j in judges)),
        ("same verdict in both orders", *(_percent(j["position_consistency"]) for j in judges)),
        ("says A", *(_percent(j["raw_a_rate"]) for j in judges)),
    ]
    averaged, consistent = judge["comparison"]["averaged"], judge["comparison"]["consistent"]
    tests = [("trained less base", "points", "95 % interval", "p, exact", "p, by group", "better / worse")]
    for name, test in (("order-averaged", averaged), ("consistent", consistent)):
        better = f"{test['wins_only_a']} / {test['wins_only_b']}"
        tests.append((name, *_points(test), _p(test["p"]), _p(test["p_clustered"]), better))
    text = (
        "In brackets: 95 % intervals in per cent, Wilson's, or over groups of rows where that is wider. "
        "p: McNemar's exact test over pairs, and a sign-flip test over groups of rows that belong together; "
        "the first line of the page quotes the larger. A true difference of "
        f"{100 * averaged['minimum_detectable']:.1f} points would be found four times in five."
    )
    return [Table(figures), Table(tests), Text("paragraph", text)]


def _by_subset(judge: Judgement) -> list[Block]:
    rows = [("subset", "pairs", "averaged, base", "averaged, trained", "consistent, base", "consistent, trained", "is")]
    for name, trained in judge["trained"]["subsets"].items():
        base, interval = judge["base"]["subsets"][name], widest_interval(trained)
        averaged = _percent(base["averaged_accuracy"]), _percent(trained["averaged_accuracy"], interval)
        consistent = _percent(base["accuracy"]), _percent(trained["accuracy"], trained["accuracy_interval"])
        what = "above chance" if interval[0] > 0.5 else "below chance" if interval[1] < 0.5 else "at chance"
        rows.append((name, f"{trained['n']:,}", *averaged, *consistent, what))
    meaning = "At chance: the interval of the trained judge's order-averaged accuracy contains 50 %."
    return [Table(rows), Text("paragraph", meaning)]


def _controls(judge: Judgement) -> list[Block]:
    trained = judge["trained"]
    rows = [("judge", "consistent", "order-averaged", "trained leads by", "95 % interval", "p", "p, corrected")]
    rows += [("trained", _percent(trained["accuracy"]), _percent(trained["averaged_accuracy"]), "", "", "", "")]
    for name, control in judge["controls"].items():
        accuracies, test = (_percent(control["accuracy"]), _percent(control["averaged_accuracy"])), control["averaged"]
        rows.append((name, *accuracies, *_points(test), _p(test["p"], test["p_clustered"]), _p(test["p_holm"])))
    text = (
        f"The trained judge is {judge['conclusion']}. Its lead, in points, and the tests are of the order-averaged "
        f"accuracy on the same pairs. Corrected: {judge['correction']}. A control counts as beaten below "
        f"{judge['alpha']:g}."
    )
    return [Table(rows), Text("paragraph", text)]


def _training(results: Results) -> Table:
    rows = {
        "": "training",
        "optimizer steps": "{train[steps]:,}",
        "pairs": "{train[pairs]:,}",
        "tokens": "{train[tokens]:,}",
        "time in steps": "{train[time_s]:,.1f} s",
        "tokens/s": "{train[tokens_per_s]:,.0f}",
        "peak memory": "{train[peak_rss_mib]:,.0f} MiB",
        "reference log-probs": "{reference[hits]:,} found, {reference[misses]:,} computed",
        "arithmetic": "{train[dtype]}",
        "weights judged and exported": "of step {train[best_step]:,}",
        "loss before the first update": "{step0_loss:.6f}",
        "policy less reference then, at most": "{step0_max_difference:.2g} nats a completion",
    }
    return Table([(name, figure.format_map(results)) for name, figure in rows.items()])


def _alarms(alarms: Sequence[Alarm]) -> list[Block]:
    if not alarms:
        return [Text("paragraph", f"None of {', '.join(ALARMS)}.")]
    rows = [("alarm", "first after step", "value")]
    rows += [(alarm["name"], f"{alarm['step']:,}", f"{alarm['value']:.3g}") for alarm in alarms]
    lines = [Text("paragraph", "{name}: {value:.3g} {meaning}. Try: {advice}.".format_map(alarm)) for alarm in alarms]
    return [Table(rows), *lines]


def _data(results: Results, config: Config) -> list[Block]:
    data = results["data"]
    counts = {"rows": data["rows"], "pairs": data["pairs"], "groups": data["groups"]}
    counts |= {f"rows of {name}": of_subset for name, of_subset in data["subsets"].items()}
    rows = [(name, *(f"{count:,}" for count in of_split.values())) for name, of_split in counts.items()]
    notes = f"Leaks between the splits: {', '.join(f'{count} by {kind}' for kind, count in data['leaks'].items())}"
    notes += f"; unused rows: {data['unused_rows']:,}" if data["unused_rows"] else ""
    notes += "".join(f"; dropped, {reason}: {count:,}" for reason, count in data["dropped"].items())
    for name, most in (("data.rows", config.data.rows), ("judge.rows", config.judge.rows)):
        notes += f"; {name} took {most:,} rows of these at most" if most else ""
    noted = {
        "rows left out as too long": data["too_long"],
        "rows whose prompt was cut from the left": data["truncated"],
        "rows with an answer that the tokenizer would join to its prompt": data["boundary_differs"],
    }
    for name, of_split in noted.items():
        told = ", ".join(f"{count:,} {split}" for split, count in of_split.items())
        notes += f"; {name}: {told}" if any(of_split.values()) else ""
    return [Table([("", *data["rows"]), *rows]), Text("paragraph", f"{notes}.")]


def _time(time_s: dict[str, float]) -> Table:
    whole = sum(time_s.values())
    rows = [(name, _duration(spent), _percent(spent / whole)) for name, spent in time_s.items()]
    return Table([("stage", "time", "share"), *rows, ("all", _duration(whole), "")])


def _again(config: Config, environment: Environment, folder_name: str) -> list[Block]:
    report = f"python -m dpo.report {Path(config.run.root) / config.exp / folder_name}"
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    begun = f"Begun on {machine}; {versions}; commit {git['commit']}{', with changes' if git['dirty'] else ''}."
    return [Text("command", f"{environment['command']}\n{report}"), Text("paragraph", begun)]


# --- the blocks as text ---------------------------------------------------------------------------------------------


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub-flavoured markdown."""
    return "\n\n".join(map(_block_as_markdown, blocks)) + "\n"


def _block_as_markdown(block: Block) -> str:
    if isinstance(block, Table):
        cells = [[_escaped(cell) for cell in row] for row in block.rows]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        header, *rows = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
        return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
    if block.kind == "command":
        return "\n".join(f"    {line}" for line in block.text.splitlines())
    if block.kind == "plot":
        return f"![{_escaped(PLOTS[block.text][0])}](plots/{block.text}.png)"
    return {"title": "# {}", "heading": "## {}", "verdict": "**{}**"}.get(block.kind, "{}").format(_escaped(block.text))


def _escaped(text: str) -> str:
    """Any text as one line of plain markdown; a bracket is only escaped where it would begin a link's target."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*|~$&]|<(?=[A-Za-z/!?])|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


STYLE = """
:root { color-scheme: light; --ink: #1d2129; --soft: #667080; --line: #dfe3e8; --blue: #1f5a99; }
body { margin: 0 auto; max-width: 56rem; padding: 1.2rem 1rem 3rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .6rem 0; color: var(--soft); font-size: .92rem; overflow-wrap: anywhere; }
p.verdict { padding: .8rem 1rem; border-left: 4px solid var(--blue); background: #f1f6fb; color: var(--ink);
            font-size: 1.08rem; font-weight: 600; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td:first-child { min-width: 7rem; white-space: normal; overflow-wrap: anywhere; }
th { white-space: normal; vertical-align: bottom; border-bottom-width: 2px; color: var(--soft); font-size: .82rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { overflow-x: auto; padding: .7rem .9rem; background: #f5f6f8; border-radius: 6px; font-size: .85rem; }
img { display: block; width: 100%; max-width: 44rem; height: auto; margin: 1rem 0; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem .35rem; } }
"""


def to_html(blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """The page as one HTML file that needs no other: the pictures, PNGs by name, stand in it."""
    title = next(html.escape(block.text) for block in blocks if isinstance(block, Text))
    body = "\n".join(_block_as_html(block, pictures) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block_as_html(block: Block, pictures: dict[str, bytes]) -> str:
    if isinstance(block, Table):
        tags = ["th", *["td"] * (len(block.rows) - 1)]
        table = ""
        for tag, row in zip(tags, block.rows, strict=True):
            table += f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>\n"
        return f'<div class="wide"><table>\n{table}</table></div>'
    if block.kind == "plot":
        data = base64.b64encode(pictures[block.text]).decode("ascii")
        return f'<img alt="{html.escape(PLOTS[block.text][0])}" src="data:image/png;base64,{data}">'
    return {
        "title": "<h1>{}</h1>",
        "heading": "<h2>{}</h2>",
        "verdict": '<p class="verdict">{}</p>',
        "paragraph": "<p>{}</p>",
        "command": "<pre><code>{}</code></pre>",
    }[block.kind].format(html.escape(block.text))


# --- from folder to files -------------------------------------------------------------------------------------------


def write_report(folder: Path) -> None:
    """Write report.md, report.html and (log.plots) plots/*.png; UserError where a file is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder; give that of a finished run. {USAGE}")
    try:
        config = Config.model_validate(read_json_object(folder / "config.json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / 'config.json'}: {key}: {first['msg']}; the file was altered") from None
    results = cast(Results, read_json_object(folder / "results.json"))
    environment = cast(Environment, read_json_object(folder / "env.json"))
    metrics = read_metrics(folder / "metrics.jsonl")
    try:  # with a file as the run wrote it there is nothing that could raise
        blocks = report_blocks(config, results, environment, folder.resolve().name)
        pictures = {name: draw(name, metrics, results) for name in PLOTS if config.log.plots}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fault = f"without the key {error}" if isinstance(error, KeyError) else f"not as a run writes it ({error})"
        place = f"{folder / 'results.json'} or {folder / 'env.json'}"
        raise UserError(f"{place}: {fault}; the file was altered, or is of another version") from error
    for name, picture in pictures.items():
        atomic_write_bytes(folder / "plots" / f"{name}.png", picture)
    atomic_write_text(folder / "report.md", to_markdown(blocks))
    atomic_write_text(folder / "report.html", to_html(blocks, pictures))


def main(argv: list[str]) -> int:
    """The command line: exit code 0 when the report is written, 2 for a user's mistake."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    try:
        if len(argv) != 1:
            raise UserError(f"give one run folder, not {len(argv)} arguments. {USAGE}")
        write_report(Path(argv[0]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {Path(argv[0]) / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
