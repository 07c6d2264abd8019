"""Trees on disk, found again by content: rows are tokenised once, by all cores, and never all in memory.

    CACHE/tokens/<address>/trees.jsonl          a line a tree
                           table.safetensors    a row of TABLE a tree, and a checksum of both files

The address is a digest of all that the trees depend on: rows, settings, the tokenizer's files, and the code itself. A
torn or altered store is made again; two processes that need the same one wait for each other. No dimension letters.
Read next: dpo/inputs.py.
"""

import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

import dpo.judge.prompts
import dpo.trees
import models.tokenizer
from dpo.lines import Lines
from dpo.log import progress
from dpo.rows import Row
from dpo.trees import Built, Completion, Pair, Stem, Tree, TreeSettings, build_trees
from models.files import atomic_folder
from models.tokenizer import Tokenizer

CODE: tuple[ModuleType, ...] = (dpo.trees, dpo.judge.prompts, models.tokenizer)  # what makes tokens of rows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Of a tree: how many bytes its line has; its row's place; how many of these it has; what Built says.
TABLE = ("bytes", "row", "completions", "pairs", "cut", "merges")
CHUNK_ROWS = 128  # rows that a worker takes at a time
PARALLEL_ROWS = 2048  # below, starting workers costs more than it saves
MOST_WORKERS = 16

Encoded = tuple[bytes, NDArray[np.int64]]  # of some trees: their lines, and their rows of TABLE


@dataclass(frozen=True, eq=False)
class Trees(Lines[Tree]):
    """Stored trees. `digest` changes with any of them, and with their order."""

    table: NDArray[np.int64]  # [trees, TABLE]
    digest: str

    def column(self, name: str) -> list[int]:
        """One of TABLE, a number a tree."""
        values: list[int] = self.table[:, TABLE.index(name)].tolist()
        return values


def token_trees(rows: Sequence[Row], tokenizer: Tokenizer, settings: TreeSettings, cache: Path) -> Trees:
    """The trees of `rows` (dpo.trees.build_trees), from the cache where it has them, else built and kept there."""
    folder = cache / "tokens" / _address(rows, tokenizer, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of one process; the system lifts the lock of one that dies
        found = _open(folder)
        if found is None:
            found = _put(folder, _encoded(rows, lambda some: _lines(build_trees(some, tokenizer, settings))))
    return found


def keep_trees(folder: Path, trees: Iterable[Tree], rows: Iterable[int]) -> Trees:
    """These trees, of the rows at these places, in `folder`; what stands there is replaced."""
    return _put(folder, [_lines(Built(tree, row, False, False) for tree, row in zip(trees, rows, strict=True))])


def _put(folder: Path, parts: Iterable[Encoded]) -> Trees:
    digest = hashlib.sha256()
    tables = [np.zeros((0, len(TABLE)), np.int64)]
    with atomic_folder(folder) as new:
        with (new / "trees.jsonl").open("wb") as file:
            for lines, table in parts:
                file.write(lines)
                digest.update(lines)
                tables.append(table)
        whole = np.concatenate(tables)
        checksum = {"sha256": _checksum(digest.digest(), whole)}
        safetensors.numpy.save_file({"table": whole}, new / "table.safetensors", checksum)
    found = _open(folder)
    assert found is not None, f"{folder} is not what was just written there"
    return found


def _address(rows: Sequence[Row], tokenizer: Tokenizer, settings: TreeSettings) -> str:
    library = importlib.metadata.version("tokenizers")
    told = TABLE, settings, sorted(tokenizer.end_ids), sorted(tokenizer.variables.items()), library
    digest = hashlib.sha256(repr(told).encode())
    for module in CODE:
        digest.update(inspect.getsource(module).encode())
    for path in (tokenizer.folder / name for name in TOKENIZER_FILES):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"no such file")
    for row in rows:
        said = row.id, row.prompt, row.chosen, row.rejected, row.thinking, row.pair_values, row.reference_answer
        digest.update(repr(said).encode())
    return digest.hexdigest()[:24]


def _open(folder: Path) -> Trees | None:
    """The folder's trees, or None where it is not there, torn or altered."""
    try:
        file = (folder / "trees.jsonl").open("rb")
        digest = hashlib.file_digest(file, "sha256")
        with safetensors.safe_open(folder / "table.safetensors", "numpy") as part:
            table = part.get_tensor("table")
            sound = (part.metadata() or {}).get("sha256") == _checksum(digest.digest(), table)
    except (OSError, safetensors.SafetensorError):
        return None
    if not sound:
        return None
    ends = table[:, 0].cumsum()
    return Trees(file, np.stack([ends - table[:, 0], ends], 1), _decode, table, digest.hexdigest())


def _checksum(trees: bytes, table: NDArray[np.int64]) -> str:
    return hashlib.sha256(trees + table.tobytes()).hexdigest()


def _encoded(rows: Sequence[Row], encode: Callable[[Sequence[Row]], Encoded]) -> Iterator[Encoded]:
    """`encode` of CHUNK_ROWS rows after CHUNK_ROWS rows, by forked workers where there are enough of them."""
    begins = range(0, len(rows), CHUNK_ROWS)
    chunks = (rows[begin : begin + CHUNK_ROWS] for begin in begins)
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    alone = workers == 1 or len(rows) < PARALLEL_ROWS
    with (
        progress(len(rows), "tokenising", "rows") as bar,
        nullcontext() if alone else multiprocessing.get_context("fork").Pool(workers, _begin_work, (encode,)) as pool,
    ):
        parts = map(encode, chunks) if pool is None else pool.imap(_work, chunks)
        for begin, (lines, table) in zip(begins, parts, strict=True):
            bar.update(min(CHUNK_ROWS, len(rows) - begin))
            yield lines, table + np.array([0, begin, 0, 0, 0, 0])


# Of a forked process: neither templates nor tokenizers travel.
_of_worker: list[Callable[[Sequence[Row]], Encoded]] = []


def _begin_work(encode: Callable[[Sequence[Row]], Encoded]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to hear
    _of_worker.append(encode)


def _work(rows: Sequence[Row]) -> Encoded:
    return _of_worker[0](rows)


def _lines(trees: Iterable[Built]) -> Encoded:
    lines: list[bytes] = []
    table: list[tuple[int, ...]] = []
    for built in trees:
        tree = built.tree
        completions = [(c.branch, c.start, c.targets) for c in tree.completions]
        pairs = [(p.winner, p.loser, p.weight, p.margin, p.soft_label, p.twin) for p in tree.pairs]
        record = (tree.id, tree.prompt, tree.branches, completions, pairs, tree.prefix, tree.stems)
        lines.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        table.append((len(lines[-1]), built.row, len(completions), len(pairs), built.cut, built.merges))
    return b"".join(lines), np.array(table, np.int64).reshape(-1, len(TABLE))


def _decode(line: bytes) -> Tree:
    name, prompt, branches, completions, pairs, prefix, stems = json.loads(line)
    return Tree(
        name,
        tuple(prompt),
        tuple(map(tuple, branches)),
        tuple(Completion(branch, start, tuple(targets)) for branch, start, targets in completions),
        tuple(Pair(*pair) for pair in pairs),
        prefix,
        tuple(tuple(Stem(*stem) for stem in of_branch) for of_branch in stems),
    )
