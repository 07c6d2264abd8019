"""A training step with MXFP4 experts that stay packed, against the same experts in bf16: time and resident bytes.

A trunk of gpt-oss's true widths (hidden and ffn 2,880, 64 heads on 8, head width 64), random weights, LoRA r8 on
attention: forward and backward of one full pack. In turn, medians; nothing else may run.

    python -m experiments.bench_moe [--layers 4] [--experts 8] [--tokens 2048] [--dtype fp32] [--runs 3]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dpo.inputs import DTYPES, set_up_cpu
from kernels import dequantise
from models.attention import Layout
from models.decoder import Decoder, attend_trees
from models.families import FAMILIES
from models.lora import Adapter, add_lora
from models.published import PUBLISHED

GPT_OSS = {
    **PUBLISHED["gpt-oss-20b"],
    "vocab_size": 512,  # the head is not part of what is compared
    "quantization_config": {"quant_method": "mxfp4"},
}


def build(asked: argparse.Namespace) -> dict[str, Decoder]:
    """The packed model, and its twin with the same experts in bf16; both compute in --dtype."""
    name = "GptOssForCausalLM"
    fields = {**GPT_OSS, "num_hidden_layers": asked.layers, "num_local_experts": asked.experts}
    config = FAMILIES[name].read_config(name, fields, Path("config.json"))
    assert config.experts is not None
    plain = replace(config, experts=replace(config.experts, packed=False))
    models = {
        how: Decoder(one, weight_dtype=torch.bfloat16, compute_dtype=DTYPES[asked.dtype]).requires_grad_(False)
        for how, one in (("bf16", plain), ("packed", config))
    }
    generator = torch.Generator().manual_seed(0)
    stored = dict(models["packed"].named_parameters())
    for key, weight in stored.items():
        if key.endswith("_scales"):
            weight.random_(118, 122, generator=generator)  # values of about a fiftieth, as published ones
        elif key.endswith("_blocks"):
            weight.random_(256, generator=generator)
        else:
            weight.normal_(std=0.02, generator=generator).add_(float("norm" in key))
    for key, weight in models["bf16"].named_parameters():
        weight.copy_(stored[key] if key in stored else dequantise(stored[f"{key}_blocks"], stored[f"{key}_scales"]))
    for model in models.values():
        add_lora(model, Adapter(8, 16.0), seed=0)
    return models


def expert_bytes(model: nn.Module) -> int:
    """Resident bytes of the experts' two projections."""
    named = model.named_parameters()
    return sum(p.nbytes for name, p in named if ".experts." in name and not name.endswith("_bias"))


def step(model: Decoder, tokens_T: torch.Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward, and what it computed."""
    begin = time.perf_counter()
    positions_T = torch.arange(len(tokens_T))
    attend = attend_trees(Layout(0, ((len(tokens_T), ()),)))
    loss = model.hidden(tokens_T, positions_T, attend).float().square().mean()
    loss.backward()
    return time.perf_counter() - begin, float(loss.detach())


def main(arguments: Sequence[str]) -> int:
    """Prints the table; 1 where the two computed different things, or a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("layers", 4), ("experts", 8), ("tokens", 2048), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the arithmetic")
    asked = parser.parse_args(arguments)
    set_up_cpu()
    models = build(asked)
    tokens_T = torch.randint(512, (asked.tokens,), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {how: [] for how in models}
    losses: dict[str, float] = {}
    for run in range(asked.runs + 1):
        for how, model in models.items():
            time_s, losses[how] = step(model, tokens_T)
            times[how] += [time_s] * (run > 0)  # the first one warms up
    held = {how: expert_bytes(model) for how, model in models.items()}
    median = {how: statistics.median(values) for how, values in times.items()}
    ratio, share = median["packed"] / median["bf16"], held["packed"] / held["bf16"]
    print(f"{asked.layers} layers, {asked.experts} experts, {asked.tokens} tokens, {asked.dtype}, {asked.runs} runs")
    print("| experts | MiB | s a step (all) |\n|---|---|---|")
    for how, values in times.items():
        print(f"| {how} | {held[how] / 2**20:.0f} | {median[how]:.2f} ({', '.join(f'{v:.2f}' for v in values)}) |")
    print(f"| ratio | {share:.4f} (at most 0.27) | {ratio:.2f} (at most 1.5) |")
    print(f"computed: {losses}")
    return int(losses["packed"] != losses["bf16"] or ratio > 1.5 or share > 0.27)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
