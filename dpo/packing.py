"""Packs: rows of exactly `pack_tokens` tokens filled with whole trees, and batches of packs closed under pairs.

Letters: `T` tokens of a pack, `R` scored tokens, `S` completions of a batch, `B` pairs. Read next: dpo/logprobs.py.

Every pack has one fixed shape, filled by first-fit-decreasing bin packing and padded, so that a token's values do not
depend on its neighbours; models/padding.py leaves out of it what changes no bit. Trees that begin with the same prefix
lie in the same packs, which run it once. A tree larger than a pack is split between branches, with its prompt and stems
repeated; packs that share a tree's pairs form one batch and are differentiated together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo.trees import Tree
from models.attention import Layout, Shape


@dataclass(frozen=True)
class Pack:
    """One fixed-shape row of tokens and the list of what is scored in it."""

    tokens_T: Tensor
    positions_T: Tensor
    layout: Layout
    rows_R: Tensor  # hidden row that predicts each scored token
    targets_R: Tensor
    completion_R: Tensor  # index in the batch of the completion it belongs to


@dataclass(frozen=True)
class Batch:
    """Packs whose trees' pairs all lie within them."""

    packs: tuple[Pack, ...]
    completions: tuple[tuple[int, int], ...]  # (tree index, completion of it) for each of S
    lengths_S: Tensor  # scored tokens
    winner_B: Tensor  # indices into S
    loser_B: Tensor
    weight_B: Tensor
    margin_B: Tensor
    soft_label_B: Tensor
    twin_B: Tensor  # index into B of the same pair in the other order; its own where there is none

    @property
    def completion_R(self) -> Tensor:
        """The completion of every scored token of its packs, one pack after another; a completion's lie together."""
        return torch.cat([pack.completion_R for pack in self.packs])


@dataclass(frozen=True)
class _Piece:
    tree: int
    branches: tuple[int, ...]
    tokens: int  # without the prefix


def _pieces(index: int, tree: Tree, pack_tokens: int) -> list[_Piece]:
    """The tree whole, or cut between branches into pieces that fit a pack, those with the same stems side by side."""
    pieces: list[_Piece] = []
    taken: list[int] = []
    prompt, room = len(tree.prompt) - tree.prefix, pack_tokens - tree.prefix
    assert prompt + max(map(len, tree.branches), default=0) <= room, f"tree {tree.id}: a branch does not fit the pack"
    for branch in sorted(range(len(tree.branches)), key=tree.stems_of):
        if prompt + tree.tokens_of([*taken, branch]) > room:
            pieces.append(_Piece(index, tuple(taken), prompt + tree.tokens_of(taken)))
            taken = []
        taken.append(branch)
    return [*pieces, _Piece(index, tuple(taken), prompt + tree.tokens_of(taken))]


def _first_fit_decreasing(trees: Sequence[Tree], pack_tokens: int) -> list[list[_Piece]]:
    """Bins of the trees' pieces with one prefix each: each goes to the first bin that has room, the largest first."""
    pieces = [piece for index, tree in enumerate(trees) for piece in _pieces(index, tree, pack_tokens)]
    bins: list[list[_Piece]] = []
    room: list[int] = []
    prefixes: list[tuple[int, ...]] = []
    for piece in sorted(pieces, key=lambda p: -p.tokens):
        prefix = trees[piece.tree].prompt[: trees[piece.tree].prefix]
        fits = (i for i, free in enumerate(room) if free >= piece.tokens and prefixes[i] == prefix)
        slot = next(fits, len(bins))
        if slot == len(bins):
            bins.append([])
            room.append(pack_tokens - len(prefix))
            prefixes.append(prefix)
        bins[slot].append(piece)
        room[slot] -= piece.tokens
    return bins


def _linked(bins: Sequence[Sequence[_Piece]]) -> list[list[int]]:
    """Bins grouped so that no tree lies in two groups."""
    group_of = list(range(len(bins)))
    first_bin: dict[int, int] = {}
    for i, pieces in enumerate(bins):
        for piece in pieces:
            other = group_of[first_bin.setdefault(piece.tree, i)]
            group_of = [other if group == group_of[i] else group for group in group_of]
    return [[i for i, group in enumerate(group_of) if group == wanted] for wanted in dict.fromkeys(group_of)]


