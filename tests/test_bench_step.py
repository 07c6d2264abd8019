"""The FLOP that the bench of a step counts by hand are those that torch counts where nothing is wasted."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo.packing import Pack
from experiments.bench_step import useful_flop
from models.attention import Layout
from models.decoder import load_decoder
from models.lora import Adapter, add_lora


@pytest.mark.parametrize("rank", [0, 4])
def test_linear_layers_and_head_count_every_product_of_a_full_pack_once(tiny_folder: Path, rank: int) -> None:
    policy = load_decoder(tiny_folder, weight_dtype=torch.float32, compute_dtype=torch.float32)
    if rank:
        add_lora(policy, Adapter(rank, 8.0), seed=0)
    else:
        policy.requires_grad_(True)
    tokens_T, rows_R, targets_R = torch.arange(32), torch.arange(19, 27), torch.arange(8)
    pack = Pack(tokens_T, tokens_T, Layout(0, ((20, (12,)),)), rows_R, targets_R, torch.zeros(8, dtype=torch.int64))
    counter = FlopCounterMode(display=False)
    with counter:
        policy(pack.tokens_T, pack.positions_T, pack.layout, pack.rows_R, pack.targets_R, 8).sum().backward()
    aten = torch.ops.aten
    counted = counter.get_flop_counts()["Global"]
    flop = useful_flop([pack], policy, rank)
    # Under LoRA nothing asks for the gradient of what enters the first layer's projections (.5 % of 30 layers).
    hidden, kv = policy.config.hidden, policy.config.kv_heads * policy.config.head_dim
    first = (2 * hidden * (hidden + 2 * kv) + 2 * rank * 3 * hidden) * 32 if rank else 0
    assert counted[aten.mm] + counted.get(aten.addmm, 0) == flop["linear layers"] + flop["head"] - first
    visible = 20 * 21 // 2 + 12 * 20 + 12 * 13 // 2
    assert flop["attention"] == 12 * visible * len(policy.config.layers) * policy.config.heads * policy.config.head_dim


def test_attention_counts_what_is_seen_of_stems_too(tiny_folder: Path) -> None:
    policy = load_decoder(tiny_folder, weight_dtype=torch.float32, compute_dtype=torch.float32)
    layout, none = Layout(2, ((3, ((4, (5, 1)), 6)),)), torch.zeros(0, dtype=torch.int64)
    pack = Pack(torch.arange(32), torch.arange(32), layout, none, none, none)
    runs = (0, 2), (2, 3), (5, 4), (9, 5), (9, 1), (5, 6)  # tokens before and own
    visible = sum(sum(range(before + 1, before + own + 1)) for before, own in runs)
    per_pair = 12 * len(policy.config.layers) * policy.config.heads * policy.config.head_dim
    assert useful_flop([pack], policy, 0)["attention"] == visible * per_pair
