"""Published models' shapes, as fields of their config.json: what memory and time depend on, without a download.

No dimension letters. Rotary constants are left out: these are for planning and counting, not for running.
Read next: models/families/__init__.py (parse_model_config), models/decoder.py.
"""

from collections.abc import Mapping

from models.config import Fields

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TIED: Fields = {"tie_word_embeddings": True}
LLAMA3: Fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
SMOLLM2: Fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 49152, **TIED}
QWEN3: Fields = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
QWEN3_MOE: Fields = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
GPT_OSS: Fields = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201088,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
LLAMA4: Fields = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 202048,
    "head_dim": 128,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
}


def _shaped(base: Fields, *shape: int) -> dict[str, object]:
    return {**base, **dict(zip(SHAPE, shape, strict=True))}


PUBLISHED: Mapping[str, Fields] = {
    "SmolLM2-135M": _shaped(SMOLLM2, 576, 1536, 30, 9, 3),
    "SmolLM2-360M": _shaped(SMOLLM2, 960, 2560, 32, 15, 5),
    "SmolLM2-1.7B": _shaped(SMOLLM2, 2048, 8192, 24, 32, 32),
    "Llama-3.2-1B": _shaped({**LLAMA3, **TIED}, 2048, 8192, 16, 32, 8),
    "Llama-3.2-3B": _shaped({**LLAMA3, **TIED}, 3072, 8192, 28, 24, 8),
    "Llama-3.1-8B": _shaped(LLAMA3, 4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": _shaped(LLAMA3, 8192, 28672, 80, 64, 8),
    "Qwen3-0.6B": _shaped({**QWEN3, **TIED}, 1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": _shaped({**QWEN3, **TIED}, 2048, 6144, 28, 16, 8),
    "Qwen3-4B": _shaped({**QWEN3, **TIED}, 2560, 9728, 36, 32, 8),
    "Qwen3-8B": _shaped(QWEN3, 4096, 12288, 36, 32, 8),
    "Qwen3-14B": _shaped(QWEN3, 5120, 17408, 40, 40, 8),
    "Qwen3-32B": _shaped(QWEN3, 5120, 25600, 64, 64, 8),
    "Qwen3-30B-A3B": _shaped(QWEN3_MOE, 2048, 6144, 48, 32, 4) | {"moe_intermediate_size": 768},
    "Qwen3-235B-A22B": _shaped(QWEN3_MOE, 4096, 12288, 94, 64, 4) | {"moe_intermediate_size": 1536},
    "gpt-oss-20b": _shaped(GPT_OSS, 2880, 2880, 24, 64, 8) | {"num_local_experts": 32},
    "gpt-oss-120b": _shaped(GPT_OSS, 2880, 2880, 36, 64, 8) | {"num_local_experts": 128},
    "Llama-4-Scout": _shaped(LLAMA4, 5120, 8192, 48, 40, 8) | {"num_local_experts": 16},
    "Llama-4-Maverick": _shaped(LLAMA4, 5120, 8192, 48, 40, 8)
    | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
