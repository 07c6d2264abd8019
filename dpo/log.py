"""What a run tells about itself while it runs: metrics.jsonl and wandb, progress bars, times, memory, the environment.

No dimension letters. Read next: dpo/report.py, which reads what is written here.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from tqdm import tqdm

from dpo.config import Config, config_dict
from dpo.results import Metrics, read_metrics
from models.errors import UserError
from models.files import atomic_write_text
from models.hub import revisions

if TYPE_CHECKING:
    import wandb


@dataclass
class MetricsLog:
    """metrics.jsonl of a run folder, a line on disk a call, and the same to wandb where `log.wandb` is not off.

    What the file says beyond `step`, from which the run goes on (0: the start), is dropped: a resumed run's file ends
    as an uninterrupted one's. All ranks but the `first` write nothing.
    """

    folder: Path
    config: Config
    step: int = 0
    first: bool = True
    kept: Metrics = field(default_factory=list, init=False)  # the lines from which a resumed run goes on
    _wandb: "wandb.Run | None" = field(default=None, init=False)

    def __enter__(self) -> Self:
        if self.first:
            self.kept = _drop_lines_after(self.folder / "metrics.jsonl", self.step)
            self._wandb = None if self.config.log.wandb == "off" else _start_wandb(self.folder, self.config)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics after `step` optimizer steps; what is not finite is written as null."""
        if not self.first:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        except OSError as error:
            error.filename = str(path)  # write() does not say where the disk is full
            raise
        if self._wandb:
            self._wandb.log({name: value for name, value in finite.items() if value is not None}, step=step)


def _drop_lines_after(path: Path, step: int) -> Metrics:
    """Keep of a metrics file the lines up to `step`, or none at step 0; whole or not at all. Those kept.

    A torn last line goes too: lines are written before their checkpoint, so it is beyond `step`.
    """
    kept = [line for line in read_metrics(path, torn=True) if line["step"] <= step] if step else []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[: len(kept)] if kept else []
    atomic_write_text(path, "".join(lines))
    return kept


def _start_wandb(folder: Path, config: Config) -> "wandb.Run":
    """The run's counterpart at wandb. Its id is made from machine and folder, so that a resumed run goes on there."""
    import wandb

    try:
        return wandb.init(
            project=config.log.project,
            name=f"{config.exp}-{folder.name}",
            id=hashlib.sha256(f"{platform.node()} {folder.resolve()}".encode()).hexdigest()[:16],
            resume="allow",
            config=config_dict(config),
            mode="offline" if config.log.wandb == "offline" else "online",
            dir=folder,
            settings=wandb.Settings(console="off"),  # no capture of the terminal: progress bars stay whole
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"log.wandb={config.log.wandb}: wandb does not start: {error}; run `wandb login`, "
            "or set log.wandb=offline (sent later by `wandb sync`) or log.wandb=off"
        ) from None


def progress(total: int, description: str, unit: str, done: int = 0) -> "tqdm[None]":
    """A bar with ETA and throughput, to be advanced by `update`; silent where stderr is no terminal.

    Only the first of torchrun's processes draws. A bar inside another one vanishes when it ends.
    """
    silent = True if os.environ.get("RANK", "0") != "0" else None  # None: tqdm asks whether stderr is a terminal
    return tqdm(total=total, desc=description, unit=f" {unit}", initial=done, disable=silent, leave=None)


@contextmanager
def stage(name: str, times: dict[str, float]) -> Iterator[None]:
    """Puts the seconds spent within it into times[name]."""
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin


def peak_rss_mib() -> float:
    """The largest resident memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def environment() -> dict[str, object]:
    """What a run's numbers may depend on beside its configuration, for env.json."""
    packages = ("torch", "triton", "safetensors", "tokenizers", "numpy")  # those absent are left out
    return {
        "start_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "source": source_digest(),
        "hub": revisions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found.version for name in packages for found in importlib.metadata.distributions(name=name)},
    }


@cache
def source_digest() -> str:
    """A digest of the product's own files, whatever commit they are of, but for those that only show results."""
    root = Path(__file__).resolve().parents[1]
    files = (file for package in ("dpo", "kernels", "models") for file in (root / package).rglob("*.*"))
    shows = re.compile(r"report|sweep|page|plots|card|verdict_files")
    sources = sorted(file for file in files if file.suffix in (".py", ".toml") and not shows.match(file.name))
    told = (f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sources)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def cpu_name() -> str:
    """The CPU's model as the system tells it."""
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else platform.machine()


def git_state(root: Path) -> dict[str, object] | None:
    """Commit and whether files, but kept results, differ from it; None where git or a checkout is absent."""
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--", ".", ":!experiments/results"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    dirty = any(not line.startswith(("# ", "? ")) for line in lines)  # as of git describe, untracked files are none
    return {"commit": lines[0].removeprefix("# branch.oid "), "dirty": dirty} if (root / ".git").exists() else None
