"""Finished runs read back: their judges, the rows that these judged, and what two judges say of the same pairs.

    run folders -> Run -> Judge -> shared pairs, and the pairs worth reading

No dimension letters. Read next: dpo/report.py.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import cast

from dpo.config import Config, config_dict
from dpo.inputs import load_splits
from dpo.judge.local import OF_ANSWERS, read_verdicts
from dpo.judge.prompts import request_text
from dpo.judge.robustness import Bias, Success
from dpo.judge.statistics import Comparison, Summary, Verdict, averaged_scores, compare, holm, outcomes
from dpo.page import Case
from dpo.results import Environment, Metrics, Results, read_metrics
from dpo.rows import Row, row_digest, rows_digest
from dpo.runs import flat, read_config
from models.errors import UserError
from models.files import read_json_object

MOST_CHARACTERS = 4000  # shown of a text
MOST_CASES = 12  # of a kind

Key = tuple[str, tuple[int, int], str, str]
"""A judged pair: id, indices, group, and where all runs' rows are known the hash of its row's texts, else ""."""


@dataclass(frozen=True)
class JudgedRows:
    """The rows that a run judged, or none and why."""

    rows: Sequence[Row] = ()
    place: Mapping[str, int] = field(default_factory=dict)  # by id
    digest: Mapping[str, str] = field(default_factory=dict)  # by id
    missing: str = ""


@dataclass(frozen=True)
class Run:
    """A finished run; one of dpo.judge has no metrics, and of Results only `judge`, `data` and `time_s`."""

    folder: Path
    config: Config
    results: Results
    environment: Environment
    metrics: Metrics
    verdicts: dict[str, list[Verdict]]
    rows: JudgedRows

    @property
    def trained(self) -> bool:
        """Whether it is one of dpo.train."""
        return bool(self.metrics)


@dataclass(frozen=True)
class Judge:
    """`name` is its own on a page; `role` its name in its run: of dpo.judge the model's, whatever it was asked."""

    name: str
    role: str
    run: Run
    summary: Summary
    verdicts: dict[Key, Verdict]

    @property
    def ordered(self) -> bool:
        """Whether it was asked in two orders."""
        return self.run.config.judge.protocol == "compare" and self.role not in OF_ANSWERS

    @property
    def chance(self) -> float:
        """Of its order-averaged accuracy: `choose` has four answers."""
        return 0.25 if self.run.config.judge.protocol == "choose" else 0.5

    @property
    def attacks(self) -> list[Success]:
        return [one for one in self.run.results.get("attacks", []) if one["judge"] == self.role]

    @property
    def biases(self) -> list[Bias]:
        return [one for one in self.run.results.get("biases", []) if one["judge"] == self.role]


@dataclass(frozen=True)
class Compared:
    """Judge b against judge a on their n shared pairs; `before`, `after`: their order-averaged accuracies there."""

    a: Judge
    b: Judge
    n: int
    before: float
    after: float
    test: Comparison
    p_holm: float = math.nan  # over the page's comparisons, of the larger p of the order-averaged accuracy


