"""The reference store's files, and the command that looks after them: python -m dpo.reference stat|verify|prune.

    STORE/<weights>-<tag>/identity.json             what the folder holds; its time is the folder's last use
                          part-<id>.safetensors     keys [n, 16], ends [n], checks [n, 8], logps [all tokens]

A part is written once under a name of its own and renamed into place. Every value carries a check of its key and bits,
so that a read touches what it asks for alone, and what is torn or altered is passed over and computed again.
No dimension letters. Read next: dpo/reference.py, which asks.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from dpo.config import Config
from dpo.inputs import cache_folder
from models.errors import UserError, exit_code
from models.files import atomic_write_bytes, read_json_object

PART_BYTES = 2**26  # prune merges smaller parts up to this: what a merge, and a read of all of a part, holds at once
LEFTOVER_S = 86_400  # a hidden file this old is no living writer's
FEW = 16  # below one value in so many, values are read one by one instead of the part as a whole

Values = dict[bytes, np.ndarray]


def open_store(root: Path, fingerprint: str, tag: dict[str, str]) -> Path:
    """The store's folder for these weights and this numerics tag, made if it is not there, and marked as used now."""
    digest = hashlib.sha256(json.dumps(tag, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{fingerprint[:16]}-{digest}"
    atomic_write_bytes(folder / "identity.json", json.dumps({"weights": fingerprint, **tag}, indent=2).encode())
    return folder


def write_part(folder: Path, values: Values) -> None:
    """Add one part holding `values` (at least one), whole or not at all; safe beside other writers."""
    tensors: dict[str, np.ndarray] = {
        "keys": np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16),
        "ends": np.cumsum([len(value) for value in values.values()], dtype=np.int64),
        "checks": np.frombuffer(b"".join(_check(*one) for one in values.items()), np.uint8).reshape(-1, 8),
        "logps": np.concatenate(list(values.values())),
    }
    atomic_write_bytes(folder / f"part-{uuid.uuid4().hex}.safetensors", safetensors.numpy.save(tensors))


def read_values(folder: Path, wanted: Set[bytes]) -> Values:
    """Those of `wanted` that a part of the folder holds soundly, by key."""
    heads = np.unique(np.frombuffer(b"".join(wanted), "<u8")[::2])
    found: Values = {}
    for path in parts_of(folder) if wanted else ():
        found.update(one for one in _part_values(path, heads) if one and one[0] in wanted)
    return found


def parts_of(folder: Path) -> list[Path]:
    """The files of a store's folder that hold values, sound or not."""
    return sorted(folder.glob("part-*.safetensors"))


def _check(key: bytes, value: np.ndarray) -> bytes:
    return hashlib.blake2b(value.dtype.char.encode() + key + value.tobytes(), digest_size=8).digest()


def _part_values(path: Path, heads: np.ndarray | None = None) -> Iterator[tuple[bytes, np.ndarray] | None]:
    """A part's keys and values, None for one that fails its check; a single None where the file as a whole is unsound.

    `heads`: only keys whose first eight bytes, as a number, stand in this sorted array.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            keys, ends, checks = (file.get_tensor(name) for name in ("keys", "ends", "checks"))
            logps = file.get_slice("logps")
            tokens = logps.get_shape()[0]
            rows = np.arange(len(keys))
            if heads is not None:
                head = keys.view("<u8")[:, 0]
                place = np.searchsorted(heads, head).clip(max=len(heads) - 1)
                rows = np.flatnonzero(heads[place] == head)
            if len(rows) * FEW > len(keys):
                logps = logps[:]
            spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)[rows].tolist()
            all_keys, all_checks = keys.tobytes(), checks.tobytes()
            for row, (begin, end) in zip(rows.tolist(), spans, strict=True):
                key, check = all_keys[16 * row : 16 * row + 16], all_checks[8 * row : 8 * row + 8]
                value = logps[begin:end].copy() if 0 <= begin <= end <= tokens else None
                yield (key, value) if value is not None and check == _check(key, value) else None
    except (OSError, safetensors.SafetensorError, LookupError, ValueError, TypeError):
        yield None  # truncated, of another kind, or gone


# --- the command ----------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    """The store's folders, the one used last first; known by their names, for prune removes them."""
    named = root.glob("*-" + "[0-9a-f]" * 16)
    return sorted((path for path in named if path.is_dir()), key=_last_use, reverse=True)


def _last_use(folder: Path) -> float:
    identity = folder / "identity.json"
    return (identity if identity.exists() else folder).stat().st_mtime


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sound_values(path: Path) -> tuple[Values, int]:
    """A part's sound values, and how many are not (1 for a file that cannot be read)."""
    values = list(_part_values(path))
    sound = dict(one for one in values if one)
    return sound, len(values) - len(sound)


def stat(root: Path, asked: argparse.Namespace) -> int:
    """A table: what each folder holds, how large it is, when it was last used; under it what its values depend on."""
    print(f"{'folder':33} {'parts':>6} {'torn':>5} {'values':>10} {'MiB':>9}  last use, UTC")
    for folder in _folders(root):
        checked = [sound_values(part) for part in parts_of(folder)]
        torn, values = sum(bad > 0 for _, bad in checked), sum(len(sound) for sound, _ in checked)
        used = datetime.fromtimestamp(_last_use(folder), UTC).strftime("%Y-%m-%d %H:%M")
        print(f"{folder.name:33} {len(checked):6} {torn:5} {values:10,} {_bytes(folder) / 2**20:9.1f}  {used}")
        identity = folder / "identity.json"
        known = read_json_object(identity) if identity.exists() else {"identity.json": "missing"}
        print("".join(f"    {name}: {value}\n" for name, value in known.items()), end="")
    return 0


def verify(root: Path, asked: argparse.Namespace) -> int:
    """Check every value again and name the parts where one fails; 1 where there are any."""
    count = failed = 0
    for path in (part for folder in _folders(root) for part in parts_of(folder)):
        sound, bad = sound_values(path)
        count, failed = count + len(sound), failed + (bad > 0)
        if bad:
            print(f"BAD {path}: {f'{bad} values fail their check' if sound else 'nothing of it can be read'}")
    advice = "; `prune` drops what is torn, and it is computed again when it is asked for" if failed else ""
    print(f"{'bad parts: ' + str(failed) if failed else 'ok'}, {count:,} sound values{advice}")
    return 1 if failed else 0


def prune(root: Path, asked: argparse.Namespace) -> int:
    """Remove what nobody can use or wants, and merge small parts; with --dry-run only say so."""
    before = sum(map(_bytes, _folders(root)))

    def remove(path: Path, why: str) -> None:
        print(f"{'would remove' if asked.dry_run else 'removed'} {path}: {why}")
        if not asked.dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    kept_bytes = 0
    for folder in _folders(root):
        unused_days = (time.time() - _last_use(folder)) / 86_400
        size = _bytes(folder)
        if asked.older_than is not None and unused_days > asked.older_than:
            remove(folder, f"not used for {unused_days:.0f} days")
            continue
        if asked.keep_bytes is not None and kept_bytes + size > asked.keep_bytes:
            remove(folder, f"{size:,} bytes, beyond the {asked.keep_bytes:,} of what was used later")
            continue
        kept_bytes += size
        for path in folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                remove(path, "left by a writer that was killed")
        _merge(folder, remove, dry_run=asked.dry_run)
    print(f"{before:,} bytes before, {sum(map(_bytes, _folders(root))):,} now")
    return 0


def _merge(folder: Path, remove: Callable[[Path, str], None], *, dry_run: bool) -> None:
    """Small parts into few; torn ones lose what is torn. What is merged is written before anything goes."""
    group: Values = {}
    members: list[tuple[Path, int, int]] = []  # with their unsound values, and their bytes

    def finish() -> None:
        if len(members) > 1 or any(bad for _, bad, _ in members):
            if group and not dry_run:
                write_part(folder, group)
            for path, bad, _ in members:
                remove(path, "torn, what is sound in it is kept" if bad else "merged with other small parts")
        group.clear()
        members.clear()

    for path in parts_of(folder):
        sound, bad = sound_values(path)
        size = path.stat().st_size
        if bad or size < PART_BYTES / 2:
            group.update(sound)
            members.append((path, bad, size))
        if sum(size for _, _, size in members) > PART_BYTES:
            finish()
    finish()


COMMANDS: dict[str, Callable[[Path, argparse.Namespace], int]] = {"stat": stat, "verify": verify, "prune": prune}


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status: 1 where verify finds a bad part, else exit_code's."""
    parser = argparse.ArgumentParser(prog="python -m dpo.reference", description="Look after the stored log-probs.")
    parser.add_argument("command", choices=COMMANDS, help="list the folders, check every value, or tidy up")
    parser.add_argument("store", nargs="?", default="", help="[reference.store=]FOLDER or run.cache=FOLDER")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="prune folders that no run used for so long")
    parser.add_argument("--keep-bytes", type=int, metavar="N", help="prune what was used longest ago, down to N bytes")
    parser.add_argument("--dry-run", action="store_true", help="say what prune would remove, and remove nothing")
    asked = parser.parse_args(arguments)
    if asked.command != "prune" and (asked.older_than is not None or asked.keep_bytes is not None or asked.dry_run):
        parser.error(f"{asked.command} removes nothing: --older-than, --keep-bytes and --dry-run are prune's")
    given = os.path.expanduser(asked.store.removeprefix("run.cache=").removeprefix("reference.store="))
    root = Path(given) if given else cache_folder(Config(exp="store"))
    if not given or asked.store.startswith("run.cache="):
        root /= "reference"

    def command() -> int:
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder; a run makes it when it stores its first value")
        return COMMANDS[asked.command](root, asked)

    return exit_code(command, stopped="what was removed is gone, the rest is whole")
