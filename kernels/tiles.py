"""The tile table: the block sizes, warps and stages of every Triton kernel on every GPU, in one place, tiles.toml.

No dimension letters. Read next: kernels/backend.py, which chooses; kernels/static.py, which compiles every entry.

There is no tuning at run time: a tile is part of what is certified. `KERNEL_TILES` (a JSON file in the form of TILES)
overrides single entries, for tuning on a machine of one's own.
"""

import json
import os
import tomllib
from pathlib import Path

Tile = dict[str, int]

_FILE = tomllib.loads(Path(__file__).with_name("tiles.toml").read_text(encoding="utf-8"))
ARCHS = tuple(_FILE["gpus"])
TILES: dict[str, dict[str, Tile]] = {arch: _FILE["rows"] | tiles for arch, tiles in _FILE["gpus"].items()}
TILES["interpret"] = _FILE["interpret"]


def tile_of(arch: str, kernel: str) -> Tile:
    """A kernel's launch parameters on an arch; KeyError where none is shipped (kernels/backend.py looks first)."""
    override = os.environ.get("KERNEL_TILES")
    changed = json.loads(Path(override).read_text()) if override else {}
    return changed.get(arch, {}).get(kernel) or TILES[arch][kernel]
