"""Everything a run reads, checked before a run begins: machine, model folder, tokenizer, rows, trees.

A user's mistake ends here, with the run folder not yet made. Read next: dpo/train.py.
"""

import ctypes
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dpo.checkable import make_rows
from dpo.config import Config
from dpo.judge.attacks import attack_share, attacked_rows, read_seen
from dpo.judge.prompts import asks, columns, judge_messages, read_template
from dpo.losses import check_loss
from dpo.rows import Rows, columns_of, keep_rows, read_rows, rows_digest
from dpo.shards import ENDINGS
from dpo.split import Splits, split_rows
from dpo.tokens import Trees, token_trees
from dpo.trees import TreeSettings
from kernels.backend import why_not_triton
from models.checkpoint import weights_fingerprint
from models.errors import UserError
from models.families import read_model_config
from models.gguf_import import resolve_model_path
from models.hub import fetch_data, is_hub_id
from models.tokenizer import Tokenizer, load_tokenizer, read_backend, read_variables

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES = 2**23  # tensors up to this size come from memory that stays: larger ones would leave holes


@dataclass(frozen=True)
class Inputs:
    """What the stages after it work on; trees and rows of a split stand in the same order."""

    dtype: torch.dtype  # of the arithmetic
    cache: Path
    model_folder: Path
    reference_folder: Path
    tokenizer: Tokenizer
    splits: Splits
    train_trees: Trees
    validation_trees: Trees  # under the objective, for loss and margins
    attacked: dict[str, Rows]  # by each of judge.attacks, the test rows that fit
    attacks_seen: list[str] | None  # families that training saw, this run's and those before it; None: not known


def policy_fingerprint(inputs: Inputs, config: Config) -> str:
    """Of the weights that the policy starts as, its adapter's too."""
    adapter = Path(config.model.adapter) if config.model.adapter else None
    return weights_fingerprint(inputs.model_folder, inputs.cache / "fingerprints.json", adapter)


def reference_fingerprint(inputs: Inputs, config: Config) -> str:
    """Of the reference's weights: the policy's without `reference.path`."""
    if not config.reference.path:
        return policy_fingerprint(inputs, config)
    return weights_fingerprint(inputs.reference_folder, inputs.cache / "fingerprints.json")


def set_up_cpu() -> None:
    """Make this process's arithmetic on CPUs fast; bits change only where they were denormal.

    Peaked softmaxes make denormals, which slow a CPU thirty-fold. And glibc gives tensors back to the kernel when they
    are freed, to get them anew, page by page, a moment later: a layer's, kept, are copied and cast three times as fast.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def pick_device(config: Config) -> str:
    """The device type: what `device` says, "cuda" for auto where there is a GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def pick_dtype(config: Config, device: str) -> torch.dtype:
    """The arithmetic's dtype: what `dtype` says; for auto bf16 where the machine multiplies it natively, else fp32."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether bf16 matrix products are the faster ones: with AMX (ten times), or AVX-512's bf16 units on AMD (twice).

    On an Intel CPU without AMX the same AVX-512 instructions measured slower than fp32 (experiments/LOG.md).
    """
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())


def cache_folder(config: Config) -> Path:
    """run.cache, else $DPO_CACHE, else ~/.cache/dpo-judges."""
    return Path(os.path.expanduser(config.run.cache or os.environ.get("DPO_CACHE") or "~/.cache/dpo-judges"))


def data_rows(config: Config, dropped: Counter[str]) -> tuple[Rows, list[str]]:
    """The rows of `data.path`, made, fetched or read, and their formats; `dropped` counts what prefers nothing."""
    if config.data.path == "checkable":
        return keep_rows(make_rows(config.checkable, config.seed), cache_folder(config)), ["ours"]
    path = config.data.path
    plain = [ending for ending in ENDINGS if ending != ".json"]  # which may say other things
    place = fetch_data(path, "data.path", plain) if is_hub_id(path, ENDINGS) else Path(path)
    formats: set[str] = set()
    rows = read_rows(place, config.data.format, dropped, cache_folder(config), formats)
    return rows, sorted(formats)


