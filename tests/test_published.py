"""models/published.py: every published shape builds, without a byte of weights, with the published number of them."""

from pathlib import Path

import pytest
import torch

from models.decoder import Decoder
from models.families import parse_model_config
from models.published import PUBLISHED

PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Llama-4-Scout": 107_769_861_120,
    "Llama-4-Maverick": 400_711_848_960,
}
EXPERTS = {  # billions of them in experts
    "Qwen3-30B-A3B": 28.991,
    "Qwen3-235B-A22B": 227.096,
    "gpt-oss-20b": 19.117,
    "gpt-oss-120b": 114.702,
    "Llama-4-Scout": 96.637,
    "Llama-4-Maverick": 386.547,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        config = parse_model_config(PUBLISHED[name], Path(name))
        model = Decoder(config, weight_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == PARAMETERS[name]
    experts = sum(size for parameter, size in sizes.items() if ".experts." in parameter)
    assert round(experts / 1e9, 3) == EXPERTS.get(name, 0)
