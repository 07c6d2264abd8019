"""Run folders: runs/NAME/<time>-<seed>/, made when the inputs are known to be good, found again to be resumed.

Read next: dpo/report.py, which reads one.
"""

import json
import shutil
import time
from itertools import count
from pathlib import Path

from dpo.config import Config, config_dict
from dpo.log import environment
from models.errors import UserError
from models.files import atomic_write_text, read_json_object

MAY_DIFFER = (
    *("run.resume", "run.root", "run.cache", "reference.store", "show", "log.wandb", "log.project", "log.plots"),
    *("train.checkpoint_every_steps", "train.n_checkpoints", "train.keep_checkpoints"),
)
"""Keys that a resumed run may change: none of them touches a number."""


def new_folder(config: Config) -> Path:
    """A new run folder with config.json and env.json; ROOT/NAME/latest points at it."""
    home = Path(config.run.root) / config.exp
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = home / f"{stamp}-{config.seed}"
    try:
        for number in count(2):  # a sweep may start several in one second
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                folder = home / f"{stamp}-{config.seed}.{number}"
        write_json(folder / "config.json", config_dict(config))
        write_json(folder / "env.json", environment())
        link = home / f".latest-{folder.name}"
        link.symlink_to(folder.name)
        link.replace(home / "latest")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"run.root={config.run.root}: cannot make {folder} ({error.strerror}); free space or choose another place"
        ) from error
    return folder


def resumed_folder(config: Config) -> Path:
    """The folder that run.resume names, if it was begun under the same configuration."""
    name = config.run.resume
    folder = Path(config.run.root) / config.exp / "latest" if name == "latest" else Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"run.resume={name}: {folder} is no run folder (it has no config.json)")
    folder = folder.resolve()
    before = _flat(read_json_object(folder / "config.json"))
    now = _flat(config_dict(config))
    changed = [key for key in now if key not in MAY_DIFFER and before.get(key) != now[key]]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:5])
        raise UserError(f"run.resume={name}: {folder} was begun under another configuration: {listed}")
    return folder


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
