"""What one run says of itself on the page: verdict, controls, training, alarms, data, time, how to repeat it.

No dimension letters. Read next: dpo/report.py, which puts the page together.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from dpo.alarms import ALARMS
from dpo.config import Config
from dpo.judge.controls import SURFACE_ROWS
from dpo.judge.statistics import PairedTest
from dpo.judged import Run
from dpo.page import Block, Table, Text
from dpo.results import Alarm, Judgement, Results

NOTES = tomllib.loads(Path(__file__).with_name("report.toml").read_text(encoding="utf-8"))

# --- numbers in words -----------------------------------------------------------------------------------------------


def percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    """12.3 %, and the interval in brackets; - where there is none."""
    ends = ", ".join(f"{100 * end:.1f}" for end in interval or ())
    return "-" if share is None else f"{100 * share:.1f} %" + (f" [{ends}]" if ends else "")


def points(test: PairedTest) -> tuple[str, str]:
    """The difference and its interval in percentage points, never as -0.0."""
    lead, low, high = (f"{100 * share:+z.1f}" for share in (test["difference"], *test["interval"]))
    return lead, f"[{low}, {high}]"


def p_value(*p: float) -> str:
    """The largest of them."""
    return "< 1e-4" if max(p) < 1e-4 else f"{max(p):.2g}"


def duration(time_s: float) -> str:
    """In seconds, minutes or hours."""
    if time_s < 60:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def change(before: float, after: float, test: PairedTest, *corrected: float) -> str:
    """Two accuracies, and the test of their difference, with its p as `corrected` where it is."""
    (lead, interval), p = points(test), p_value(test["p"], test["p_clustered"], *corrected)
    p = p if p.startswith("<") else f"= {p}"
    return f"{percent(before)} -> {percent(after)} ({lead} points, 95 % interval {interval}, p {p})"


# --- its sections ---------------------------------------------------------------------------------------------------


def verdict(judge: Judgement, config: Config) -> tuple[str, str]:
    """The sentence that says it all, and the same for the other accuracy."""
    base, trained, tests = judge["base"], judge["trained"], judge["comparison"]
    unit = "rows" if config.judge.pairs_per_row == 1 else "pairs"
    averaged = change(base["averaged_accuracy"], trained["averaged_accuracy"], tests["averaged"])
    return (
        f"Order-averaged accuracy {averaged} on {trained['n']:,} held-out {unit}; {judge['conclusion']}.",
        f"Consistent accuracy {change(base['accuracy'], trained['accuracy'], tests['consistent'])}.",
    )


def summary(run: Run) -> list[Text]:
    """The verdict, and what was run."""
    config = run.config
    averaged, consistent = verdict(run.results["judge"], config)
    lora, loss, train = config.lora, config.loss, config.train
    how = f"{'DoRA' if lora.dora else 'LoRA'} of rank {lora.rank}" if lora.rank else "full fine-tuning"
    how += f", going on from {config.model.adapter}" if config.model.adapter else ""
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs} epochs"
    losses = " + ".join((loss.name, *loss.mix))
    setup = (
        f"Run {run.folder.name}: {config.model.path}, objective {config.objective}, {losses} loss with beta "
        f"{loss.beta:g}, {how}, learning rate {train.lr:g} ({train.schedule}), {epochs}, seed {config.seed}; rows: "
        f"{config.data.path}. The judge {'sees the request' if config.judge.sighted else 'does not see the request'}, "
        "and is asked in both orders."
    )
    return [
        Text("verdict", averaged),
        Text("paragraph", f"{consistent} {NOTES['consistent']}"),
        Text("paragraph", setup),
    ]


def controls(judge: Judgement) -> list[Block]:
    """The trained judge against each control."""
    trained = judge["trained"]
    rows = [("judge", "consistent", "order-averaged", "trained leads by", "95 % interval", "p", "p, corrected")]
    rows += [("trained", percent(trained["accuracy"]), percent(trained["averaged_accuracy"]), "", "", "", "")]
    for name, control in judge["controls"].items():
        accuracies, test = (percent(control["accuracy"]), percent(control["averaged_accuracy"])), control["averaged"]
        rows.append(
            (name, *accuracies, *points(test), p_value(test["p"], test["p_clustered"]), p_value(test["p_holm"]))
        )
    text = NOTES["controls"].format_map({**judge, "rows": SURFACE_ROWS})
    return [Table("Controls, on the same pairs", rows), Text("paragraph", text)]


def training(results: Results) -> Table:
    """Its size, pace and arithmetic."""
    rows = [(name, figure.format_map(results)) for name, figure in NOTES["training"].items()]
    return Table("Size and pace", [("", "training"), *rows])


def critiques(results: Results) -> list[Table]:
    """What the judge wrote in each round, and what of it was trained on; none without objective=critiques."""
    rounds = results.get("critiques", [])
    names = list(dict.fromkeys(name for counts in rounds for name in counts))
    rows = [(name, *(f"{counts.get(name, 0):,}" for counts in rounds)) for name in names]
    header = ("", *(f"round {number}" for number in range(1, len(rounds) + 1)))
    return [Table("Critiques by round", [header, *rows])] if rounds else []


def alarms(told: Sequence[Alarm]) -> list[Block]:
    """What went wrong, and what to try."""
    if not told:
        return [Text("paragraph", f"None of {', '.join(ALARMS)}.")]
    rows = [("alarm", "first after step", "value")]
    rows += [(alarm["name"], f"{alarm['step']:,}", f"{alarm['value']:.3g}") for alarm in told]
    lines = [Text("paragraph", "{name}: {value:.3g} {meaning}. Try: {advice}.".format_map(alarm)) for alarm in told]
    return [Table("Alarms, by first step", rows), *lines]


def data(results: Results, config: Config) -> list[Block]:
    """Rows by split, what was left out, and leaks."""
    of = results["data"]
    counts = {"rows": of["rows"], "pairs": of["pairs"], "groups": of["groups"]}
    counts |= {f"rows of {name}": of_subset for name, of_subset in of["subsets"].items()}
    rows = [(name, *(f"{count:,}" for count in of_split.values())) for name, of_split in counts.items()]
    notes = f"Leaks between the splits: {', '.join(f'{count} by {kind}' for kind, count in of['leaks'].items())}"
    notes += f"; unused rows: {of['unused_rows']:,}" if of["unused_rows"] else ""
    notes += "".join(f"; dropped, {reason}: {count:,}" for reason, count in of["dropped"].items())
    attacked = ", ".join(f"{count:,} by {family}" for family, count in of.get("attacked", {}).items())
    notes += f"; training rows whose wrong answers attack: {attacked}" if attacked else ""
    for name, most in (("data.rows", config.data.rows), ("judge.rows", config.judge.rows)):
        notes += f"; {name} took {most:,} rows of these at most" if most else ""
    noted = {
        "rows left out as too long": of.get("too_long", {}),
        "rows whose prompt was cut from the left": of.get("truncated", {}),
        "rows with an answer that the tokenizer would join to its prompt": of.get("boundary_differs", {}),
    }
    for name, of_split in noted.items():
        told = ", ".join(f"{count:,} {split}" for split, count in of_split.items())
        notes += f"; {name}: {told}" if any(of_split.values()) else ""
    return [Table("Rows, pairs and groups by split", [("", *of["rows"]), *rows]), Text("paragraph", f"{notes}.")]


def times(time_s: dict[str, float]) -> Table:
    """By stage."""
    whole = sum(time_s.values())
    rows = [(name, duration(spent), percent(spent / whole)) for name, spent in time_s.items()]
    return Table("Time by stage", [("stage", "time", "share"), *rows, ("all", duration(whole), "")])


def again(run: Run) -> list[Block]:
    """How to run it once more, and where it ran."""
    environment = run.environment
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    begun = f"Begun on {machine}; {versions}; commit {git['commit']}{', with changes' if git['dirty'] else ''}."
    return [Text("command", environment["command"]), Text("paragraph", begun)]
