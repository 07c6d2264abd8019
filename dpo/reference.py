"""The reference store: log-probs under the reference as data, found again by content, never stale.

Letters: `S` completions. Read next: dpo/store.py, dpo/logprobs.py.

A value is addressed by three things: the reference's weights (their fingerprint), the numerics tag (all that bit
equality depends on), and the tokens with the scored span (Tree.key). Two name a folder, the third a row in it.
Loss settings are in none of them, so a sweep over losses, betas, rates and seeds runs no reference forward.
`python -m dpo.reference` lists, verifies and prunes what is stored.
"""

import ast
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dpo.config import PackConfig
from dpo.distributed import Ranks, broadcast_first
from dpo.log import cpu_name
from dpo.logprobs import Score, TreeLogps
from dpo.store import main, read_values, write_part
from dpo.trees import Tree

WRITE_EVERY_TREES = 1024  # a killed run loses at most this much of its reference pass
FORWARD = (  # what makes a log-prob of a model's files and tokens, or writes with it
    *("dpo/packing.py", "dpo/logprobs.py", "models/decoder.py", "models/parts.py", "models/attention.py"),
    *("models/frugal.py", "models/rope.py", "models/moe.py", "models/routing.py", "models/sharded.py"),
    *("models/padding.py", "models/lora.py", "models/config.py", "models/layouts.py", "models/checkpoint.py"),
    *("models/generate.py", "models/kv_cache.py"),
    *("models/families/*.py", "kernels/linear_*.py", "kernels/row_triton.py", "kernels/triton_parts.py"),
    *("kernels/tiles.py", "kernels/mxfp4*.py", "kernels/widened.py"),
)

NO_FORWARD = ("asked", "why", "row_backward", "linear_hidden_grad", "linear_weight_grad", "linear_target_rows")
"""Of what kernels.backend.describe says, what no log-prob depends on."""


@dataclass
class Usage:
    """How many completions' log-probs were found (`hits`) and how many computed (`misses`) so far."""

    hits: int = 0
    misses: int = 0


@cache
def forward_code(root: Path) -> str:
    """16 hex digits of FORWARD's code under `root`, comments and layout left out: a changed line changes bits."""
    files = sorted(path for pattern in FORWARD for path in root.glob(pattern))
    code = [[path.relative_to(root).as_posix(), ast.dump(ast.parse(path.read_bytes()))] for path in files]
    return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def numerics_tag(device: torch.device, dtype: torch.dtype, pack: PackConfig, head: dict[str, str]) -> dict[str, str]:
    """Everything that the bits of a log-prob depend on besides weights and tokens.

    `head`: what kernels.backend.describe says of the head's path; NO_FORWARD is left out.
    """
    units = f"{torch.backends.cpu.get_cpu_capability()}, amx={torch.cpu._is_amx_tile_supported()}"
    cpu = f"{cpu_name()}, {units}"  # the libraries pick their kernels by both
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype),
        "pack": f"{pack.tokens} tokens, head chunks of {pack.head_chunk}",
        "attention": "flex_attention" if device.type == "cuda" else "branch by branch",
        "code": forward_code(Path(__file__).parents[1]),
        "head": ", ".join(f"{key}: {value}" for key, value in head.items() if key not in NO_FORWARD),
    }


def reference_logps(folder: Path, trees: Sequence[Tree], score: Score, ranks: Ranks, usage: Usage) -> list[TreeLogps]:
    """Per-token reference log-probs of every tree, from the store where it has them, else from `score` (and kept).

    `score` runs the reference on whole trees, in order; all ranks must call together, the first one reads and writes.
    """
    keys = [[tree.key(c) for c in range(len(tree.completions))] for tree in trees]
    wanted = {key for tree_keys in keys for key in tree_keys}
    found = broadcast_first(read_values(folder, wanted) if ranks.first else {}, ranks)
    missing = [i for i, tree_keys in enumerate(keys) if any(key not in found for key in tree_keys)]
    misses = sum(key not in found for tree_keys in keys for key in tree_keys)
    usage.misses += misses
    usage.hits += sum(map(len, keys)) - misses
    for begin in range(0, len(missing), WRITE_EVERY_TREES):
        part = missing[begin : begin + WRITE_EVERY_TREES]
        new = {
            key: logps
            for i, tree_logps in zip(part, score([trees[i] for i in part]), strict=True)
            for key, logps in zip(keys[i], tree_logps, strict=True)
            if key not in found
        }
        if ranks.first and new:  # nothing where all of it stands earlier in `trees` too
            write_part(folder, new)
        found.update(new)
    return [[found[key] for key in tree_keys] for tree_keys in keys]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
