"""A local model as a judge that writes: its critiques of the questions, kept as they come, and the verdicts in them.

    verdict trees -> questions -> critiques, a batch of rows at a time -> the same readers as an endpoint's answers

Letters: Q questions of a row, L labels. Read next: models/generate.py, dpo/judge/asked.py.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from dpo.config import Config
from dpo.inputs import Inputs
from dpo.judge.asked import read_reply
from dpo.judge.calibration import Floats
from dpo.judge.endpoint import Answer, kept_answers
from dpo.judge.statistics import wilson_interval
from dpo.log import progress
from dpo.reference import numerics_tag
from dpo.trees import Tree, TreeSettings
from models.decoder import Decoder
from models.errors import UserError, show
from models.generate import Generation, Prompt, generate
from models.tokenizer import Tokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pen:
    """What writes, and how: greedily, or by drawing `samples` critiques of every question."""

    model: Decoder
    weights: str  # their fingerprint
    inputs: Inputs
    settings: TreeSettings  # of the questions
    config: Config
    samples: int = 1
    greedy: bool = False

    def says_nothing(self, answer: Answer) -> bool:
        """Whether it gives no verdict."""
        return math.isnan(read_reply(answer, self.settings)[0])


def written(pen: Pen, trees: Sequence[Tree]) -> Iterator[list[Answer]]:
    """Of each verdict tree, what is written in answer to its questions: `samples` to each, one after another.

    They are kept in run.cache under all that they depend on; a batch that is there whole is not written again.
    """
    pen.model.eval()  # no dropout
    config, labels = pen.config, pen.settings.template.labels
    drawn = set() if pen.greedy else {"temperature", "top_p"}
    how = config.critiques.model_dump(include={"max_tokens", "closing", "batch"} | drawn)
    tag = numerics_tag(next(pen.model.parameters()).device, pen.inputs.dtype, config.pack, {})
    told = json.dumps([pen.weights, tag, how, labels, pen.samples, None if pen.greedy else config.seed])
    path = pen.inputs.cache / "answers" / f"critiques-{hashlib.sha256(told.encode()).hexdigest()[:24]}.jsonl"
    with kept_answers(path) as (kept, keep), progress(len(trees), "critiques", "rows") as bar:
        for batch in _batches(trees, config.critiques.batch // pen.samples):
            keys = [
                [f"{tree.key(first).hex()}-{n}" for first in _firsts(tree) for n in range(pen.samples)]
                for tree in (replace(tree, stems=()) for tree in batch)  # which generation does not have
            ]
            if any(key not in kept for of_tree in keys for key in of_tree):
                for key, answer in zip(chain(*keys), chain(*_write(pen, batch)), strict=True):
                    if key not in kept:
                        keep(key, answer)
            bar.update(len(batch))
            yield from ([kept[key] for key in of_tree] for of_tree in keys)


def _batches(trees: Sequence[Tree], questions: int) -> Iterator[list[Tree]]:
    """Trees until they have so many questions."""
    batch: list[Tree] = []
    for tree in trees:
        batch.append(tree)
        if sum(len(one.branches) for one in batch) >= questions:
            yield batch
            batch = []
    yield from [batch] if batch else []


def _firsts(tree: Tree) -> range:
    """The completion of each question that is its first label."""
    return range(0, len(tree.completions), len(tree.completions) // len(tree.branches))


def _questions(tree: Tree) -> list[Ids]:
    """The tokens of each question behind the tree's prompt, without those that its longest label begins with."""
    return [tree.branches[one.branch][: one.start] for one in (tree.completions[first] for first in _firsts(tree))]


def _write(pen: Pen, trees: Sequence[Tree]) -> list[list[Answer]]:
    tokenizer, critiques = pen.inputs.tokenizer, pen.config.critiques
    letters = {ids[0]: text for text in ("A", " A", "B", " B") if len(ids := tokenizer.encode(text)) == 1}
    closing, _ = _closing(pen) if critiques.closing else ((), ())
    generations = generate(
        pen.model,
        [Prompt(tree.prompt, _questions(tree)) for tree in trees],
        stops=tokenizer.end_ids,
        max_new_tokens=max(1, critiques.max_tokens - len(closing) - bool(closing)),
        samples=pen.samples,
        temperature=0.0 if pen.greedy else critiques.temperature,
        top_p=critiques.top_p,
        seed=pen.config.seed,
        watched=list(letters),
    )
    answers = [[_answer(one, tokenizer, letters) for one in chain(*of_tree)] for of_tree in generations]
    return [_closed(pen, *both) for both in zip(trees, answers, strict=True)] if closing else answers


