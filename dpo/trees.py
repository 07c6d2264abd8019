"""Preference trees: one prompt, its branches, the completions scored on them, and the pairs among those.

Letters: `P` prompt tokens, `L` tokens of a branch, `B` pairs. Read next: dpo/packing.py.

The prompt is run once and every branch once, however many pairs they are in. A completion is scored, not run: its first
token is scored at the last row of what precedes it, and its last token is never an input. So a verdict costs no token
at all: the two orders of the answers are two branches, and the last row of each scores both "A" and "B".
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from dpo.judge.prompts import LABELS, judge_messages
from dpo.rows import Row, pairs_of, values_of
from models.errors import UserError
from models.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Tree:
    """One row's prompt, branches (input tokens after the prompt; may be empty), completions and pairs.

    The first `prefix` tokens of the prompt, fewer than all, are run once for all trees of a pack that begin with them.
    """

    id: str
    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    completions: tuple[Completion, ...]
    pairs: tuple[Pair, ...]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))

    def key(self, completion: int) -> bytes:
        """Content address of a completion's log-probs: prompt, branch, and what of it is scored (16 bytes).

        Where the prefix ends is part of it: it changes no value, but the shapes that the values' last bits come from.
        """
        c = self.completions[completion]
        branch = self.branches[c.branch]
        head = (self.prefix, len(self.prompt), len(branch), c.start, len(c.targets))
        ids = np.fromiter(chain(head, self.prompt, branch, c.targets), dtype="<i8")
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _check_length(tree: Tree, row: Row, pack_tokens: int) -> Tree:
    longest = max(map(len, tree.branches))
    if len(tree.prompt) + longest > pack_tokens:
        raise UserError(
            f"{row.where or row.id}: row {row.id!r} needs {len(tree.prompt)} prompt + {longest} branch tokens, "
            f"more than pack.tokens = {pack_tokens}; raise pack.tokens or leave the row out"
        )
    return tree


def response_tree(row: Row, tokenizer: Tokenizer, pairs: Sequence[tuple[int, int]], pair_weight: str) -> Tree:
    """prompt -> chosen against rejected: a branch for each distinct answer that a pair needs."""
    prompt = tuple(tokenizer.prompt_ids(row.prompt))
    answers = list(dict.fromkeys(chain.from_iterable((row.chosen[i], row.rejected[j]) for i, j in pairs)))
    scored = [tuple(tokenizer.completion_ids(row.prompt, answer)) for answer in answers]
    return Tree(
        row.id,
        prompt,
        tuple(tokens[:-1] for tokens in scored),
        tuple(Completion(branch, 0, tokens) for branch, tokens in enumerate(scored)),
        tuple(
            Pair(
                answers.index(row.chosen[i]),
                answers.index(row.rejected[j]),
                PAIR_WEIGHTS[pair_weight](len(pairs)) * values.weight,
                values.margin,
                values.soft_label,
            )
            for i, j in pairs
            for values in [values_of(row, i, j)]
        ),
    )


def judge_prefix(tokenizer: Tokenizer, *, sighted: bool) -> tuple[int, ...]:
    """The tokens that every judge's prompt begins with: what two prompts without a word in common share.

    Less one, so that a tree whose orders share nothing more still has a prompt token of its own.
    """
    one, other = (
        tokenizer.verdict_prompt_ids(judge_messages(({"role": "user", "content": word},), word, word, sighted=sighted))
        for word in ("0", "~")
    )
    return tuple(one[: _shared_tokens([one, other]) - 1])


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with, leaving each at least one."""
    shared = 0
    while all(tokens[shared] == prompts[0][shared] for tokens in prompts) and shared < min(map(len, prompts)) - 1:
        shared += 1
    return shared


def verdict_tree(
    row: Row,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[int, int]],
    pair_weight: str,
    *,
    sighted: bool = True,
    prefix: tuple[int, ...] = (),
) -> Tree:
    """Judge prompt -> "A" against "B": each pair in both orders, chosen first on even branches, second on odd ones.

    Completions 2b and 2b + 1 are "A" and "B" on branch b. The tokens that all orders share are the tree's prompt;
    `prefix` (of judge_prefix) is its prefix where it begins with it.
    """
    labels = [tokenizer.encode(label) for label in LABELS]
    if [len(label) for label in labels] != [1, 1] or labels[0] == labels[1]:
        raise UserError(
            f"the tokenizer of {tokenizer.folder} writes the verdicts {' and '.join(LABELS)} as the tokens {labels}, "
            "but each must be one token of its own; take another model"
        )
    orders = [
        tuple(tokenizer.verdict_prompt_ids(judge_messages(row.prompt, first, second, sighted=sighted)))
        for i, j in pairs
        for first, second in ((row.chosen[i], row.rejected[j]), (row.rejected[j], row.chosen[i]))
    ]
    if orders[0] == orders[1]:
        raise UserError(
            "the judge's prompt is the same in both orders of the answers, so its chat template shows no user message; "
            f"mend the template of {tokenizer.folder}"
        )
    prompt = orders[0][: _shared_tokens(orders)]
    branches = tuple(tokens[len(prompt) :] for tokens in orders)
    weight = PAIR_WEIGHTS[pair_weight](len(branches))
    values = [values_of(row, i, j) for i, j in pairs for _ in LABELS]
    return Tree(
        row.id,
        prompt,
        branches,
        tuple(Completion(b, len(tokens), tuple(label)) for b, tokens in enumerate(branches) for label in labels),
        tuple(
            Pair(2 * b + b % 2, 2 * b + 1 - b % 2, weight * of_pair.weight, of_pair.margin, of_pair.soft_label, b ^ 1)
            for b, of_pair in enumerate(values)
        ),
        len(prefix) if len(prefix) < len(prompt) and prompt[: len(prefix)] == prefix else 0,
    )


PAIR_WEIGHTS: dict[str, Callable[[int], float]] = {"pair": lambda pairs: 1.0, "row": lambda pairs: 1.0 / pairs}
"""pair_weight -> weight of a pair whose row has so many: each pair counts the same, or each row."""


def build_trees(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    objective: str,
    pairs_per_row: int,
    pair_weight: str,
    pack_tokens: int,
    sighted: bool = True,
) -> list[Tree]:
    """One tree a row, in order. UserError where a prompt and one branch do not fit a pack."""
    builders: dict[str, Callable[[], Callable[..., Tree]]] = {
        "responses": lambda: response_tree,
        "verdicts": lambda: partial(verdict_tree, sighted=sighted, prefix=judge_prefix(tokenizer, sighted=sighted)),
    }
    build = builders[objective]()
    trees = []
    for row in rows:
        try:
            tree = build(row, tokenizer, pairs_of(row, pairs_per_row), pair_weight)
        except UserError as error:  # of the chat template, which knows no rows
            raise UserError(f"{row.where or row.id}: {error}") from error
        trees.append(_check_length(tree, row, pack_tokens))
    return trees


def trees_digest(trees: Sequence[Tree]) -> str:
    """16 hex digits that change with any token, scored span, pair or weight, and with the order of the trees."""
    digest = hashlib.blake2b(digest_size=8)
    for tree in trees:
        for completion in range(len(tree.completions)):
            digest.update(tree.key(completion))
        digest.update(repr(tree.pairs).encode())
    return digest.hexdigest()
