"""Preference trees: one prompt, its branches, the completions scored on them, and the pairs among those.

Letters: `L` labels of a judge's template. Read next: dpo/packing.py.

The prompt is run once and every branch once, however many pairs they are in. A completion is scored, not run: its first
token is scored at the last row of what precedes it, and its last token is never an input. So a verdict costs no token
at all: the two orders of the answers are two branches, and the last row of each scores both "A" and "B". What several
branches begin with is run once, too: an answer that stands first in several questions.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from typing import NamedTuple

import numpy as np

from dpo.judge.prompts import COMPARE, QUESTIONS, SLOTS, Template, asked_by, judge_messages
from dpo.rows import Row, pairs_of, values_of
from models.errors import UserError
from models.tokenizer import Tokenizer

LEAST_SAVED = 32  # tokens, for a stem to pay for the calls that it costs


@dataclass(frozen=True)
class Completion:
    """Scored tokens: `targets[0]` is predicted at branch row `start - 1` (-1: the prompt's last row), and so on."""

    branch: int
    start: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Indices of two completions of the same tree; `weight` counts the pair in the loss's mean.

    `twin` is the place in the tree's pairs of the same two answers in the other order. The rest is PairValues'.
    """

    winner: int
    loser: int
    weight: float
    margin: float = 0.0
    soft_label: float = 1.0
    twin: int | None = None


class Stem(NamedTuple):
    """What some branches begin with, after the stem before: its number in the tree, and where in them it ends."""

    number: int
    end: int


@dataclass(frozen=True)
class Tree:
    """One row's prompt, branches (input tokens after the prompt; may be empty), completions and pairs.

    The first `prefix` tokens of the prompt, fewer than all, are run once for all trees of a pack that begin with them;
    a stem once for all branches of a pack that begin with it. `stems` has those of each branch; empty: there are none.
    """

    id: str
    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    completions: tuple[Completion, ...]
    pairs: tuple[Pair, ...]
    prefix: int = 0
    stems: tuple[tuple[Stem, ...], ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.tokens_of(range(len(self.branches)))

    def path(self, branch: int) -> tuple[int, ...]:
        """Where on the way to its end each run of tokens ends: prefix, prompt, stems, what is its own."""
        ends = (0, *(end for _, end in self.stems_of(branch)), len(self.branches[branch]))
        return (self.prefix, *(len(self.prompt) + end for end in ends))

    def stems_of(self, branch: int) -> tuple[Stem, ...]:
        return self.stems[branch] if self.stems else ()

    def tokens_of(self, branches: Iterable[int]) -> int:
        """Of these branches together, each stem once."""
        own, of_stems = 0, {}
        for branch in branches:
            begin = 0
            for number, end in self.stems_of(branch):
                of_stems[number], begin = end - begin, end
            own += len(self.branches[branch]) - begin
        return own + sum(of_stems.values())

    def key(self, completion: int) -> bytes:
        """Content address of a completion's log-probs: prompt, branch, and what of it is scored (16 bytes).

        Where prefix and stems end is part of it: they change no value, but the shapes its last bits come from. So it
        depends on the tree's other branches where these begin alike.
        """
        c = self.completions[completion]
        branch, path = self.branches[c.branch], self.path(c.branch)
        head = (len(path), *path, c.start, len(c.targets))
        ids = np.fromiter(chain(head, self.prompt, branch, c.targets), dtype="<i8")
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


PAIR_WEIGHTS: dict[str, Callable[[int], float]] = {"pair": lambda pairs: 1.0, "row": lambda pairs: 1.0 / pairs}
"""pair_weight -> weight of a pair whose row has so many: each pair counts the same, or each row."""


@dataclass(frozen=True)
class TreeSettings:
    """All that trees depend on besides their rows and the tokenizer; the keys of the configuration say what each is."""

    objective: str
    pairs_per_row: int
    pair_weight: str
    pack_tokens: int
    max_tokens: int = 0
    too_long: str = "error"
    sighted: bool = True
    protocol: str = "compare"
    template: Template = COMPARE
    reference_answer: bool = True
    seed: int = 0  # of the slots of `choose`, and of one_order
    room: int = 0  # tokens left free behind every branch, for what is written there
    one_order: bool = False

    @property
    def limit(self) -> int:
        """The most tokens of a prompt with one of its branches."""
        return min(self.max_tokens or self.pack_tokens, self.pack_tokens) - self.room


def answers_of(row: Row, pairs: Sequence[tuple[int, int]]) -> dict[str, str]:
    """The distinct answers of the pairs in their order -> what was thought before each, "" for nothing."""
    thinking = dict(row.thinking)
    return {answer: thinking.get(answer, "") for i, j in pairs for answer in (row.chosen[i], row.rejected[j])}


def find_stems(branches: Sequence[Sequence[int]], least: int = LEAST_SAVED) -> tuple[tuple[Stem, ...], ...]:
    """What branches have alike at their beginnings, where a stem saves at least so many tokens; empty for none."""
    stems: list[tuple[Stem, ...]] = [()] * len(branches)
    numbers = count()

    parts: list[tuple[Sequence[int], int, int]] = [(range(len(branches)), 0, 0)]
    while parts:
        members, begin, at = parts.pop()  # they are alike up to `at`; their last stem ends at `begin`
        alike: dict[int, list[int]] = {}
        for branch in members:
            if at < len(branches[branch]):
                alike.setdefault(branches[branch][at], []).append(branch)
        for group in (group for group in alike.values() if len(group) > 1):
            end = at + len(os.path.commonprefix([tuple(branches[branch][at:]) for branch in group]))
            pays = (len(group) - 1) * (end - begin) >= least
            stem = (Stem(next(numbers), end),) if pays else ()
            for branch in group:
                stems[branch] += stem
            parts.append((group, end if pays else begin, end))
    return tuple(stems) if any(stems) else ()


def response_tree(row: Row, tokenizer: Tokenizer, settings: TreeSettings) -> Tree:
    """prompt -> chosen against rejected: a branch for each distinct answer that a pair needs."""
    prompt, pairs = tuple(tokenizer.prompt_ids(row.prompt)), pairs_of(row, settings.pairs_per_row)
    thinking = answers_of(row, pairs)
    scored = [tuple(tokenizer.completion_ids(row.prompt, *thought)) for thought in thinking.items()]
    place = {answer: branch for branch, answer in enumerate(thinking)}
    weight = PAIR_WEIGHTS[settings.pair_weight](len(pairs))
    branches = tuple(tokens[:-1] for tokens in scored)
    return Tree(
        row.id,
        prompt,
        branches,
        tuple(Completion(branch, 0, tokens) for branch, tokens in enumerate(scored)),
        tuple(
            Pair(place[row.chosen[i]], place[row.rejected[j]], *values_of(row, i, j).weighed(weight)) for i, j in pairs
        ),
        stems=find_stems(branches),
    )


def judge_prefix(tokenizer: Tokenizer, settings: TreeSettings) -> tuple[int, ...]:
    """The tokens that every judge's prompt begins with: what two prompts without a word in common share.

    Less one, so that a tree whose questions share nothing more still has a prompt token of its own. Empty for a
    template that does not render without a reference answer.
    """
    prompts = [({"role": "user", "content": word},) for word in "0~"]
    ask = partial(judge_messages, template=settings.template, sighted=settings.sighted)
    try:
        messages = [ask(one, one[0]["content"] * SLOTS[settings.protocol]) for one in prompts]
    except UserError:
        return ()
    one, other = map(tokenizer.verdict_prompt_ids, messages)
    return tuple(one[: _shared_tokens([one, other]) - 1])


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with, leaving each at least one."""
    return min(len(os.path.commonprefix([*map(tuple, prompts)])), min(map(len, prompts)) - 1)


def verdict_tree(row: Row, tokenizer: Tokenizer, settings: TreeSettings, prefix: tuple[int, ...] = ()) -> Tree:
    """Judge prompt -> each of the template's L labels: a branch for each question that the protocol asks of the row.

    Completion b L + l is label l on branch b. The tokens that all questions share are the tree's prompt; `prefix` (of
    judge_prefix) is its prefix where it begins with it. Labels of several tokens must begin alike, as 1 and 10 do: what
    the last token of the longest is read behind stands at the end of every branch. In `compare` each pair is asked in
    both orders, chosen first on even branches, second on odd ones: "A" against "B" are the tree's pairs.
    """
    template, compared = settings.template, settings.protocol == "compare"
    labels = [tuple(tokenizer.verdict_ids(label)) for label in template.labels]
    tail = max(labels, key=len)[:-1]
    alike = all(label and label[:-1] == tail[: len(label) - 1] for label in labels)
    if len(set(labels)) < len(labels) or not alike or (tail and compared):
        raise UserError(
            f"the tokenizer of {tokenizer.folder} writes the verdicts {' and '.join(template.labels)} as the tokens "
            f"{[list(label) for label in labels]}, but each must be one token of its own, or of `rate` begin as the "
            "longest does; take another model, or other labels in judge.template"
        )
    reference = row.reference_answer if settings.reference_answer else ""
    pairs = pairs_of(row, settings.pairs_per_row)
    questions = QUESTIONS[settings.protocol](row, pairs, settings.seed)
    words, sighted = asked_by(template, row), settings.sighted
    messages = [judge_messages(row.prompt, one, words, sighted=sighted, reference=reference) for one in questions]
    asked = [tuple(tokenizer.verdict_prompt_ids(one)) for one in messages]
    if len(set(asked)) < len(set(questions)):
        raise UserError(
            "the judge's prompt is the same in both orders of the answers, so its chat template shows no user message; "
            f"mend the template of {tokenizer.folder}"
        )
    prompt = asked[0][: _shared_tokens(asked)]
    branches = tuple(tokens[len(prompt) :] for tokens in asked)
    weight = PAIR_WEIGHTS[settings.pair_weight](len(branches))
    values = [values_of(row, i, j) for i, j in pairs for _ in template.labels] if compared else []
    return Tree(
        row.id,
        prompt,
        tuple(branch + tail for branch in branches),
        tuple(Completion(b, len(branch), label) for b, branch in enumerate(branches) for label in labels),
        tuple(
            Pair(2 * b + b % 2, 2 * b + 1 - b % 2, *of_pair.weighed(weight), b ^ 1) for b, of_pair in enumerate(values)
        ),
        len(prefix) if len(prefix) < len(prompt) and prompt[: len(prefix)] == prefix else 0,
        find_stems(branches),
    )


def one_order(tree: Tree, seed: int) -> Tree:
    """Of verdict_tree's `compare` each pair in one order alone, drawn by the seed.

    Prompt and stems stay as they are, though one branch may have a stem to itself: so do the addresses, and the bits.
    """
    kept = [b + random.Random(f"{seed} {tree.id} {b}").randrange(2) for b in range(0, len(tree.branches), 2)]
    return replace(
        tree,
        branches=tuple(tree.branches[b] for b in kept),
        stems=tuple(map(tree.stems_of, kept)) if tree.stems else (),
        completions=tuple(
            replace(tree.completions[2 * b + label], branch=place) for place, b in enumerate(kept) for label in (0, 1)
        ),
        pairs=tuple(
            replace(tree.pairs[b], winner=2 * place + b % 2, loser=2 * place + 1 - b % 2, twin=None)
            for place, b in enumerate(kept)
        ),
    )


class Built(NamedTuple):
    """A tree and how it came to be."""

    tree: Tree
    row: int  # the place of its row
    cut: bool  # the row's prompt was cut to fit
    merges: bool  # an answered chat encoded in one piece has other tokens than its prompt and its rest apart


def build_trees(rows: Sequence[Row], tokenizer: Tokenizer, settings: TreeSettings) -> Iterator[Built]:
    """A tree a row, in order; of those too long for settings.limit what TOO_LONG says."""
    answers = settings.objective == "responses"
    make: Callable[[Row, Tokenizer, TreeSettings], Tree] = response_tree
    if not answers:
        make = partial(verdict_tree, prefix=judge_prefix(tokenizer, settings))
    for place, row in enumerate(rows):
        thoughts = answers_of(row, pairs_of(row, settings.pairs_per_row)) if answers else {}
        fitting: Row | None = row
        try:
            while fitting:
                tree = make(fitting, tokenizer, settings)
                if _longest(tree) <= settings.limit:
                    merges = any(tokenizer.boundary_differs(fitting.prompt, *thought) for thought in thoughts.items())
                    tree = one_order(tree, settings.seed) if settings.one_order else tree
                    yield Built(tree, place, fitting is not row, merges)
                    break
                fitting = TOO_LONG[settings.too_long](fitting, tree, tokenizer, settings)
        except UserError as error:  # of the chat template or the tree's length, which know no files
            raise UserError(f"{row.where or row.id}: {error}") from error


def _longest(tree: Tree) -> int:
    return len(tree.prompt) + max(map(len, tree.branches))


def _refuse(row: Row, tree: Tree, tokenizer: Tokenizer, settings: TreeSettings) -> None:
    key = "pack.tokens" if settings.limit + settings.room == settings.pack_tokens else "data.max_tokens"
    room = f" less critiques.max_tokens = {settings.room}" if settings.room else ""
    prompt, branch = len(tree.prompt), _longest(tree) - len(tree.prompt)
    raise UserError(
        f"row {row.id!r} needs {prompt} prompt + {branch} branch tokens, more than {key} = "
        f"{settings.limit + settings.room}{room}; "
        f"raise {key}, leave the row out, or set data.too_long to drop or cut_prompt"
    )


def _cut_prompt(row: Row, tree: Tree, tokenizer: Tokenizer, settings: TreeSettings) -> Row | None:
    """The row without its oldest exchange, or without the first tokens of its last message; None: nothing is left.

    What is cut is the row's text and never the chat around it, so that the template still writes its opening, system
    turn and generation prompt; one prompt serves all answers of a row, and answers are never cut.
    """
    opening = row.prompt[: row.prompt[0]["role"] == "system"]
    turns = row.prompt[len(opening) :]
    later = [place for place, turn in enumerate(turns) if place and turn["role"] == "user"]
    if later:
        return replace(row, prompt=opening + turns[later[0] :])
    text = turns[-1]["content"]
    offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets  # a character may be several tokens
    begin = next((begin for begin, _ in offsets[_longest(tree) - settings.limit :] if begin), len(text))
    message = turns[-1] | {"content": text[begin:]}
    return replace(row, prompt=(*opening, *turns[:-1], message)) if text[begin:].strip() else None


TOO_LONG: dict[str, Callable[[Row, Tree, Tokenizer, TreeSettings], Row | None]] = {
    "error": _refuse,
    "drop": lambda row, tree, tokenizer, settings: None,
    "cut_prompt": _cut_prompt,
}
"""data.too_long -> the shorter row to try instead of one whose tree does not fit, or None: it is dropped."""
