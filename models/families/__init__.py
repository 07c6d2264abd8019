"""The families of models that are read: one file each, over the shared parts; this is where they are told apart.

No dimension letters. A new family is one file and one line of FAMILIES. Read next: models/families/llama.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models import layouts
from models.config import Fields, ModelConfig
from models.errors import UserError
from models.families import gpt_oss, llama, llama4, olmo2, qwen
from models.files import read_json_object
from models.layouts import Layout, plain
from models.parts import ExactRMSNorm, RMSNorm


class Family(NamedTuple):
    """What one architecture is."""

    read_config: Callable[[str, Fields, Path], ModelConfig]
    layer: Callable[[ModelConfig, int, torch.dtype], nn.Module]
    norm: Callable[[int, float, torch.dtype], nn.Module] = RMSNorm  # the last one
    quantised: tuple[str, ...] = ()  # quant_method of files that are read
    layout: Layout = plain  # of experts on disk


FAMILIES = {
    "LlamaForCausalLM": Family(llama.read_config, llama.layer),
    "Qwen2ForCausalLM": Family(qwen.read_qwen2, llama.layer),
    "Qwen3ForCausalLM": Family(qwen.read_qwen3, qwen.layer),
    "Qwen3MoeForCausalLM": Family(qwen.read_qwen3_moe, qwen.layer, layout=layouts.qwen3_moe),
    "GptOssForCausalLM": Family(gpt_oss.read_config, gpt_oss.layer, ExactRMSNorm, ("mxfp4",), layouts.gpt_oss),
    "Llama4ForCausalLM": Family(llama4.read_config, llama4.layer, layout=layouts.llama4),
    "Llama4ForConditionalGeneration": Family(llama4.read_nested, llama4.layer, layout=layouts.llama4),
    "Olmo2ForCausalLM": Family(olmo2.read_config, olmo2.layer, ExactRMSNorm),
}


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face model folder; every fault is a UserError that names the key."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there; a Hugging Face model folder has one")
    return parse_model_config(read_json_object(path), path)


def parse_model_config(fields: Fields, path: Path) -> ModelConfig:
    """The configuration that a config.json's fields say; `path` is what faults name."""
    named = fields.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise UserError(f"{path}: architectures = {named!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, quantised = FAMILIES[named[0]], fields.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised and method not in family.quantised:
        allowed = "'mxfp4' of GptOssForCausalLM; else use a bf16 or fp32 copy"
        raise UserError(f"{path}: quantization_config.quant_method = {method!r} is not supported; supported: {allowed}")
    return family.read_config(named[0], fields, path)