def load_splits(config: Config, *, judging: bool = False) -> Splits:
    """The rows of `data.path`, split; the training ones cut to `data.rows`, the test ones to `judge.rows`.

    Training rows are attacked last: neither the split nor the validation knows of it. When `judging` nothing is
    trained: there are test rows only, those that judge.split says.
    """
    dropped: Counter[str] = Counter()
    rows, formats = data_rows(config, dropped)
    data, judge, seed = config.data, config.judge, config.seed
    if judging and judge.split == "all":
        rows = keep_rows((replace(row, split="test") for row in rows), cache_folder(config))
        splits = split_rows(rows, split="group", seed=seed, validation_fraction=0, test_fraction=1)
    else:
        unvalidated = data.path == "checkable" and not config.checkable.validation_rows
        validation = 0.0 if unvalidated else data.validation_fraction
        fractions = {"validation_fraction": validation, "test_fraction": data.test_fraction}
        splits = split_rows(rows, split=data.split, seed=seed, **fractions)
    to_judge = splits.test
    if judging:  # after the split: which rows are held out does not hang on which are asked
        to_judge = to_judge.take(place for place, row in enumerate(to_judge) if asks(judge.protocol, row))
        if splits.test and not to_judge:
            raise UserError(f"judge.protocol={judge.protocol}: no row is one to ask; Ties rows are ref:N, tied:N")
    none = rows.take([])
    train = none if judging else sample(splits.train, data.rows, seed, "data.rows")
    test = sample(to_judge, judge.rows, seed, "judge.rows")
    more: dict[str, object] = {"dropped": dict(sorted(dropped.items())), "test_sha256": rows_digest(test)}
    more["formats"] = formats
    if judging and "rmbench" in formats and judge.protocol == "compare" and judge.pairs_per_row:
        raise UserError(
            f"data.path={data.path}: RM-Bench's score needs all nine pairs of a row; set judge.pairs_per_row=0"
        )
    others = (row.id for row in test if (len(row.chosen), len(row.rejected)) != (3, 3))
    if judging and formats == ["rmbench"] and judge.protocol == "compare" and (other := next(others, "")):
        raise UserError(f"data.path={data.path}: {other}: RM-Bench's score needs rows of 3 chosen and 3 rejected")
    if data.attack_share and not judging:
        train, more["attacked"] = attack_share(train, data.attack_share, data.attacks, seed, cache_folder(config))
    return Splits(train, none if judging else splits.validation, test, splits.report | more)


def sample(rows: Rows, most: int, seed: int, key: str) -> Rows:
    """At most `most` rows (0: all), in their old order: whole groups drawn with the seed, as long as they fit.

    UserError, which names `key`, where none fits.
    """
    if not most or most >= len(rows):
        return rows
    sizes = Counter(row.group for row in rows)
    groups = sorted(sizes)
    random.Random(f"sample {seed}").shuffle(groups)
    taken: set[str] = set()
    room = most
    for group in groups:
        if sizes[group] <= room:
            taken.add(group)
            room -= sizes[group]
    if not taken:
        raise UserError(f"{key}={most}: whole groups of rows are drawn, and each has more rows; raise it, or 0 = all")
    return rows.take(place for place, row in enumerate(rows) if row.group in taken)


def check_place(key: str, path: Path) -> None:
    """UserError where `path`, which need not exist, could not be made and written as a folder. Writes nothing."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "may not be written (Permission denied)" if there.is_dir() else "is a file (Not a directory)"
        raise UserError(f"{key}={path}: {there} {fault}; choose a folder that can be written")


def check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """UserError where the model in `folder` has no embedding for one of the tokenizer's tokens."""
    vocab = read_model_config(folder).vocab
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"{folder}: its config.json says vocab_size = {vocab}, fewer than the {tokenizer.vocab_size} tokens of "
            f"{tokenizer.folder / 'tokenizer.json'}; take weights and tokenizer from the same model"
        )


def _reference_folder(config: Config, cache: Path, tokenizer: Tokenizer) -> Path:
    """The folder of `reference.path`, the policy's where it is empty; both must read the same tokens."""
    if not config.reference.path:
        return tokenizer.folder
    folder = resolve_model_path(config.reference.path, cache, "reference.path")
    if read_backend(folder).get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(
            f"reference.path={config.reference.path}: its tokenizer has other tokens than that of {tokenizer.folder}; "
            "a reference must read the policy's tokens: take a model of the same family"
        )
    check_vocabulary(folder, tokenizer)
    return folder


def tree_settings(config: Config) -> TreeSettings:
    """What the objective's trees of the training rows depend on: of critiques, those of the verdicts alone."""
    data, judge = config.data, config.judge
    return TreeSettings(
        objective="responses" if config.objective == "responses" else "verdicts",
        pairs_per_row=data.pairs_per_row,
        pair_weight=config.train.pair_weight,
        pack_tokens=config.pack.tokens,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        sighted=judge.sighted,
        protocol=judge.protocol,
        template=read_template(judge.template, judge.protocol),
        reference_answer=judge.reference_answer,
        seed=config.seed if judge.protocol == "choose" or data.orders == "one" else 0,
        one_order=data.orders == "one",
    )


def critique_settings(config: Config) -> TreeSettings:
    """What the trees of questions to be answered with a critique depend on."""
    protocol = config.judge.protocol
    template = read_template(config.critiques.template or f"{protocol}_critique", protocol)
    return replace(tree_settings(config), objective="verdicts", template=template, room=config.critiques.max_tokens)


def judge_settings(config: Config, *, sighted: bool) -> TreeSettings:
    """What the trees of judged rows depend on: data.max_tokens limits them where it limits the objective's verdicts."""
    return replace(
        tree_settings(config) if config.judge.critique == "off" else critique_settings(config),
        objective="verdicts",
        pairs_per_row=config.judge.pairs_per_row,
        pair_weight="pair",
        max_tokens=0 if config.objective == "responses" else config.data.max_tokens,
        sighted=sighted,
        one_order=False,
    )