def _answer(one: Generation, tokenizer: Tokenizer, letters: dict[int, str]) -> Answer:
    """What was written as text, in which a letter that may be a verdict stands beside log p of all such letters."""
    ids = one.tokens if one.stop is None else one.tokens[:-1]
    text = tokenizer.decode(ids)
    cuts = [0, *(cut for place, token in enumerate(ids) if token in letters for cut in (place, place + 1)), len(ids)]
    ends = [len(tokenizer.decode(ids[:cut])) for cut in cuts]
    tokens = [
        (text[begin:end], dict(zip(letters.values(), one.watched[cut], strict=True)) if ids[cut] in letters else {})
        for cut, begin, end in zip(cuts, ends, ends[1:], strict=False)
        if end > begin
    ]
    finish = "length" if one.stop is None else "stop"
    return Answer(text, finish, tuple(tokens), completion_tokens=len(ids), ids=tuple(one.tokens))


def _closing(pen: Pen) -> tuple[Ids, Ids]:
    """The tokens of critiques.closing and of what all labels begin with, and the one that each label then is."""
    closing, labels = pen.config.critiques.closing, pen.settings.template.labels
    whole = [pen.inputs.tokenizer.encode(f"{closing} {label}") for label in labels]
    shared = os.path.commonprefix(whole)
    if any(len(ids) != len(shared) + 1 for ids in whole):
        raise UserError(f'critiques.closing = {show(closing)}: behind it a label is several tokens; leave it ""')
    return tuple(shared), tuple(ids[-1] for ids in whole)


def _closed(pen: Pen, tree: Tree, answers: Sequence[Answer]) -> list[Answer]:
    """The answers, those without a verdict with critiques.closing and a label: the likeliest one, or one drawn."""
    (closing, labels_L), critiques, questions = _closing(pen), pen.config.critiques, _questions(tree)
    open_ones = [place for place, answer in enumerate(answers) if pen.says_nothing(answer)]
    ids = {place: answers[place].ids[: answers[place].completion_tokens] for place in open_ones}
    branches = [(*questions[place // pen.samples], *ids[place], *closing) for place in open_ones]
    prompts = [Prompt(tree.prompt, branches)] if branches else []
    slots = chain(*chain(*generate(pen.model, prompts, stops=(), max_new_tokens=1, watched=labels_L)))
    closed = list(answers)
    for place, branch, slot in zip(open_ones, branches, slots, strict=True):
        answer, log_p_L = answers[place], np.array(slot.watched[0])
        p_L = np.exp((log_p_L - log_p_L.max()) / critiques.temperature)
        draw = np.random.default_rng((pen.config.seed, place, *tree.prompt, *branch)).random() * p_L.sum()
        best = int(log_p_L.argmax() if pen.greedy else np.searchsorted(p_L.cumsum(), draw, side="right"))
        log_p = {f" {label}": p for label, p in zip(pen.settings.template.labels, slot.watched[0], strict=True)}
        said = list(log_p)[best]
        closed[place] = replace(
            answer,
            text=f"{answer.text}{critiques.closing}{said}",
            finish="stop",
            tokens=(*answer.tokens, (critiques.closing, {}), (said, log_p)),
            completion_tokens=len(ids[place]) + len(closing) + 1,
            ids=(*ids[place], *closing, labels_L[best], *answer.ids[len(ids[place]) :]),
        )
    return closed


def written_replies(pen: Pen, trees: Sequence[Tree], most_invalid: float = 1.0) -> tuple[list[Floats], list[Answer]]:
    """reply_QL of each verdict tree (dpo/judge/protocols.py), and the answers that they are read from, one a question.

    UserError as soon as surely more than `most_invalid` of them, or in the end more, are not in form.
    """
    replies: list[Floats] = []
    answers: list[Answer] = []
    invalid: list[Answer] = []
    for of_tree in written(pen, trees):
        replies.append(np.array([read_reply(answer, pen.settings) for answer in of_tree]))
        answers += of_tree
        invalid += [answer for answer in of_tree if pen.says_nothing(answer)]
        sure = wilson_interval(len(invalid), len(answers), z=4)[0] > most_invalid
        if sure or (len(replies) == len(trees) and len(invalid) > most_invalid * len(answers)):
            raise UserError(
                f"{len(invalid)} of {len(answers)} critiques give no verdict in the form asked for, more than "
                f"{most_invalid:.0%}; the last one, {invalid[-1].finish}: {show(invalid[-1].text)}. Where it is cut "
                "(length) raise critiques.max_tokens; else set critiques.closing, critiques.template or "
                "judge.critique=off, or take another model"
            )
    return replies, answers
