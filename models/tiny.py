"""Small random models of every family as ordinary Hugging Face folders: what `exp=smoke` trains and the tests load.

All of it is real (config, safetensors, byte-level tokenizer, ChatML template) but the weights, which are noise.
Read next: models/tokenizer.py, and models/checkpoint.py, which treats it as any other folder.
"""

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
SHARED: Fields = {
    "vocab_size": 304,  # more than the tokenizer's 259, as published models' is
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA4: Fields = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,  # the last has no rope
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 16,
    "floor_scale": 8,
}
# config.json's fields beyond SHARED; windows and chunks are shorter than the tests' sequences.
FAMILIES: Mapping[str, Fields] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": 64,  # square experts, as published: a wrong transpose fits
        "num_attention_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
    "scout": {**LLAMA4, "use_qk_norm": True, "interleave_moe_layer_step": 1},
    "maverick": {**LLAMA4, "use_qk_norm": False, "interleave_moe_layer_step": 2},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
}


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
