"""Parameters cut over ranks: each reads its own bytes, and trains to where one process does."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_exactness import ALONE, random_tree
from torch import Tensor

from dpo.adamw import AdamW
from dpo.checkpoint import trained_parameters
from dpo.config import Config, FsdpConfig
from dpo.distributed import NORM_BLOCK, Ranks, clip_gradients, full_parameters, gather, shard
from dpo.logprobs import score_trees
from dpo.pairs import tree_sums
from dpo.policy import load_policy
from dpo.step import accumulate_gradients, means, plan_steps
from models.checkpoint import SINGLE, stored_tensors
from models.decoder import empty_decoder, fill, load_decoder
from models.errors import UserError
from models.sharded import full_tensor, own_part
from models.tiny import write_tiny_model

TOLERANCE = 1e-9  # of the issue, in fp64
FOLDERS = {  # family, fields that differ, whether its experts are MXFP4
    "tied": ("llama", {}, False),
    "dense": ("qwen3", {}, False),
    "each expert a tensor": ("qwen3_moe", {"num_experts": 5}, False),  # 2 ranks do not divide them
    "turned": ("gpt_oss", {}, False),
    "packed": ("gpt_oss", {}, True),
    "two widths": ("maverick", {}, False),
}


def pack_experts(folder: Path) -> None:
    """Put MXFP4 of drawn bits in place of a gpt-oss folder's experts."""
    tensors = load_file(folder / SINGLE)
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        groups = (count, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(119, 123, groups, dtype=torch.uint8, generator=draw)
    save_file(tensors, folder / SINGLE)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "mxfp4"}}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for name, (family, changes, packed) in FOLDERS.items():
        write_tiny_model(root / name, family=family, changes=changes)
        if packed:
            pack_experts(root / name)
    return {name: root / name for name in FOLDERS}


# --- loading --------------------------------------------------------------------------------------------------------

CUTS = (FsdpConfig(), FsdpConfig(expert_units=3))


def read_cut(ranks: Ranks, folders: dict[str, Path]) -> dict[str, tuple[int, int, dict[str, Tensor]]]:
    """Of each folder and cut: bytes read, bytes held, the whole parameters."""
    read = {}
    for name, folder in folders.items():
        for cut in CUTS:
            model = empty_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32, packed=True)
            shard(model, ranks, cut)
            size = fill(model, folder, "cpu")
            held = sum(own_part(parameter).values.nbytes for parameter in model.parameters())
            read[f"{name}, {cut.expert_units}"] = size, held, dict(full_parameters(model))
    return read


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_read_each_stored_byte_once_in_all_and_hold_the_same_weights(tmp_path, folders, world):
    read = on_ranks(world, tmp_path / "ranks", read_cut, folders)
    for name, folder in folders.items():
        stored = sum(load_file(folder / SINGLE)[one].nbytes for one in stored_tensors(folder))
        whole = load_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32, packed=True)
        size = sum(parameter.nbytes for parameter in whole.parameters())
        for cut in CUTS:
            parts = [one[f"{name}, {cut.expert_units}"] for one in read]
            assert sum(read for read, _, _ in parts) == stored, name
            assert sum(held for _, held, _ in parts) == size and max(held for _, held, _ in parts) < size / world * 1.25
            for _, _, parameters in parts:
                assert parameters.keys() == dict(whole.named_parameters()).keys()
                for key, parameter in whole.named_parameters():
                    assert torch.equal(parameters[key], parameter), (name, cut, key)


@pytest.mark.parametrize("folder", ["dense", "each expert a tensor", "turned", "two widths"])
def test_masters_are_multiplied_as_they_are_sent(folders, folder):
    """In the dtype of the arithmetic, every one: so one process computes with what ranks would be sent."""
    values = []
    for weights in (torch.float32, torch.bfloat16):
        model = load_decoder(folders[folder], weight_dtype=weights, compute_dtype=torch.bfloat16)
        for parameter in model.parameters():  # now between two values of bf16
            parameter.mul_(1.001) if weights is torch.float32 else parameter.copy_(parameter.float() * 1.001)
        values.append(score_trees(model, TREES[:3], case_config("experts", 256).pack, ALONE, "test"))
    assert [[list(one) for one in tree] for tree in values[0]] == [[list(one) for one in tree] for tree in values[1]]


def refuse_copies(ranks: Ranks, folder: Path) -> str:
    try:
        shard(
            empty_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32),
            ranks,
            FsdpConfig(replicas=3),
        )
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.long
def test_ranks_that_cannot_hold_so_many_models_are_told(tmp_path, folders):
    assert "fsdp.replicas = 3: 2 ranks" in on_ranks(2, tmp_path / "ranks", refuse_copies, folders["tied"])[1]


# --- training -------------------------------------------------------------------------------------------------------

