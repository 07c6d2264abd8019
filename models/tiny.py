"""Small random models of every family as ordinary Hugging Face folders: what `exp=smoke` trains and the tests load.

All of it is real (config, safetensors, byte-level tokenizer, ChatML template) but the weights, which are noise.
Their shapes: models/tiny.toml. Read next: models/tokenizer.py, and models/checkpoint.py, which reads such folders.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from models.checkpoint import write_weights
from models.config import Fields
from models.decoder import Decoder
from models.families import read_model_config
from models.files import write_json
from models.tokenizer import byte_level_bpe, write_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM2; then 256 bytes
WEIGHT_STD = 0.05

_FILE = tomllib.loads(Path(__file__).with_name("tiny.toml").read_text(encoding="utf-8"))
CHATML: str = _FILE["chatml"]
SHARED: Fields = {**_FILE["shared"], "rope_scaling": None}  # null, for which TOML has no word
FAMILIES: Mapping[str, Fields] = _FILE["families"]


def write_tiny_model(
    folder: Path,
    *,
    family: str = "llama",
    changes: Fields = {},  # noqa: B006 (never written)
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
) -> None:
    """Write a random model of FAMILIES[family]: weights normal by `seed`, norms 1.

    `changes`: fields of its config.json that are to differ. `sharded`: over two files and an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe([*SPECIAL_TOKENS, *alphabet], merges=[], special=SPECIAL_TOKENS)
    write_tokenizer(folder, backend, CHATML, bos_id=1, eos_id=2, pad_id=2)
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", {**SHARED, **FAMILIES[family], **stored, **changes})
    model = Decoder(read_model_config(folder), weight_dtype=torch.float32, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(weight.shape)
        if "norm" in name
        else torch.randn(weight.shape, generator=generator) * WEIGHT_STD
        for name, weight in model.named_parameters()
    }
    total_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    write_weights(folder, tensors, dtype, max_shard_bytes=total_bytes * 2 // 3 if sharded else total_bytes)
