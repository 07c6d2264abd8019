"""objective=critiques: the judge trains on its own critiques, those with the right verdict against the others.

    questions -> critiques of the judge as it is -> right against wrong -> trees -> a training (dpo/loop.py), and again

Every round samples anew, and its reference is the judge that it sampled from. Both orders of a pair of answers count
alike, with as many right and wrong critiques in the one as in the other: what says A too often is not trained on it.
No dimension letters. Read next: dpo/judge/written.py.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from dpo.checkpoint import load, trained_digest
from dpo.config import Config, config_dict
from dpo.distributed import Ranks
from dpo.inputs import Inputs, critique_settings
from dpo.judge.asked import written_verdict
from dpo.judge.endpoint import Answer
from dpo.judge.written import Ids, Pen, written
from dpo.loop import TrainState, train
from dpo.pairs import TreeSums
from dpo.routes import routes_of
from dpo.rows import PairValues, Row, pairs_of, values_of
from dpo.tokens import Trees, keep_trees, token_trees
from dpo.trees import PAIR_WEIGHTS, Completion, Pair, Tree, find_stems
from models.decoder import Decoder
from models.errors import UserError
from models.files import atomic_write_text, read_text, write_json

Told = dict[str, int]


class Sides(NamedTuple):
    """Critiques of one question, no text twice: those with the right verdict, and the others."""

    right: list[Ids]
    other: list[Ids]


def kinds_of(answers: Sequence[Answer], letter: str) -> list[str]:
    """What each critique is where `letter` names the better answer: right, wrong, tie or unparsable."""
    kinds = {letter: "right", "Tie": "tie", "": "unparsable"}
    return [kinds.get(written_verdict(answer), "wrong") for answer in answers]


def critique_trees(row: Row, asked: Tree, answers: Sequence[Answer], config: Config) -> tuple[list[Tree], Told]:
    """The row's trees, one for each order of each pair of answers that can be used, and counts of what became of them.

    `answers` are those to the questions of `asked`, as many to each. Both orders give as many right critiques, at most
    critiques.kept, and as many others; every right one is paired with every other one of its order.
    """
    told: Counter[str] = Counter()
    samples = len(answers) // len(asked.branches)
    found: list[tuple[int, PairValues, Sides]] = []
    for place, (i, j) in enumerate(pairs_of(row, config.data.pairs_per_row)):
        sides = []
        for branch, letter in ((2 * place, "A"), (2 * place + 1, "B")):
            of_order = answers[branch * samples : (branch + 1) * samples]
            kinds = kinds_of(of_order, letter)
            told.update(kinds)
            told["say A"] += sum(written_verdict(answer) == "A" for answer in of_order)
            is_right = {tuple(answer.ids): kind == "right" for answer, kind in zip(of_order, kinds, strict=True)}
            right, other = ([ids for ids in is_right if is_right[ids] == wanted] for wanted in (True, False))
            sides.append(Sides(right, other))
        rights, others = (min(config.critiques.kept, len(a), len(b)) for a, b in zip(*sides, strict=True))
        if rights and others:
            told["pairs used"] += 1
            kept = [Sides(of_order.right[:rights], of_order.other[:others]) for of_order in sides]
            found += [(2 * place + order, values_of(row, i, j), of_order) for order, of_order in enumerate(kept)]
        else:
            none = [not any(of_both) for of_both in zip(*sides, strict=True)]
            told[f"pairs {'all wrong' if none[0] else 'all right' if none[1] else 'of one kind in one order'}"] += 1
    told["critique pairs"] = sum(len(of_order.right) * len(of_order.other) for _, _, of_order in found)
    weight = PAIR_WEIGHTS[config.train.pair_weight](told["critique pairs"] or 1)
    return [_tree(row.id, asked, branch, of_order, values, weight) for branch, values, of_order in found], told


def _tree(name: str, asked: Tree, branch: int, sides: Sides, values: PairValues, weight: float) -> Tree:
    """One question of `asked`, its critiques, and all pairs of a right one with another one."""
    every = sides.right + sides.other
    places = product(range(len(sides.right)), range(len(sides.right), len(every)))
    branches = tuple(ids[:-1] for ids in every)
    return Tree(
        name,
        asked.prompt + asked.branches[branch],
        branches,
        tuple(Completion(place, 0, ids) for place, ids in enumerate(every)),
        tuple(Pair(*pair, *values.weighed(weight)) for pair in places),
        asked.prefix,
        find_stems(branches),
    )


def verdict_trees(trees: Trees, pairs: int, name: str) -> list[Tree]:
    """Verdict trees drawn by `name` until they have so many pairs, or all."""
    places = list(range(len(trees)))
    random.Random(name).shuffle(places)
    drawn: list[Tree] = []
    for place in places:
        if sum(len(tree.pairs) for tree in drawn) >= pairs:
            break
        drawn.append(trees[place])
    return drawn


def round_trees(
    rows: Sequence[Row], asked: Trees, answers: Iterable[Sequence[Answer]], verdicts: Trees, config: Config, place: Path
) -> tuple[Trees, Told]:
    """What a round trains on, kept in `place` beside critiques.jsonl, and counts of it; UserError where there is none.

    A row's trees stand together, so that a step has all of them (dpo/step.py).
    """
    trees: list[Tree] = []
    of_row: list[int] = []
    told: Counter[str] = Counter({"critique pairs": 0})
    lines: list[str] = []
    for number, (row, tree, of_tree) in enumerate(zip(rows, asked, answers, strict=True)):
        found, counts = critique_trees(row, tree, of_tree, config)
        trees += found
        of_row += [number] * len(found)
        told.update(counts)
        lines += _lines(row, of_tree, len(of_tree) // len(tree.branches))
    atomic_write_text(place / "critiques.jsonl", "".join(lines))
    if not trees:
        raise UserError(
            "objective=critiques: no pair of answers has right and wrong critiques in both orders "
            f"({_in_words(told)}); they are in {place / 'critiques.jsonl'}. Where they are unparsable set "
            "critiques.closing or critiques.template, where all say one letter train objective=verdicts first, "
            "where all are of one kind raise critiques.samples or critiques.temperature, or take other rows"
        )
    share = config.critiques.verdict_share
    pairs = round(told["critique pairs"] * share / (1 - share))
    alone = verdict_trees(verdicts, pairs, f"{place.name} of seed {config.seed}")
    told["verdict pairs"] = sum(len(tree.pairs) for tree in alone)
    of_row += range(len(rows), len(rows) + len(alone))
    return keep_trees(place / "trees", trees + alone, of_row), dict(told)


def _in_words(told: Told) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in told.items())


def _lines(row: Row, answers: Sequence[Answer], samples: int) -> list[str]:
    """A line a critique: its row, its question (pair by pair, chosen first, then second), what it is, its text."""
    lines = []
    for question in range(len(answers) // samples):
        of_question = answers[question * samples : (question + 1) * samples]
        for kind, answer in zip(kinds_of(of_question, "AB"[question % 2]), of_question, strict=True):
            lines.append(json.dumps({"id": row.id, "question": question, "kind": kind, "text": answer.text}) + "\n")
    return lines


def train_rounds(
    policy: Decoder,
    inputs: Inputs,
    references: Callable[[Inputs, str], TreeSums],
    evaluate: Callable[[], dict[str, float]],
    config: Config,
    ranks: Ranks,
    folder: Path,
    fingerprint: str,
) -> tuple[TrainState, list[Told]]:
    """All rounds; the policy then has the best round's best weights. What it came to in all, and each round's counts.

    `references`: the sums of an inputs' training trees under the policy as it is, whose fingerprint is given with them.
    A round has a folder of its own, round-N; what is done of it is found again.
    """
    settings = critique_settings(config)
    asked = token_trees(inputs.splits.train, inputs.tokenizer, settings, inputs.cache)
    ends: list[TrainState] = []
    told: list[Told] = []
    for number in range(1, config.critiques.rounds + 1):
        place = folder / f"round-{number}"
        write_json(place / "config.json", config_dict(config))
        weights = trained_digest(policy, fingerprint) if ends else fingerprint
        answers = written(Pen(policy, weights, inputs, settings, config, config.critiques.samples), asked)
        trees, counts = round_trees(inputs.splits.train, asked, answers, inputs.train_trees, config, place)
        told.append(counts)
        print(f"round {number}: {_in_words(counts)}")
        of_round, routes = replace(inputs, train_trees=trees), routes_of(config, policy.config, None)
        sums = references(of_round, weights)
        done = train(
            policy, of_round, sums, evaluate, config, ranks, place, reference=weights, same_start=True, routes=routes
        )
        ends.append(done)
        _join_metrics(folder, number)
    last = config.train.select == "last" or not inputs.splits.validation
    best = len(ends) - 1 if last else max(range(len(ends)), key=lambda i: ends[i].best)
    if best < len(ends) - 1:
        load(folder / f"round-{best + 1}" / "checkpoints" / "best", policy, ranks)
    before = sum(done.step for done in ends[:best])
    whole = {key: sum(asdict(done)[key] for done in ends) for key in ("step", "pairs", "tokens", "time_s")}
    silent = [name for name in ends[0].without_gradient if all(name in done.without_gradient for done in ends)]
    return replace(ends[0], **whole, best_step=before + ends[best].best_step, without_gradient=silent), told


def _join_metrics(folder: Path, rounds: int) -> None:
    """metrics.jsonl of the run: that of its rounds, one after another, their steps counted on."""
    lines: list[str] = []
    before = step = 0
    for number in range(1, rounds + 1):
        for line in read_text(folder / f"round-{number}" / "metrics.jsonl").splitlines():
            figures = json.loads(line)
            step = before + figures["step"]
            lines.append(json.dumps(figures | {"step": step, "round": number}) + "\n")
        before = step
    atomic_write_text(folder / "metrics.jsonl", "".join(lines))