def _pack(pieces: Sequence[_Piece], trees: Sequence[Tree], slots: dict[tuple[int, int], int], pack_tokens: int) -> Pack:
    prefix = trees[pieces[0].tree].prefix
    tokens = list(trees[pieces[0].tree].prompt[:prefix])
    positions = list(range(prefix))
    scored: list[tuple[int, int, int]] = []

    def lay(ids: Sequence[int], position: int) -> list[int]:
        """Tokens that stand behind the last ones; their rows."""
        rows = list(range(len(tokens), len(tokens) + len(ids)))
        tokens.extend(ids)
        positions.extend(range(position, position + len(ids)))
        return rows

    def lay_branches(piece: _Piece, members: Sequence[int], level: int, rows: list[int]) -> tuple[Shape, ...]:
        """Branches whose first `level` stems are the same ones; `rows`: of the last prompt token, then of these stems.

        A completion is scored from the row before its first token on.
        """
        tree, begin = trees[piece.tree], len(rows) - 1
        shapes: list[Shape] = []
        stems = {branch: tree.stems_of(branch)[level:] for branch in members}
        for stem in dict.fromkeys(of_branch[0] for of_branch in stems.values() if of_branch):
            alike = [branch for branch in members if stem in stems[branch][:1]]
            (shared,) = {tree.branches[branch][begin : stem.end] for branch in alike}
            way = rows + lay(shared, len(tree.prompt) + begin)
            shapes.append((len(shared), lay_branches(piece, alike, level + 1, way)))
        for branch in (branch for branch in members if not stems[branch]):
            own = tree.branches[branch][begin:]
            way = rows + lay(own, len(tree.prompt) + begin)
            shapes.append(len(own))
            for index, completion in enumerate(tree.completions):
                if completion.branch == branch:
                    of_targets = way[completion.start : completion.start + len(completion.targets)]
                    slot = slots[piece.tree, index]
                    scored.extend((row, x, slot) for row, x in zip(of_targets, completion.targets, strict=True))
        return tuple(shapes)

    shapes: list[Shape] = []
    for piece in pieces:
        prompt = trees[piece.tree].prompt
        rows = lay(prompt[prefix:], prefix)
        shapes.append((len(rows), lay_branches(piece, piece.branches, 0, rows[-1:])))
    padding = pack_tokens - len(tokens)
    rows_R, targets_R, completion_R = torch.tensor(scored, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    tokens_T, positions_T = torch.tensor(tokens + [0] * padding), torch.tensor(positions + [0] * padding)
    return Pack(tokens_T, positions_T, Layout(prefix, tuple(shapes)), rows_R, targets_R, completion_R)


def empty_pack(pack_tokens: int) -> Pack:
    """A pack that scores nothing: what a rank runs while others still have work.

    It holds one token, so that every weight takes part and gets a gradient (of zeros): sharded ranks must send alike.
    """
    one_token = Tree("", (0,), (), (), ())
    return _pack([_Piece(0, (), 1)], [one_token], {}, pack_tokens)


def pack_trees(trees: Sequence[Tree], pack_tokens: int) -> list[Batch]:
    """Batches that together hold every tree once; each batch's packs are to be kept until its loss is taken."""
    bins = _first_fit_decreasing(trees, pack_tokens)
    batches = []
    for group in _linked(bins):
        members = {tree: trees[tree] for tree in sorted({piece.tree for i in group for piece in bins[i]})}
        batch = bare_batch(members)
        slots = {completion: slot for slot, completion in enumerate(batch.completions)}
        batches.append(replace(batch, packs=tuple(_pack(bins[i], trees, slots, pack_tokens) for i in group)))
    return batches


def bare_batch(members: Mapping[int, Tree]) -> Batch:
    """The batch of some trees, by their index, without its packs: what a loss needs besides log-probs."""
    completions = tuple((index, c) for index, tree in members.items() for c in range(len(tree.completions)))
    slots = {completion: slot for slot, completion in enumerate(completions)}
    pairs = [(index, place, pair) for index, tree in members.items() for place, pair in enumerate(tree.pairs)]
    lengths = [len(members[index].completions[c].targets) for index, c in completions]
    indices = [
        (slots[index, pair.winner], slots[index, pair.loser], pair.twin - place if pair.twin is not None else 0)
        for index, place, pair in pairs
    ]
    said = [(pair.weight, pair.margin, pair.soft_label) for _, _, pair in pairs]
    winner_B, loser_B, to_twin_B = torch.tensor(indices, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    weight_B, margin_B, soft_label_B = torch.tensor(said, dtype=torch.float64).reshape(-1, 3).T.contiguous()
    twin_B = torch.arange(len(pairs)) + to_twin_B
    lengths_S = torch.tensor(lengths, dtype=torch.int64)
    return Batch((), completions, lengths_S, winner_B, loser_B, weight_B, margin_B, soft_label_B, twin_B)


def pack_share(trees: Sequence[Tree], pack_tokens: int, rank: int, world: int) -> list[Batch]:
    """Batches of every world-th tree from `rank` on, filled up with empty ones to the same shape on every rank.

    Ranks must run equally many forwards and backwards in the same order; each can work out what the others have.
    """
    shares = [pack_trees(trees[r::world], pack_tokens) for r in range(world)]
    idle = bare_batch({})
    batches = []
    for i in range(max(map(len, shares))):
        row = [share[i] if i < len(share) else idle for share in shares]
        packs = max(len(batch.packs) for batch in row)
        filling = tuple(empty_pack(pack_tokens) for _ in range(packs - len(row[rank].packs)))
        batches.append(replace(row[rank], packs=row[rank].packs + filling))
    return batches
