"""models/checkpoint.py: reads what transformers writes and back, names every fault, leaves nothing half-written."""

import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models.checkpoint
from models.checkpoint import (
    INDEX,
    SINGLE,
    load_weights,
    save_folder,
    stored_tensors,
    weight_files,
    weights_fingerprint,
    write_weights,
)
from models.errors import UserError
from models.families import read_model_config

transformers = pytest.importorskip("transformers")

CONFIG: dict[str, object] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def published(folder: Path, *, tied: bool, shard_size: str = "5GB", **changes: object) -> dict[str, torch.Tensor]:
    """A tiny random model, written by transformers; returns the parameters that our module would have."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG | {"tie_word_embeddings": tied} | changes)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def empty_like(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {k: torch.nn.Parameter(torch.full(v.shape, torch.nan, dtype=dtype)) for k, v in tensors.items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def model(tmp_path: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """(an untied folder in 4 or more shards, its parameters)."""
    parameters = published(tmp_path / "model", tied=False, shard_size="8KB")
    assert len(weight_files(tmp_path / "model")) >= 4
    yield tmp_path / "model", parameters


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_weights_that_transformers_wrote_load_bit_for_bit(tmp_path: Path, tied: bool, shard_size: str) -> None:
    truth = published(tmp_path / "m", tied=tied, shard_size=shard_size, attention_bias=True)
    assert (tmp_path / "m" / INDEX).is_file() == (shard_size == "8KB")
    ours = empty_like(truth)
    load_weights(tmp_path / "m", ours)
    assert_equal(ours, truth)
    assert ("lm_head.weight" in truth) is not tied
    assert all(p.requires_grad and p.grad_fn is None for p in ours.values())


def test_weights_are_cast_to_the_parameters_dtype(model: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, truth = model
    for dtype in (torch.bfloat16, torch.float64):
        ours = empty_like(truth, dtype)
        load_weights(folder, ours)
        assert_equal(ours, {name: tensor.to(dtype) for name, tensor in truth.items()})


def test_a_tied_models_copy_of_the_head_and_rotary_tables_are_ignored(tmp_path: Path) -> None:
    truth = published(tmp_path, tied=True)
    stored = load_file(tmp_path / SINGLE)
    stored["lm_head.weight"] = torch.zeros(40, 24)
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(stored, tmp_path / SINGLE)
    ours = empty_like(truth)
    load_weights(tmp_path, ours)
    assert_equal(ours, truth)


def test_every_tensor_is_found_in_its_shard(model: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, truth = model
    stored = stored_tensors(folder)
    assert {name: entry.shape for name, entry in stored.items()} == {k: tuple(v.shape) for k, v in truth.items()}
    for name, entry in stored.items():
        assert entry.kind == "F32" and torch.equal(load_file(entry.path)[name], truth[name])


def test_faults_of_names_and_shapes_are_listed_together_and_nothing_is_loaded(tmp_path: Path) -> None:
    truth = published(tmp_path, tied=False)
    wanted = {f"extra.{i}": torch.zeros(1) for i in range(7)} | {k: v for k, v in truth.items() if "norm" not in k}
    wanted["lm_head.weight"] = torch.zeros(40, 25)
    wanted["model.embed_tokens.weight"] = torch.zeros(40, 24)
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path, wanted)
    message = str(caught.value)
    assert "missing: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message
    assert "unexpected: " in message and "model.norm.weight" in message
    assert "wrong shape: lm_head.weight is [40, 24], the config asks for [40, 25]" in message
    assert not wanted["model.embed_tokens.weight"].any()


def test_a_missing_shard_is_named(model: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, truth = model
    shard = stored_tensors(folder)["model.norm.weight"].path
    shard.unlink()
    with pytest.raises(UserError, match=re.escape(shard.name)):
        load_weights(folder, empty_like(truth))


@pytest.mark.parametrize("kept", [0, 5, 60, -1, -3000])
def test_a_truncated_file_is_named_and_never_read_as_weights(
    model: tuple[Path, dict[str, torch.Tensor]], kept: int
) -> None:
    folder, truth = model
    shard = stored_tensors(folder)["model.layers.0.mlp.up_proj.weight"].path
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size + kept)
    ours = empty_like(truth)
    with pytest.raises(UserError, match=f"{shard.name}: truncated"):
        load_weights(folder, ours)
    assert all(parameter.isnan().all() for parameter in ours.values())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"x",
        lambda data: data[:8] + b"?" + data[9:],
        lambda data: data.replace(b'"shape"', b'"shame"'),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    truth = published(tmp_path, tied=False)
    path = tmp_path / SINGLE
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(UserError, match=f"{SINGLE}: truncated, or no safetensors file"):
        load_weights(tmp_path, empty_like(truth))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", f"{INDEX}:1: broken JSON"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": 1, "b": "x"}}', "weight_map is missing or no map"),
        ('{"weight_map": {"a": "b.safetensors"}}', "shard missing.*: b.safetensors"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError, match=message):
        weight_files(tmp_path)


def test_a_folder_without_safetensors_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights there.*pytorch_model.bin are never opened: convert them"):
        weight_files(tmp_path)


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_weights_and_config_and_nothing_else(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, _ = model
    first = weights_fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{32}", first)
    copy = shutil.copytree(folder, folder.parent / "copy")
    (copy / "generation_config.json").write_text("{}")
    (copy / "unused.safetensors").write_bytes(b"")
    assert weights_fingerprint(copy) == first
    shard = stored_tensors(copy)["model.norm.weight"].path
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert weights_fingerprint(copy) != first
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-6}))
    assert weights_fingerprint(folder) != first


def test_the_memo_saves_the_hashing_until_the_file_changes(
    model: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = model
    memo = folder.parent / "cache" / "digests.json"
    files = weight_files(folder)
    hashed: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    first = weights_fingerprint(folder, memo)
    assert not memo.exists(), "files of this very second could change unseen"
    for path in files:
        os.utime(path, (1e9, 1e9))
    hashed.clear()
    assert (
        weights_fingerprint(folder, memo) == weights_fingerprint(folder, memo) == weights_fingerprint(folder) == first
    )
    assert hashed == 2 * [str(path.resolve()) for path in files], "once with the memo, once without"
    changed = files[0]
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    os.utime(changed, (1e9, 1e9 + 1))
    assert weights_fingerprint(folder, memo) != first and hashed[2 * len(files) :] == [str(changed.resolve())]


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [None, 8_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_save_opens_in_transformers(
    tmp_path: Path, tied: bool, max_shard_bytes: int | None, dtype: torch.dtype
) -> None:
    truth = published(tmp_path / "source", tied=tied)
    (tmp_path / "source" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"\x80")
    target = tmp_path / "deep" / "target"
    save_folder(target, truth, tmp_path / "source", dtype=dtype)
    if max_shard_bytes:
        (target / SINGLE).unlink()
        write_weights(target, truth, dtype, max_shard_bytes)

    theirs = transformers.LlamaForCausalLM.from_pretrained(target, dtype="auto")
    assert theirs.dtype == dtype
    cast = {name: tensor.to(dtype) for name, tensor in truth.items()}
    assert_equal({name: parameter.detach() for name, parameter in theirs.named_parameters()}, cast)
    ours = empty_like(truth, dtype)
    load_weights(target, ours)
    assert_equal(ours, cast)
    assert read_model_config(target).dtype == str(dtype).removeprefix("torch.")

    files = sorted(path.name for path in target.iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(files)
    assert "pytorch_model.bin" not in files
    shards = [name for name in files if name.endswith(".safetensors")]
    if max_shard_bytes:
        count = len(shards)
        assert 3 <= count <= len(truth) and shards == [
            f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
        ]
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in cast.values())
        biggest = max(t.nbytes for t in cast.values())
        assert all((target / name).stat().st_size < max(max_shard_bytes, biggest) + 4_000 for name in shards)
    else:
        assert shards == [SINGLE] and INDEX not in files
    with safe_open(target / shards[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert (target / shards[0]).stat().st_mode == (target / "config.json").stat().st_mode
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_views_of_a_bigger_storage_are_saved(tmp_path: Path) -> None:
    truth = published(tmp_path / "source", tied=False)
    flat = torch.cat([tensor.flatten() for tensor in truth.values()])
    pieces = flat.split([tensor.numel() for tensor in truth.values()])
    views = {name: piece.view(truth[name].shape) for name, piece in zip(truth, pieces, strict=True)}
    save_folder(tmp_path / "target", views, tmp_path / "source", dtype=torch.float32)
    ours = empty_like(truth)
    load_weights(tmp_path / "target", ours)
    assert_equal(ours, truth)


def test_an_old_spelling_keeps_its_dtype_key(tmp_path: Path) -> None:
    fields = CONFIG | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    save_folder(tmp_path / "target", {"x": torch.ones(2)}, tmp_path / "source", dtype=torch.bfloat16)
    fields = json.loads((tmp_path / "target" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16" and "dtype" not in fields


def test_an_older_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    truth = published(tmp_path / "source", tied=False)
    shutil.copytree(tmp_path / "source", tmp_path / "target")
    (tmp_path / "target" / SINGLE).rename(tmp_path / "target" / "model-00001-of-00002.safetensors")
    save_folder(tmp_path / "target", truth, tmp_path / "source", dtype=torch.float32)
    assert [path.name for path in (tmp_path / "target").glob("model*")] == [SINGLE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_model_whole_and_no_litter(tmp_path: Path) -> None:
    truth = published(tmp_path / "source", tied=False)
    save_folder(tmp_path / "target", truth, tmp_path / "source", dtype=torch.float32)
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = sum(tensor.nbytes for tensor in truth.values())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (needed // 2, hard))  # a write beyond fails as on a full disk
        with pytest.raises(UserError, match=f"target: cannot write the model .*needs at least {needed} bytes"):
            save_folder(tmp_path / "target", truth, tmp_path / "source", dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before


def test_an_interrupted_save_leaves_the_old_model_whole_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = published(tmp_path / "source", tied=False)
    save_folder(tmp_path / "target", truth, tmp_path / "source", dtype=torch.float32)
    before = snapshot(tmp_path)

    def interrupted(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models.checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "target", truth, tmp_path / "source", dtype=torch.float32)
    assert snapshot(tmp_path) == before
