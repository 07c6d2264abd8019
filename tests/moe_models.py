"""Small random mixtures of experts, made in memory: for tests of models/moe.py, of routes, of LoRA on experts."""

from pathlib import Path

import torch

from kernels import dequantise
from models.config import ModelConfig
from models.decoder import Decoder
from models.families import FAMILIES

SHARED = {
    "vocab_size": 304,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
LLAMA4 = {"intermediate_size": 96, "intermediate_size_mlp": 80, "num_local_experts": 4, "num_experts_per_tok": 1}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt_oss": (
        "GptOssForCausalLM",
        {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 8},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "llama4": ("Llama4ForCausalLM", {**LLAMA4, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}),
}


def model_config(kind: str, **changes: object) -> ModelConfig:
    """One of KINDS."""
    name, fields = KINDS[kind]
    return FAMILIES[name].read_config(name, {**SHARED, **fields, **changes}, Path("config.json"))


@torch.no_grad()
def decoder(kind: str, dtype: torch.dtype, *, packed: bool = False, unpack: bool = False) -> Decoder:
    """Weights normal, norms about 1, frozen; `unpack`: the same weights as with `packed`, unpacked."""
    config = model_config(kind, **({"quantization_config": {"quant_method": "mxfp4"}} if packed or unpack else {}))
    model = Decoder(config, weight_dtype=dtype, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("_scales"):
            weight.copy_(torch.randint(122, 126, weight.shape, generator=generator))
        elif name.endswith("_blocks"):
            weight.copy_(torch.randint(256, weight.shape, generator=generator))
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + ("norm" in name))
    if unpack:
        plain = Decoder(model_config(kind), weight_dtype=dtype, compute_dtype=dtype)
        stored = dict(model.named_parameters())
        for name, weight in plain.named_parameters():
            weight.copy_(
                stored[name] if name in stored else dequantise(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            )
        model = plain
    return model.requires_grad_(False).eval()
