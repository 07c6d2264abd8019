"""The tile table: the block sizes, warps and stages of every Triton kernel on every GPU, in one place.

No dimension letters. Read next: kernels/backend.py, which chooses; kernels/static.py, which compiles every entry.

There is no tuning at run time: a tile is part of what is certified. `KERNEL_TILES` (a JSON file in this table's form)
overrides single entries, for tuning on a machine of one's own.
"""

import json
import os
from pathlib import Path

Tile = dict[str, int]

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100 and H200, B200, MI300X

_ROWS: dict[str, Tile] = {  # bound by memory, not by tiles: one choice for all GPUs
    "combine_parts": {"BT": 64, "num_warps": 2, "num_stages": 2},
    "row_forward": {"BV": 4096, "num_warps": 8, "num_stages": 2},
    "row_backward": {"BV": 4096, "num_warps": 8, "num_stages": 2},
    "linear_target_rows": {"BN": 512, "num_warps": 4, "num_stages": 2},
    "pair_forward": {"BT": 256, "num_warps": 2, "num_stages": 2},
    "pair_backward": {"BT": 256, "num_warps": 2, "num_stages": 2},
    "dequantise_blocks": {"BG": 128, "num_warps": 4, "num_stages": 2},
}


def _products(forward: Tile, hidden_grad: Tile | None, weight_grad: Tile | None) -> dict[str, Tile]:
    named = {"linear_forward": forward, "linear_hidden_grad": hidden_grad, "linear_weight_grad": weight_grad}
    return _ROWS | {name: tile for name, tile in named.items() if tile is not None}


TILES: dict[str, dict[str, Tile]] = {
    "sm_80": _products(
        {"BT": 128, "BV": 128, "BD": 64, "GROUP": 16, "DESC": 0, "num_warps": 8, "num_stages": 3},
        {"BT": 128, "BN": 128, "BK": 64, "DESC": 0, "num_warps": 8, "num_stages": 3},
        {"BM": 128, "BN": 128, "BK": 64, "DESC": 0, "num_warps": 8, "num_stages": 3},
    ),
    "sm_90": _products(  # 256 words spill with softcap or entropy, 256 columns of dW where it adds
        {"BT": 128, "BV": 128, "BD": 64, "GROUP": 16, "DESC": 1, "num_warps": 8, "num_stages": 3},
        {"BT": 128, "BN": 256, "BK": 64, "DESC": 1, "num_warps": 8, "num_stages": 3},
        {"BM": 128, "BN": 128, "BK": 64, "DESC": 1, "num_warps": 8, "num_stages": 3},
    ),
    "sm_100": _products(  # 256 words spill with softcap or entropy, 256 columns of dW where it adds
        {"BT": 128, "BV": 128, "BD": 64, "GROUP": 16, "DESC": 1, "num_warps": 8, "num_stages": 3},
        {"BT": 128, "BN": 256, "BK": 64, "DESC": 1, "num_warps": 8, "num_stages": 3},
        {"BM": 128, "BN": 128, "BK": 64, "DESC": 1, "num_warps": 8, "num_stages": 3},
    ),
    "gfx942": _products(
        {"BT": 128, "BV": 128, "BD": 64, "GROUP": 16, "DESC": 0, "num_warps": 8, "num_stages": 2},
        {"BT": 128, "BN": 128, "BK": 64, "DESC": 0, "num_warps": 8, "num_stages": 2},
        {"BM": 128, "BN": 128, "BK": 64, "DESC": 0, "num_warps": 8, "num_stages": 2},
    ),
    # Not a GPU: the interpreter's, small so that every tail is met.
    "interpret": {
        "combine_parts": {"BT": 16},
        "row_forward": {"BV": 64},
        "row_backward": {"BV": 64},
        "linear_target_rows": {"BN": 64},
        "pair_forward": {"BT": 8},
        "pair_backward": {"BT": 8},
        "dequantise_blocks": {"BG": 8},
        "linear_forward": {"BT": 16, "BV": 128, "BD": 64, "GROUP": 3, "DESC": 0},
        "linear_hidden_grad": {"BT": 32, "BN": 64, "BK": 64, "DESC": 0},
        "linear_weight_grad": {"BM": 64, "BN": 64, "BK": 32, "DESC": 0},
    },
}


def tile_of(arch: str, kernel: str) -> Tile:
    """A kernel's launch parameters on an arch; KeyError where none is shipped (kernels/backend.py asks `has_tile`)."""
    override = os.environ.get("KERNEL_TILES")
    changed = json.loads(Path(override).read_text()) if override else {}
    return changed.get(arch, {}).get(kernel) or TILES[arch][kernel]


def has_tile(arch: str, kernel: str) -> bool:
    """Whether a tile is shipped for the kernel on the arch."""
    return kernel in TILES.get(arch, {})
