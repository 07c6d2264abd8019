"""Run folders: runs/NAME[-judge]/<time>-<seed>/, made when the inputs are known to be good, found again to be resumed.

Read next: dpo/report.py, which reads one.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from dpo.config import Config, config_dict
from dpo.log import environment
from models.errors import UserError
from models.files import read_json_object, write_json

MAY_DIFFER = (
    *("run.resume", "run.root", "run.cache", "reference.store", "show", "log.wandb", "log.project", "log.plots"),
    *("run.hang_s", "train.checkpoint_every_steps", "train.n_checkpoints", "train.keep_checkpoints"),
)
"""Keys that a resumed run may change: none of them touches a number."""


def home_of(config: Config, *, judging: bool = False) -> Path:
    """Where its runs lie: ROOT/NAME, or ROOT/NAME-judge, so that `latest` of a training is never a judging."""
    return Path(config.run.root) / (f"{config.exp}-judge" if judging and config.exp != "judge" else config.exp)


def new_folder(config: Config, *, judging: bool = False) -> Path:
    """A new run folder with config.json and env.json; `latest` beside it points at it."""
    home = home_of(config, judging=judging)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = home / f"{stamp}-{config.seed}"
    try:
        for number in count(2):  # a sweep may start several in one second
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                folder = home / f"{stamp}-{config.seed}.{number}"
        write_json(folder / "env.json", environment())
        link = home / f".latest-{folder.name}"
        link.symlink_to(folder.name)
        link.replace(home / "latest")
        write_json(folder / "config.json", config_dict(config))  # last: with it the run counts as begun
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"run.root={config.run.root}: cannot make {folder} ({error.strerror}); free space or choose another place"
        ) from error
    return folder


def resumed_folder(config: Config, name: str, *, judging: bool = False) -> Path | None:
    """The folder that `name`, a value of run.resume, is of, begun under the same configuration.

    `auto` is the last one begun so and without report.html, the last thing that a run writes, or None: a new run.
    """
    home = home_of(config, judging=judging)
    if name == "auto":
        begun = sorted((path.parent for path in home.glob("[0-9]*/config.json")), reverse=True)
        open_ones = (one for one in begun if not (one / "report.html").exists() and not _changed(one, config)[0])
        return next(open_ones, None)
    folder = home / "latest" if name == "latest" else Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"run.resume={name}: {folder} is no run folder (it has no config.json)")
    folder = folder.resolve()
    fixed, free = _changed(folder, config)
    allowed = f"these may differ: {'; '.join(free)}" if free else ""
    if fixed:
        raise UserError(
            f"run.resume={name}: {folder} was begun under another configuration: {'; '.join(fixed)}. Its figures "
            f"hang on these: set them back, or start a new run{f' ({allowed})' if free else ''}"
        )
    if free and config.run.resume:  # who only looks whether a run was begun says nothing
        print(f"run.resume={name}: {allowed}")
    return folder


def _changed(folder: Path, config: Config) -> tuple[list[str], list[str]]:
    """The keys whose values are not those that the run was begun with: those that must be, and those of MAY_DIFFER.

    A key that the run knew nothing of counts as its default then.
    """
    begun, now = flat(read_json_object(folder / "config.json")), flat(config_dict(config))
    before = flat(config_dict(Config(exp=config.exp))) | begun
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key != "run.resume"]
    told = {key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys}
    return [told[key] for key in keys if key not in MAY_DIFFER], [told[key] for key in keys if key in MAY_DIFFER]


def read_config(folder: Path) -> Config:
    """The configuration of the run in `folder`; UserError where its file is damaged."""
    try:
        return Config.model_validate(read_json_object(folder / "config.json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / 'config.json'}: {key}: {first['msg']}; the file was altered") from None


@contextmanager
def sole_process(folder: Path) -> Iterator[None]:
    """Within it no other process trains in this run folder, and what a killed one left half-written is gone."""
    with open(folder / "config.json") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training in it; wait for it, or start a new run") from None
        for pattern in (".*.tmp", ".*.old"):
            for left in folder.rglob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """A configuration's values by their dotted keys."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values
