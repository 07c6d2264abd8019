"""What a report says of judges side by side, beyond their verdicts: benchmarks, place, looks, sureness, cost, attacks.

No dimension letters. Read next: dpo/report.py, which puts the page together.
"""

from collections import Counter
from collections.abc import Sequence

from dpo.config import EndpointConfig
from dpo.judge.benchmarks import MOST_ROWS, Benchmark, six_subsets
from dpo.judge.calibration import LEAST_CLUSTERS
from dpo.judge.endpoint import read_price
from dpo.judge.protocols import PROTOCOLS
from dpo.judge.robustness import LIKELIER, Success
from dpo.judge.statistics import reliability
from dpo.judged import Judge
from dpo.page import Block, Plot, Table, Text
from dpo.plots import Axis, Mark, chart
from dpo.report_run import NOTES, percent


def benchmarks(judges: Sequence[Judge]) -> list[Block]:
    """Their own scores, and RewardBench 2's of all six subsets where one model has both of its runs in order."""
    tables: list[Block] = []
    found = [(judge, judge.run.results["benchmark"]) for judge in judges if "benchmark" in judge.run.results]
    for name in dict.fromkeys(benchmark["name"] for _, benchmark in found):
        of = [(judge, benchmark) for judge, benchmark in found if benchmark["name"] == name]
        keys = dict.fromkeys(key for _, benchmark in of for key in benchmark["figures"])
        rows = [(name, *(judge.name for judge, _ in of))]
        rows += [(key, *(_share(benchmark, key) for _, benchmark in of)) for key in keys]
        tables.append(Table(f"{name}: its own score", rows))
    if any(not benchmark["intervals"] for _, benchmark in found):
        why = f"fewer than {LEAST_CLUSTERS} groups of rows, more than {MOST_ROWS:,} rows, or a score that no row moves"
        tables.append(Text("paragraph", f"No interval: {why}."))

    def way(judge: Judge) -> tuple[str, bool, bool]:
        asked = judge.run.config.judge
        return judge.role, asked.sighted, asked.reference_answer

    sixth = {way(judge): ties for judge, ties in found if ties["name"] == PROTOCOLS["ties"].benchmark}
    whole = [("RewardBench 2, its six subsets", "score")]
    for judge, best in found:
        mixed = "Ties" in best["figures"]  # rows of that subset that are no ref:N, tied:N, asked as others are
        if best["name"] == PROTOCOLS["choose"].benchmark and way(judge) in sixth and not mixed:
            whole.append((judge.role, _share(six_subsets(best, sixth[way(judge)]), "score")))
    return [*tables, *[Table("Best of four, and Ties by rating: their unweighted mean", whole)] * (len(whole) > 1)]


def _share(of: Benchmark, key: str) -> str:
    return percent(of["figures"][key], of["intervals"].get(key, ())) if key in of["figures"] else ""


def position(judges: Sequence[Judge]) -> list[Block]:
    """What those that were asked in two orders say in each."""

    def letter(odds: float) -> str:
        return "A" if odds > 0 else "B" if odds < 0 else "-"

    rows: list[tuple[str, ...]] = [
        ("judge", "A, B: right", "B, A: wrong", "A, A: the first", "B, B: the second", "neither", "first less second")
    ]
    for judge in (judge for judge in judges if judge.ordered):
        said = Counter(letter(one.first) + letter(one.second) for one in judge.verdicts.values())
        counts = [said[letters] for letters in ("AB", "BA", "AA", "BB")]
        n = len(judge.verdicts)
        lean = f"{100 * (said['AA'] - said['BB']) / n:+z.1f} points"
        rows.append((judge.name, *(f"{count:,}" for count in (*counts, n - sum(counts))), lean))
    text = "What a judge says where the chosen answer is shown first, and where it is shown second."
    return [Table("Verdicts in both orders", rows), Text("paragraph", text)] if len(rows) > 1 else []


def calibration(judges: Sequence[Judge]) -> list[Block]:
    """How often they are right by how sure they are, of those that give probabilities."""
    marks = [Mark("as often right as sure", (0.5, 1), (0.5, 1), 3, "dashed")]
    rows = [("judge", "pairs", "sure of it, on average", "right")]
    surest, tenths = [], [tenth / 10 for tenth in range(1, 11)]
    for tone, judge in enumerate(judges):
        if judge.summary["brier"] is None:
            continue  # it gave no probabilities
        bins = reliability(list(judge.verdicts.values()))
        for of in bins:
            right = percent(of["accuracy"], of["interval"])
            rows.append((judge.name, f"{of['n']:,}", percent(of["confidence"]), right))
        sure, right_of = [of["confidence"] for of in bins], [of["accuracy"] for of in bins]
        marks.append(Mark(judge.name, sure, right_of, tone, "joined", [of["interval"] for of in bins]))
        surest.append(Mark(judge.name, tenths, judge.summary["selective_accuracy"], tone, "joined"))
    if not surest:
        return []
    covered = "Accuracy on the surest verdicts"
    share = Axis("share of the verdicts, surest first", (0, 1), percent=True), Axis("right", (0, 1), percent=True)
    title = "Accuracy by confidence"
    axes = Axis("confidence of the order-averaged verdict", (0.5, 1), percent=True), Axis("right", (0, 1), percent=True)
    plots = [
        Plot("calibration", title, chart(title, *axes, marks)),
        Plot("coverage", covered, chart(covered, *share, surest)),
    ]
    return [*plots, Table(title, rows)]


