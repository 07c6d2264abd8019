"""Hugging Face Hub ids in the place of paths: ORG/NAME, ORG/NAME@REVISION, and of a dataset ORG/NAME:FILE.

huggingface_hub does the work, with its cache, its locks and its settings (HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, ...).
Without a network what its cache holds is used. Read next: models/gguf_import.py, which says what a model.path may be.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import COPIED
from models.errors import UserError

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<inside>.+))?", re.ASCII)
WEIGHTS = ("*.safetensors", "*.json", "README.md", *COPIED)
OTHER_COPIES = ("*/*", "consolidated*")  # of the same weights in other formats: original/, onnx/, Mistral's own
SHARD = re.compile(r"-\d+-of-\d+")
# What went wrong, by the name of huggingface_hub's exception or of one that it builds on, and what to do.
FAULTS = {
    "GatedRepoError": "is gated; accept its terms on its page, then set HF_TOKEN to a token of the same account",
    "RevisionNotFoundError": "has no such revision; take one of its branches, tags or commits",
    "RepositoryNotFoundError": "is no {kind} there, or a private one; mend the name, or set HF_TOKEN to a token that "
    "may read it",
    "OfflineModeIsEnabled": "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or run once online",
    "LocalEntryNotFoundError": "is not in the cache, and the Hub could not be reached ({said}); look to the network, "
    "or give a path",
}

_fetched: dict[str, Path] = {}  # by kind and name: a branch that moves must not give one run two commits


def fetch_model(name: str, key: str) -> Path:
    """The folder of the Hub model that `key`'s value names, downloaded if need be: config, tokenizer, safetensors."""
    if inside := _parts(name)["inside"]:
        raise UserError(f"{key} = {name!r}: a model is a whole repository; leave :{inside} away")
    return _fetch(name, key, "model", WEIGHTS, OTHER_COPIES)


def fetch_data(name: str, key: str, endings: Sequence[str]) -> Path:
    """The file, or the folder of shards, of the Hub dataset that `key`'s value names, downloaded if need be.

    Without :FILE a dataset must hold one file with one of the `endings` (".jsonl", ...), or the shards of one.
    """
    inside = _parts(name)["inside"]
    snapshot = _fetch(name, key, "dataset", [inside, f"{inside}/*"] if inside else [f"*{end}" for end in endings], ())
    if inside:
        found = [snapshot / inside] if (snapshot / inside).exists() else []
    else:
        found = sorted(path for path in snapshot.rglob("*") if path.name.endswith(tuple(endings)))
    if len(found) > 1 and len({(path.parent, SHARD.split(path.name)[0]) for path in found}) == 1:
        found = [found[0].parent]
    if len(found) != 1:
        held = ", ".join(str(path.relative_to(snapshot)) for path in found[:20])
        raise UserError(
            f"{key} = {name!r}: the dataset has {f'several files ({held})' if held else 'no such file'}; name one file "
            f"or folder of it, {key}={_parts(name)['repo']}:FILE, ending in {', '.join(endings)}"
        )
    return found[0]


def is_hub_id(name: str, endings: tuple[str, ...] = ()) -> bool:
    """Whether `name` reads as an id on the Hub: nothing lies at that path, and ORG/NAME has none of the `endings`."""
    match = HUB_ID.fullmatch(name)
    return match is not None and not match["repo"].endswith(endings) and not os.path.exists(name)


def revisions() -> dict[str, str]:
    """The commit of all that was fetched so far, by kind and name."""
    return {asked: folder.name for asked, folder in _fetched.items()}


def _parts(name: str) -> dict[str, str | None]:
    match = HUB_ID.fullmatch(name)
    assert match is not None, f"{name} is no Hub id: ask is_hub_id first"
    return match.groupdict()


def _fetch(name: str, key: str, kind: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    asked = f"{kind} {name}"
    if asked in _fetched:
        return _fetched[asked]
    from huggingface_hub import snapshot_download  # here: most runs need no Hub

    repo, revision = _parts(name)["repo"], _parts(name)["revision"]
    try:
        folder = snapshot_download(
            str(repo), repo_type=kind, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
        )
    except Exception as error:  # the library's, and its HTTP client's own
        kin = [a_class.__name__ for fault in (error.__cause__, error) for a_class in type(fault).__mro__]
        told = next((text for known, text in FAULTS.items() if known in kin), "cannot be fetched: {said}")
        said = (str(error.__cause__ or error).splitlines() or [""])[0]
        told = told.format(kind=kind, said=said)
        raise UserError(f"{key} = {name!r}: there is no such path here, and on the Hub it {told}") from error
    _fetched[asked] = Path(folder)
    return _fetched[asked]