EXPERTS = ["all-linear", "experts.gate_up_proj", "experts.down_proj"]
LORA = {"rank": 4}
CASES: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "all weights": ("dense", {"fsdp": {"replicas": 2}}),
    "adapters": ("tied", {"lora": LORA | {"dora": True}, "train": {"activation_checkpointing": True}}),
    "offloaded": ("tied", {"fsdp": {"offload": True}}),
    "experts": ("each expert a tensor", {}),
    "experts in units": ("turned", {"fsdp": {"expert_units": 3}, "train": {"activation_checkpointing": True}}),
    "packed": ("packed", {"lora": LORA | {"targets": EXPERTS}}),
    "packed in units": ("packed", {"lora": LORA | {"targets": EXPERTS}, "fsdp": {"expert_units": 2}}),
}
QUICK = ("all weights", "experts in units", "packed")
TREES = [random_tree(seed) for seed in range(9)]
Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def case_config(case: str, pack_tokens: int) -> Config:
    sections: dict[str, dict[str, object]] = {
        "train": {"epochs": 9, "max_steps": 20, "batch_pairs": 5, "lr": 1e-3, "weight_decay": 0.1},
        "pack": {"tokens": pack_tokens, "head_chunk": 16},
    }
    for section, changes in CASES[case][1].items():
        sections[section] = sections.get(section, {}) | changes
    return Config(exp="test", **sections)


def train_steps(ranks: Ranks, folder: Path, config: Config, dtype: torch.dtype, steps: int) -> Run:
    """Losses, the first step's gradients and the last weights; policy and reference differ by nothing at first."""
    policy = load_policy(config, folder, dtype, ranks)
    scored = score_trees(policy, TREES, config.pack, ranks, "reference")
    references = [tree_sums(logps, tree, config.loss) for logps, tree in zip(scored, TREES, strict=True)]
    named = trained_parameters(policy)
    optimizer = AdamW(list(named.values()), config.train)
    losses, gradients = [], {}
    for members in plan_steps([len(tree.pairs) for tree in TREES], config)[:steps]:
        sums = accumulate_gradients(
            policy, [TREES[i] for i in members], [references[i] for i in members], config, ranks
        )
        if not losses:
            assert max(gather([sums["difference"]], ranks)) == 0
            gradients = {name: full_tensor(parameter.grad).clone() for name, parameter in named.items()}
        losses += [means(sums)["loss"], clip_gradients(list(named.values()), 1.0, ranks)]
        optimizer.step(config.train.lr)
    return losses, gradients, {name: full_tensor(parameter) for name, parameter in named.items()}


def train_cases(ranks: Ranks, folders: dict[str, Path], cases: tuple[str, ...]) -> dict[str, Run]:
    """Packs so small that a tree may take two: other batches than one process has."""
    return {
        case: train_steps(ranks, folders[CASES[case][0]], case_config(case, 128), torch.float64, 20)
        for case in cases
        if ranks.world % case_config(case, 128).fsdp.replicas == 0
    }


@cache
def alone(folder: Path, case: str, dtype: torch.dtype = torch.float64, steps: int = 20) -> Run:
    return train_steps(ALONE, folder, case_config(case, 256), dtype, steps)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, QUICK),
        pytest.param(2, tuple(set(CASES) - set(QUICK)), marks=pytest.mark.long),
        pytest.param(3, tuple(CASES), marks=pytest.mark.long),
        pytest.param(4, tuple(CASES), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_twenty_steps_on_any_ranks_and_packs_are_those_of_one_process(tmp_path, folders, world, cases):
    for found in on_ranks(world, tmp_path / "ranks", train_cases, folders, cases):
        for case, run in found.items():
            losses, gradients, weights = alone(folders[CASES[case][0]], case)
            assert max(abs(a - b) for a, b in zip(run[0], losses, strict=True)) <= TOLERANCE, case
            for ours, truth in zip(run[1:], (gradients, weights), strict=True):
                assert ours.keys() == truth.keys()
                for name in truth:
                    assert (ours[name] - truth[name]).abs().max() <= TOLERANCE, (case, name)


def first_gradients(ranks: Ranks, folders: dict[str, Path], cases: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    return {
        case: train_steps(ranks, folders[CASES[case][0]], case_config(case, 256), torch.bfloat16, 1)[1]
        for case in cases
    }


@pytest.mark.long
def test_bf16_gradients_on_two_ranks_are_at_most_twice_as_far_from_fp64_as_those_of_one_process(tmp_path, folders):
    for found in on_ranks(2, tmp_path / "ranks", first_gradients, folders, tuple(CASES)):
        for case, gradients in found.items():
            folder = folders[CASES[case][0]]
            truth, yardstick = (alone(folder, case, dtype, 1)[1] for dtype in (torch.float64, torch.bfloat16))
            error, allowed = (
                sum(float((one[name].double() - truth[name]).square().sum()) for name in truth) ** 0.5
                for one in (gradients, yardstick)
            )
            assert 0 < error <= 2 * allowed, case


def test_the_gradients_norm_is_fp64s_over_blocks_of_any_size_and_clips_to_the_limit() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, NORM_BLOCK + 1, 5 * NORM_BLOCK, 0)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    flat = torch.cat([parameter.grad.double() for parameter in parameters if parameter.grad is not None])
    norm = clip_gradients(parameters, 0.5, Ranks(0, 1, torch.device("cpu")))
    eps = torch.finfo(torch.float32).eps
    # A vector's 16 lanes sum a block's squares one after another; their roundings, half an ulp, walk at random.
    assert norm == pytest.approx(float(flat.norm()), rel=(NORM_BLOCK / 16) ** 0.5 * eps / 4)
    after = torch.cat([parameter.grad.double() for parameter in parameters if parameter.grad is not None])
    torch.testing.assert_close(after, flat * (0.5 / norm), rtol=2 * eps, atol=0)