def pace(judge: Judge) -> dict[str, float]:
    """Answers a second, and of an endpoint dollars and tokens: what is known of them."""
    pairs, results, endpoint = len(judge.verdicts), judge.run.results, judge.run.results.get("endpoint")
    answers, times = results.get("answers", 2 * pairs), results["time_s"]
    price = endpoint.get("price") if endpoint else read_price(EndpointConfig(model=judge.run.config.model.path))
    figures = {} if price is None else {"dollars_in": 1e6 * price[0], "dollars_out": 1e6 * price[1]}
    if endpoint is None:
        time_s = times.get("judge trained" if judge.role == "trained" else "judge", 0.0)
        return figures | ({"answers_per_s": answers / time_s} if time_s else {})
    asked = answers - endpoint["found"]
    figures |= {"tokens_per_pair": (endpoint["prompt_tokens"] + endpoint["completion_tokens"]) / pairs}
    figures |= {} if endpoint["cost"] is None else {"dollars_per_1000_pairs": 1000 * endpoint["cost"] / pairs}
    return figures | ({"answers_per_s": asked / endpoint["time_s"]} if asked and endpoint["time_s"] else {})


COSTS = {
    "dollars_in": ("list price, dollars a million tokens read", "{:,.2f}"),
    "dollars_out": ("written", "{:,.2f}"),
    "answers_per_s": ("answers a second", "{:,.1f}"),
    "tokens_per_pair": ("tokens a pair", "{:,.0f}"),
    "dollars_per_1000_pairs": ("dollars for 1,000 pairs", "{:,.3f}"),
}


def costs(judges: Sequence[Judge]) -> list[Block]:
    """What their answers take, where anything is known of it, and accuracy against it."""
    paces = {judge.name: pace(judge) for judge in judges}
    if not any(paces.values()):
        return []
    known = [key for key in COSTS if any(key in of for of in paces.values())]
    rows = [("judge", "order-averaged accuracy", *(COSTS[key][0] for key in known))]
    for judge in judges:
        pace_of = paces[judge.name]
        told = (COSTS[key][1].format(pace_of[key]) if key in pace_of else "" for key in known)
        accuracy = percent(judge.summary["averaged_accuracy"], judge.summary["averaged_interval"])
        rows.append((judge.name, accuracy, *told))
    blocks: list[Block] = []
    for key in ("dollars_per_1000_pairs", "answers_per_s"):
        marks = [
            Mark(judge.name, [at], [of["averaged_accuracy"]], tone, "points", [of["averaged_interval"]])
            for tone, judge in enumerate(judges)
            if (at := paces[judge.name].get(key)) and (of := judge.summary)
        ]
        if len(marks) > 1:
            title = f"Accuracy against {COSTS[key][0]}"
            axes = Axis(COSTS[key][0], log=True), Axis("order-averaged accuracy", (0, 1), percent=True)
            blocks.append(Plot(key, title, chart(title, *axes, marks)))
    return [*blocks, Table("What answers take", rows), Text("paragraph", NOTES["costs"])]


def _training_saw(judge: Judge, one: Success) -> str:
    """What is known of it; of a base nothing: `trained_on` is of the training that its run then does."""
    before = judge.run.trained and judge.role == "base"
    return "" if before or one["trained_on"] is None else "saw it" if one["trained_on"] else "never saw it"


def attacks(judges: Sequence[Judge]) -> list[Block]:
    """One table: of two judges one alone may have been trained on an attack, and they are to stand side by side."""
    told = [(judge, one, _training_saw(judge, one)) for judge in judges for one in judge.attacks]
    if not told:
        return []
    known = any(saw for *_, saw in told)
    names = list(dict.fromkeys(one["attack"] for _, one, _ in told))
    names.sort(key=lambda name: (name == "position", name.startswith("all")))  # single ones first
    rows = [("attack", "judge", *["its training"] * known, "answers", "win when attacked")]
    for judge, one, saw in sorted(told, key=lambda told: names.index(told[1]["attack"])):
        share = percent(one["wins"] / one["n"], one["interval"])
        rows.append((one["attack"], judge.name, *[saw] * known, f"{one['n']:,}", share))
    text = NOTES["attacks"] + " Its training: empty where it is not known." * known
    return [Table("Attack", rows), Text("paragraph", text)]


def biases(judges: Sequence[Judge]) -> list[Block]:
    """How their verdicts go with what answers look like (dpo/judge/robustness.py)."""
    rows: list[tuple[str, ...]] = [
        ("answers", "judge", "pairs", "preferred", "right", "accuracy where right", "accuracy where wrong")
    ]
    for judge in judges:
        for of in judge.biases:
            n, chosen, hits = of["n"], of["chosen"], of["prefers_chosen"]
            right, wrong = ((hits, chosen), (n - chosen - of["prefers"] + hits, n - chosen))
            accuracies = [percent(hits / count) if count else "-" for hits, count in (right, wrong)]
            preferred = percent(of["prefers"] / n, of["interval"])
            rows.append((of["look"], judge.name, f"{n:,}", preferred, percent(chosen / n), *accuracies))
    likelier = any(of["look"] == LIKELIER for judge in judges for of in judge.biases)
    text = NOTES["looks"] + f" {NOTES['likelier']}" * likelier
    return [Table("What is preferred for its looks", rows), Text("paragraph", text)] if len(rows) > 1 else []
