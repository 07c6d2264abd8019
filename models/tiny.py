"""A small random Llama as an ordinary Hugging Face folder: what `exp=smoke` trains and the tests load.

All of it is real (config, safetensors, byte-level tokenizer, ChatML template) but the weights, which are noise.
Read next: models/tokenizer.py, and models/checkpoint.py, which treats it as any other folder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from models.checkpoint import write_weights
from models.decoder import Decoder
from models.families import read_model_config
from models.files import write_json
from models.tokenizer import byte_level_bpe, write_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM2; then 256 bytes
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a tiny random model.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WEIGHT_STD = 0.05


def write_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    head_dim: int = 16,
    vocab: int = 304,
    tie: bool = True,
    rope_scaling: Mapping[str, float | int | str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
) -> None:
    """Write a random Llama: weights normal by `seed`, norms 1. `sharded` splits it over two files and an index.

    `vocab` may exceed the tokenizer's 259 tokens, as published models' does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe([*SPECIAL_TOKENS, *alphabet], merges=[], special=SPECIAL_TOKENS)
    write_tokenizer(folder, backend, CHATML, bos_id=1, eos_id=2, pad_id=2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
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
