"""Routes to experts: the reference's stored, the policy's compared with them or replaced by them, loads counted.

Letters: `L` sparse layers, `T` tokens of a pack, `E` experts, `K` experts per token. Read next: models/routing.py.

A token's route depends on what it sees alone, so prefixes, prompts, stems and branches are addressed by content, as
log-probs are, and found again in whatever pack they lie: a byte (two beyond 256 experts) for each token, layer and
choice.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo.config import Config
from dpo.distributed import Ranks, broadcast_first, gather
from dpo.logprobs import Note, TreeLogps
from dpo.packing import Pack
from dpo.store import Values, read_values, write_part
from dpo.trees import Tree
from models.attention import runs
from models.config import ModelConfig
from models.errors import UserError
from models.routing import Routing

WINDOW_TREES = 1024  # whose routes are held at once


def _address(path: Sequence[int], tokens: Sequence[int]) -> bytes:
    """Of a run of tokens, with all before it; where these end changes no route but by the last bits of its logits."""
    ids = np.fromiter(chain([len(path)], path, tokens), dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def tree_addresses(tree: Tree) -> set[bytes]:
    """Of its prefix, its prompt, each stem, and the rest of each branch: those that have tokens."""
    found = set()
    for branch, ids in enumerate(tree.branches):
        path, tokens, begin = tree.path(branch), tree.prompt + ids, 0
        for number, end in enumerate(path, 1):
            if end > begin:
                found.add(_address(path[:number], tokens[:end]))
            begin = end
    return found


def segments(pack: Pack) -> Iterator[tuple[bytes, slice]]:
    """The same of what lies in a pack, with its rows."""
    tokens = pack.tokens_T.tolist()
    for run in runs(pack.layout):
        path = list(accumulate(place.stop - place.start for place in run.seen))
        if run.tokens:
            yield _address(path, [token for place in run.seen for token in tokens[place]]), run.seen[-1]


def store_routes(
    folder: Path, trees: Sequence[Tree], score: Callable[[Sequence[Tree], Note], list[TreeLogps]], ranks: Ranks
) -> list[TreeLogps]:
    """What `score` says of the trees; where it sent their tokens goes into the folder. All ranks must call together."""
    found: Values = {}

    def note(pack: Pack, routing: Routing) -> None:
        layers = [routing.own[layer] for layer in sorted(routing.own)]
        kind = np.uint8 if len(next(iter(routing.asked.values()))) <= 256 else np.int16
        choice_TLK = torch.stack(layers, 1).cpu().numpy().astype(kind)
        found.update((address, choice_TLK[rows].flatten()) for address, rows in segments(pack))

    scored = score(trees, note)
    whole = {address: value for part in gather([found], ranks) for address, value in part.items()}
    if ranks.first and whole:
        write_part(folder, whole)
    return scored


def store_missing(folder: Path, trees: Sequence[Tree], store: Callable[[Sequence[Tree]], object], ranks: Ranks) -> None:
    """Run `store`, which stores routes, on those trees of which the folder lacks one."""
    for begin in range(0, len(trees), WINDOW_TREES):
        window = [(trees[i], tree_addresses(trees[i])) for i in range(begin, min(begin + WINDOW_TREES, len(trees)))]
        wanted = {address for _, addresses in window for address in addresses}
        there = broadcast_first(set(read_values(folder, wanted)) if ranks.first else set(), ranks)
        if missing := [tree for tree, addresses in window if not there.issuperset(addresses)]:
            store(missing)


@dataclass
class Routes:
    """The routes of one run's policy, beside the reference's in `folder` (None: not stored)."""

    folder: Path | None
    layers: tuple[int, ...]  # the sparse ones
    per_token: int  # K
    replay: bool
    balanced: bool
    asked: dict[int, Tensor] = field(default_factory=dict)  # of this step, by layer [E]
    flips: int = 0
    compared: int = 0

    def of(self, packs: Sequence[Pack], ranks: Ranks) -> list[Routing]:
        """What each forward is to be told; all ranks must call together."""
        known: Values = {}
        if self.folder is not None:
            own = [address for pack in packs if len(pack.rows_R) for address, _ in segments(pack)]
            wanted = set(gather(own, ranks))
            known = broadcast_first(read_values(self.folder, wanted) if ranks.first else {}, ranks)
        return [
            Routing(pack.layout.tokens, self._reference(pack, known, ranks), self.replay, self.balanced)
            for pack in packs
        ]

    def _reference(self, pack: Pack, known: Values, ranks: Ranks) -> dict[int, Tensor] | None:
        if self.folder is None or not len(pack.rows_R):  # a pack that only keeps a rank in step
            return None
        choice_TLK = np.zeros((pack.layout.tokens, len(self.layers), self.per_token), np.int64)
        for address, rows in segments(pack):
            if address not in known:
                raise UserError(
                    f"{self.folder}: the reference's routes have gone while they were in use; "
                    "start again with run.resume=latest: they are computed again"
                )
            choice_TLK[rows] = known[address].reshape(-1, *choice_TLK.shape[1:])
        whole = torch.from_numpy(choice_TLK).to(ranks.device)
        return dict(zip(self.layers, whole.unbind(1), strict=True))

    def count(self, packs: Sequence[Pack], routings: Sequence[Routing]) -> None:
        """Take what the forwards of these packs did into the step's figures."""
        for pack, routing in zip(packs, routings, strict=True):
            if not len(pack.rows_R):
                continue
            for layer, asked_E in routing.asked.items():
                so_far_E = self.asked.get(layer)
                self.asked[layer] = asked_E.cpu() if so_far_E is None else so_far_E + asked_E.cpu()
            for layer, other_TK in (routing.reference or {}).items():
                same_TK = (routing.own[layer][:, :, None] == other_TK[:, None, :]).any(-1)
                self.flips += int((~same_TK).sum())
                self.compared += same_TK.numel()

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Of all ranks' step, which it ends.

        moe/max_load: the busiest expert's tokens over the mean, averaged over the layers. moe/route_flips: the share of
        the policy's own choices that the reference did not make.
        """
        parts = gather([self.asked], ranks)
        loads_E = [torch.stack([part[layer] for part in parts if part]).sum(0).double() for layer in self.layers]
        load = sum(float(load_E.max() / load_E.mean()) for load_E in loads_E) / len(loads_E)
        flips, compared = (sum(gather([n], ranks)) for n in (self.flips, self.compared))
        self.asked, self.flips, self.compared = {}, 0, 0
        return {"moe/max_load": load, **({"moe/route_flips": flips / compared} if compared else {})}


def mean_balance(routings: Sequence[Routing]) -> Tensor:
    """The load-balancing loss of a batch: the mean over its packs, by their tokens, and over the layers.

    A pack of one token, which only fills up a rank's number of packs, counts nothing.
    """
    tokens = [routing.tokens if routing.tokens > 1 else 0 for routing in routings]
    shares = [count / max(sum(tokens), 1) for count in tokens]
    return sum(
        (torch.stack(list(of.balance.values())).mean() * share for of, share in zip(routings, shares, strict=True)),
        start=torch.zeros(()),
    )


def keeps_routes(config: Config, policy: ModelConfig, reference: ModelConfig) -> bool:
    """Whether the reference's routes are stored; UserError where they cannot be replayed as they should be."""
    kinds = [
        (model.experts and (model.experts.count, model.experts.per_token), [layer.sparse for layer in model.layers])
        for model in (policy, reference)
    ]
    alike = kinds[0] == kinds[1]
    if config.moe.routes == "replay" and not alike:
        raise UserError(
            f"moe.routes = replay: the experts of model.path={config.model.path} are not those of "
            f"reference.path={config.reference.path}; leave one of the keys out"
        )
    return any(layer.sparse for layer in policy.layers) and alike and config.moe.routes != "off"


def routes_of(config: Config, policy: ModelConfig, folder: Path | None) -> Routes | None:
    """The routes of a policy with experts; `folder` holds the reference's."""
    layers = tuple(index for index, layer in enumerate(policy.layers) if layer.sparse)
    if policy.experts is None or not layers:
        return None
    return Routes(folder, layers, policy.experts.per_token, config.moe.routes == "replay", bool(config.moe.aux_loss))
