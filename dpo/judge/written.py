"""A local model as a judge that writes: its critiques of the questions, kept as they come, and the verdicts in them.

    verdict trees -> questions -> critiques, a batch of rows at a time -> the same readers as an endpoint's answers

Letters: Q questions of a row, L labels. Read next: models/generate.py, dpo/judge/asked.py.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from dpo.config import Config
from dpo.inputs import Inputs
from dpo.judge.asked import READERS, written_label
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


def written(
    model: Decoder,
    weights: str,
    trees: Sequence[Tree],
    settings: TreeSettings,
    inputs: Inputs,
    config: Config,
    *,
    samples: int,
    greedy: bool,
) -> Iterator[list[Answer]]:
    """Of each verdict tree, what the model writes in answer to its questions: `samples` to each, one after another.

    They are kept in run.cache under `weights` and all else that they depend on; a batch that is there whole is not
    written again.
    """
    model.eval()  # no dropout
    how = config.critiques.model_dump(include={"max_tokens", "closing", "batch", "temperature", "top_p"})
    tag = numerics_tag(next(model.parameters()).device, inputs.dtype, config.pack, {})
    told = json.dumps([weights, tag, how, settings.template.labels, samples, greedy, config.seed])
    path = inputs.cache / "answers" / f"critiques-{hashlib.sha256(told.encode()).hexdigest()[:24]}.jsonl"
    with kept_answers(path) as (kept, keep), progress(len(trees), "critiques", "rows") as bar:
        for batch in _batches(trees, config.critiques.batch // samples):
            keys = [
                [f"{tree.key(first).hex()}-{n}" for first in _firsts(tree) for n in range(samples)] for tree in batch
            ]
            if any(key not in kept for of_tree in keys for key in of_tree):
                answers = _write(model, inputs.tokenizer, batch, config, samples, greedy)
                if config.critiques.closing:
                    answers = _close(model, inputs.tokenizer, batch, answers, settings, config, samples, greedy)
                for key, answer in zip(chain(*keys), chain(*answers), strict=True):
                    if key not in kept:
                        keep(key, answer)
                        kept[key] = answer
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


def _questions(tree: Tree) -> list[tuple[int, ...]]:
    """The tokens of each question behind the tree's prompt, without those that its longest label begins with."""
    return [tree.branches[one.branch][: one.start] for one in (tree.completions[first] for first in _firsts(tree))]


def _write(
    model: Decoder, tokenizer: Tokenizer, trees: Sequence[Tree], config: Config, samples: int, greedy: bool
) -> list[list[Answer]]:
    closing = config.critiques.closing
    room = len(tokenizer.encode(closing)) + 1 if closing else 0
    letters = {ids[0]: text for text in ("A", " A", "B", " B") if len(ids := tokenizer.encode(text)) == 1}
    generations = generate(
        model,
        [Prompt(tree.prompt, _questions(tree)) for tree in trees],
        stops=tokenizer.end_ids,
        max_new_tokens=max(1, config.critiques.max_tokens - room),
        samples=samples,
        temperature=0.0 if greedy else config.critiques.temperature,
        top_p=config.critiques.top_p,
        seed=config.seed,
        watched=list(letters),
    )
    return [
        [_answer(one, tokenizer, letters) for of_question in of_tree for one in of_question] for of_tree in generations
    ]


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
    return Answer(
        text, "length" if one.stop is None else "stop", tuple(tokens), 0, len(ids), "", 0.0, tuple(one.tokens)
    )


def _close(
    model: Decoder,
    tokenizer: Tokenizer,
    trees: Sequence[Tree],
    answers: Sequence[Sequence[Answer]],
    settings: TreeSettings,
    config: Config,
    samples: int,
    greedy: bool,
) -> list[list[Answer]]:
    """The answers, critiques.closing and a label behind those that give no verdict: the likeliest, or one drawn."""
    read, labels = READERS.get(settings.protocol, written_label), settings.template.labels
    closing, ends = config.critiques.closing, tokenizer.encode(config.critiques.closing)
    ids_L = [tokenizer.encode(f"{closing} {label}")[len(ends) :] for label in labels]
    if any(len(ids) != 1 for ids in ids_L):
        raise UserError(f'critiques.closing = {show(closing)}: a label behind it is more than one token; set it to ""')
    closed = [list(of_tree) for of_tree in answers]
    for tree, of_tree in zip(trees, closed, strict=True):
        open_ones = [place for place, answer in enumerate(of_tree) if math.isnan(read(answer, labels)[0])]
        said = {place: of_tree[place].ids[: of_tree[place].completion_tokens] for place in open_ones}
        questions = _questions(tree)
        prompt = Prompt(tree.prompt, [(*questions[place // samples], *ids, *ends) for place, ids in said.items()])
        slots = generate(model, [prompt] if said else [], stops=(), max_new_tokens=1, watched=[ids[0] for ids in ids_L])
        for (place, ids), (slot,) in zip(said.items(), slots[0] if slots else (), strict=True):
            log_p_L = np.array(slot.watched[0])
            p_L = np.exp((log_p_L - log_p_L.max()) / config.critiques.temperature)
            draw = np.random.default_rng((config.seed, place, *ids)).random()
            best = int(log_p_L.argmax() if greedy else np.searchsorted(p_L.cumsum(), draw * p_L.sum(), side="right"))
            answer = of_tree[place]
            slots_said = {f" {label}": log_p for label, log_p in zip(labels, slot.watched[0], strict=True)}
            of_tree[place] = replace(
                answer,
                text=f"{answer.text}{closing} {labels[best]}",
                finish="stop",
                tokens=(*answer.tokens, (closing, {}), (f" {labels[best]}", slots_said)),
                completion_tokens=len(ids) + len(ends) + 1,
                ids=(*ids, *ends, *ids_L[best], *answer.ids[len(ids) :]),
            )
    return closed


def written_replies(
    model: Decoder,
    weights: str,
    trees: Sequence[Tree],
    settings: TreeSettings,
    inputs: Inputs,
    config: Config,
    most_invalid: float = 1.0,
) -> tuple[list[Floats], list[Answer]]:
    """reply_QL of each verdict tree (dpo/judge/protocols.py), and the answers that they are read from, one a question.

    UserError as soon as surely more than `most_invalid` of them, or in the end more, are not in form.
    """
    read, labels = READERS.get(settings.protocol, written_label), settings.template.labels
    replies: list[Floats] = []
    answers: list[Answer] = []
    invalid = 0
    greedy = config.judge.critique == "greedy"
    for of_tree in written(model, weights, trees, settings, inputs, config, samples=1, greedy=greedy):
        replies.append(np.array([read(answer, labels) for answer in of_tree]))
        answers += of_tree
        invalid += int(np.isnan(replies[-1][:, 0]).sum())
        sure = wilson_interval(invalid, len(answers), z=4)[0] > most_invalid
        if sure or (len(replies) == len(trees) and invalid > most_invalid * len(answers)):
            last = next(answer for answer in reversed(answers) if math.isnan(read(answer, labels)[0]))
            raise UserError(
                f"{invalid} of {len(answers)} critiques give no verdict in the form asked for, more than "
                f"{most_invalid:.0%}; the last one, {last.finish}: {show(last.text)}. Where it is cut (length) raise "
                "critiques.max_tokens; else set critiques.closing, critiques.template or judge.critique=off, or take "
                "another model"
            )
    return replies, answers