def read_run(folder: Path, rows: Sequence[Row] = ()) -> Run:
    """The run in `folder`, which judged `rows` where they are at hand; UserError for what is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder; give that of a finished run")
    if not (folder / "config.json").is_file():
        below = f"; {folder / 'latest'} is one" if (folder / "latest" / "config.json").is_file() else ""
        raise UserError(f"{folder / 'config.json'}: is missing, so this is no run folder{below}; give a finished run's")
    config = read_config(folder)
    results = read_json_object(folder / "results.json")
    trains = "train" in results or (folder / "metrics.jsonl").exists()
    return Run(
        folder.resolve(),
        config,
        cast(Results, results),
        cast(Environment, read_json_object(folder / "env.json")),
        read_metrics(folder / "metrics.jsonl") if trains else [],
        read_verdicts(folder / "verdicts.jsonl"),
        _placed(rows) if rows else _rows_again(config, results, trains),
    )


def _placed(rows: Sequence[Row]) -> JudgedRows:
    place = {row.id: place for place, row in enumerate(rows)}
    return JudgedRows(rows, place, {row.id: row_digest(row) for row in rows})


def _rows_again(config: Config, results: Mapping[str, object], trains: bool) -> JudgedRows:
    """The judged rows, read from where the configuration says; none where they are gone or not the same."""
    told = results.get("data")
    digest = told.get("test_sha256") if isinstance(told, dict) else None
    if not digest:
        return JudgedRows(missing="The run does not say which rows it judged, so their texts are left out.")
    try:
        rows = load_splits(config, judging=not trains).test
    except (UserError, OSError) as error:
        return JudgedRows(missing=f"The rows cannot be read again, so their texts are left out: {error}.")
    if digest != rows_digest(rows):
        changed = f"data.path={config.data.path} no longer holds the rows that were judged"
        return JudgedRows(missing=f"{changed}, so their texts are left out.")
    return _placed(rows)


def judges_of(runs: Sequence[Run]) -> list[Judge]:
    """The judges of the runs, without controls; a base that said just what one before it said is left out."""
    known = all(run.rows.digest for run in runs)
    found: list[Judge] = []
    for run in runs:
        told = run.results["data"].get("test_sha256", str(run.folder))  # of all its rows
        digest = run.rows.digest if known else {}
        told_of = [role for role in run.verdicts if role in run.results["judge"]]  # of controls nothing else
        for role in [role for role in told_of if role not in ("blind", "sighted")]:
            verdicts = {(v.id, v.pair, v.group, digest.get(v.id, told)): v for v in run.verdicts[role]}
            if role != "base" or all(judge.verdicts != verdicts for judge in found):
                found.append(Judge(role, role, run, run.results["judge"][role], verdicts))  # type: ignore[literal-required]
    names: tuple[Callable[[Judge, Sequence[Run]], str], ...] = (
        lambda judge, twins: f"{judge.run.config.exp} {judge.role}",
        _by_settings,
        lambda judge, twins: f"{judge.run.folder.name} {judge.role}",
    )
    for name in names:
        twins = [[other.run for other in found if other.name == judge.name] for judge in found]
        found = [replace(j, name=name(j, of)) if len(of) > 1 else j for j, of in zip(found, twins, strict=True)]
    return found


def _by_settings(judge: Judge, twins: Sequence[Run]) -> str:
    """By up to three keys in which the runs of judges of one name differ."""
    of = [flat(config_dict(run.config)) for run in twins]
    own = flat(config_dict(judge.run.config))
    keys = [key for key in own if not key.startswith(("run.", "log.")) and any(one[key] != own[key] for one in of)]
    told = (f"{key}={own[key] if isinstance(own[key], str) else json.dumps(own[key])}" for key in keys)
    return ", ".join((judge.role, *told)) if len(keys) <= 3 else judge.name


# --- two judges -----------------------------------------------------------------------------------------------------


def shared_keys(a: Judge, b: Judge) -> list[Key]:
    """The pairs that both judged; a best of four is no verdict on a pair."""
    of_four = [judge.run.config.judge.protocol == "choose" for judge in (a, b)]
    return [key for key in a.verdicts if key in b.verdicts] if of_four[0] == of_four[1] else []


def shared_pairs(a: Judge, b: Judge) -> tuple[list[Verdict], list[Verdict]]:
    """The verdicts of both on their shared pairs."""
    keys = shared_keys(a, b)
    return [a.verdicts[key] for key in keys], [b.verdicts[key] for key in keys]


def comparisons(judges: Sequence[Judge]) -> list[Compared]:
    """Every judge against every one before it, on the pairs that they share, where there are any."""
    found = []
    for a, b in combinations(judges, 2):
        of_a, of_b = shared_pairs(a, b)
        if of_a:
            known = a.run is b.run and (a.role, b.role) == ("base", "trained")
            test = a.run.results["judge"]["comparison"] if known else compare(of_b, of_a, a.run.config.seed)
            before, after = (float(averaged_scores(of).mean()) for of in (of_a, of_b))
            found.append(Compared(a, b, len(of_a), before, after, test))
    corrected = holm([max(one.test["averaged"]["p"], one.test["averaged"]["p_clustered"]) for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def transitions(a: Judge, b: Judge) -> dict[Key, tuple[str, str]]:
    """What a and what b made of each pair that they share, two of `outcomes`."""
    was, now = (outcomes(verdicts).tolist() for verdicts in shared_pairs(a, b))
    return dict(zip(shared_keys(a, b), zip(was, now, strict=True), strict=True))


def named(key: Key) -> str:
    """A pair's name: its row's, with the places of its two answers where they are not the first ones."""
    return key[0] if key[1] == (0, 0) else f"{key[0]} {key[1]}"


# --- pairs worth reading --------------------------------------------------------------------------------------------


def _averaged(verdict: Verdict) -> float:
    """Log-odds of the chosen answer, averaged over both orders, nats; 0 without a verdict."""
    odds = (verdict.first - verdict.second) / 2
    return 0.0 if math.isnan(odds) else odds


def _between_orders(verdict: Verdict) -> float:
    return min(abs(verdict.first), abs(verdict.second)) if verdict.first * verdict.second > 0 else 0.0


def _between_judges(one: Verdict, other: Verdict) -> float:
    a, b = _averaged(one), _averaged(other)
    return min(abs(a), abs(b)) if a * b < 0 else 0.0


def _better(one: Verdict, other: Verdict) -> float:
    """How much the other one is better, where it is right in both orders and the one is not."""
    before, after = outcomes([one, other]).tolist()
    return max(1e-9, _averaged(other) - _averaged(one)) if before != "win" == after else 0.0


def reasons(judges: Sequence[Judge]) -> dict[Key, list[str]]:
    """The pairs worth reading, and why, at most MOST_CASES of a kind; above 0 is a pair's claim to be read."""
    kinds: dict[str, dict[Key, float]] = {}
    for a in judges:
        kinds[f"surest mistakes of {a.name}"] = {key: -_averaged(verdict) for key, verdict in a.verdicts.items()}
        kinds[f"orders differ most for {a.name}"] = {key: _between_orders(of) for key, of in a.verdicts.items()}
    for a, b in combinations(judges, 2):
        both = [(key, a.verdicts[key], b.verdicts[key]) for key in shared_keys(a, b)]
        kinds[f"{a.name} and {b.name} differ most"] = {key: _between_judges(one, other) for key, one, other in both}
        kinds[f"right by {b.name}, not by {a.name}"] = {key: _better(one, other) for key, one, other in both}
        kinds[f"right by {a.name}, not by {b.name}"] = {key: _better(other, one) for key, one, other in both}
    found: dict[Key, list[str]] = {}
    for why, claims in kinds.items():
        for key in sorted((key for key in claims if claims[key] > 0), key=lambda key: -claims[key])[:MOST_CASES]:
            found.setdefault(key, []).append(why)
    return found


def cases(judges: Sequence[Judge]) -> dict[Key, Case]:
    """The pairs worth reading, with all that is known of them."""
    found = {}
    for key, why in reasons(judges).items():
        said = {judge.name: judge.verdicts[key] for judge in judges if key in judge.verdicts}
        texts = next((of for judge in judges if key in judge.verdicts and (of := _texts(judge.run.rows, key))), {})
        found[key] = Case(
            named(key),
            next(iter(said.values())).subset,
            dict(zip(said, outcomes(list(said.values())).tolist(), strict=True)),
            {name: (verdict.first, -verdict.second) for name, verdict in said.items()},
            why,
            texts,
        )
    return found


def _texts(rows: JudgedRows, key: Key) -> dict[str, str]:
    if key[0] not in rows.place:
        return {}
    row = rows.rows[rows.place[key[0]]]
    chosen, rejected = row.chosen[key[1][0]], row.rejected[key[1][1]]
    texts = {"Request": request_text(row.prompt), "Chosen answer": chosen, "Rejected answer": rejected}
    return {name: _cut(text) for name, text in texts.items()}


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n[cut: the first {MOST_CHARACTERS:,} of {len(text):,} characters]"