def answer_settings(config: Config) -> TreeSettings:
    """What the trees of judged rows' answers depend on, whose implicit rewards or likelihoods are compared."""
    return replace(judge_settings(config, sighted=True), objective="responses", max_tokens=0, room=0)


def scores_answers(config: Config) -> bool:
    """Whether those trees are asked for."""
    return config.judge.rewards != "off" or config.judge.self_preference


class _Fitted(NamedTuple):
    rows: Rows  # those whose trees fit
    trees: Trees  # theirs, under the last of the settings
    counts: dict[str, int]  # of rows, for results.json's `data`


def _fit(split: str, rows: Rows, builds: Sequence[TreeSettings], tokenizer: Tokenizer, cache: Path) -> _Fitted:
    """The rows of a split whose trees fit under all settings. UserError where there were rows and none is left."""
    fitting = rows
    noted = np.zeros((2, len(rows)), bool)  # of those that fit: cut, merges
    for settings in builds:
        trees = token_trees(fitting, tokenizer, settings, cache)
        places = trees.column("row")
        fitting = fitting.take(places)
        noted = noted[:, places] | np.array([trees.column("cut"), trees.column("merges")], bool)
    if rows and not fitting:
        raise UserError(
            f"data.too_long={builds[-1].too_long}: all {len(rows)} {split} rows are longer than {builds[-1].limit} "
            "tokens; raise data.max_tokens or pack.tokens"
        )
    cut, merges = noted.sum(1).tolist()
    return _Fitted(fitting, trees, {"too_long": len(rows) - len(fitting), "truncated": cut, "boundary_differs": merges})


def read_inputs(config: Config, device: str, *, judging: bool = False) -> Inputs:
    """Read and check all that the configuration names. UserError with what, where and what to do.

    When `judging` only the rows to be judged are there (load_splits).
    """
    dtype = pick_dtype(config, device)
    if config.kernels.backend == "triton" and (missing := why_not_triton(torch.device(device), dtype)):
        raise UserError(f"kernels.backend=triton: {missing}; or set kernels.backend=auto, which takes what there is")
    cache = cache_folder(config)
    check_place("run.root", Path(config.run.root))
    check_place("run.cache", cache)
    if config.reference.store:
        check_place("reference.store", Path(config.reference.store))
    if config.judge.protocol != "compare" and not judging:
        raise UserError(
            f"judge.protocol={config.judge.protocol}: is for python -m dpo.judge; a training has compare only"
        )
    if config.judge.sighted and config.judge.blind_control and not judging:  # it comes last, its template not
        template = judge_settings(config, sighted=False).template
        judge_messages((), ["", ""], template, sighted=False, reference="-" * ("reference_answer" in columns(template)))
    if config.data.max_tokens > config.pack.tokens:
        raise UserError(
            f"data.max_tokens={config.data.max_tokens}: more than pack.tokens = {config.pack.tokens} do not fit; "
            "lower the one or raise the other"
        )
    splits = load_splits(config, judging=judging)
    check_loss(config.loss, columns_of(chain(splits.train, splits.validation)))
    model_folder = resolve_model_path(config.model.path, cache)
    tokenizer = load_tokenizer(model_folder, read_variables(config.model.template_variables))
    check_vocabulary(model_folder, tokenizer)
    reference_folder = _reference_folder(config, cache, tokenizer)
    if not splits.test:
        raise UserError("no test rows: a run ends with judging held-out rows; set data.test_fraction above 0")
    objective, judge = tree_settings(config), judge_settings(config, sighted=config.judge.sighted)
    validated = replace(objective, pairs_per_row=config.judge.pairs_per_row, one_order=False)
    trained = [critique_settings(config)] * (config.objective == "critiques") + [objective]
    train = _fit("train", splits.train, trained, tokenizer, cache)
    validation = _fit("validation", splits.validation, [judge, validated], tokenizer, cache)
    judged = [answer_settings(config)] * scores_answers(config)
    judged += [judge_settings(config, sighted=True)] * config.judge.sighted_control + [judge]
    test = _fit("test", splits.test, judged, tokenizer, cache)
    under = attacked_rows(test.rows, config.judge.attacks, config.seed, cache)
    attacked = {name: _fit(f"test ({name})", rows, [judge], tokenizer, cache).rows for name, rows in under.items()}
    seen = read_seen([model_folder, *([Path(config.model.adapter)] if config.model.adapter else [])])
    if not judging:
        own = config.data.attacks if config.data.attack_share else []
        seen = list(dict.fromkeys([*(seen or []), *own]))
    parts = {"train": train, "validation": validation, "test": test}
    counts = {name: {split: part.counts[name] for split, part in parts.items()} for name in train.counts}
    splits = Splits(train.rows, validation.rows, test.rows, {**splits.report, **counts})
    return Inputs(
        dtype, cache, model_folder, reference_folder, tokenizer, splits, train.trees, validation.trees, attacked, seen
    )
