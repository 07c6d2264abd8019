"""The policy at its start: base weights, with an adapter where one is trained, fresh or continued from another run.

No dimension letters. Read next: models/lora.py, dpo/loop.py.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from dpo.config import Config, LoraConfig, MoeConfig
from dpo.distributed import Ranks, shard
from models.config import ModelConfig
from models.decoder import Decoder, empty_decoder, fill
from models.errors import UserError
from models.families import read_model_config
from models.lora import Adapter, add_lora, load_adapter, read_adapter, start_lora


def adapter_of(config: LoraConfig) -> Adapter:
    """What the section `lora` (rank above 0) asks for."""
    alpha, targets = config.alpha or 2.0 * config.rank, tuple(config.targets)
    return Adapter(config.rank, alpha, targets, config.rslora, config.dora, config.dropout)


def with_adapter(config: Config) -> Config:
    """The configuration in which `lora` is as the adapter of `model.adapter`; UserError where it says otherwise."""
    if not config.model.adapter:
        return config
    adapter = read_adapter(Path(config.model.adapter))
    found = asdict(adapter) | {"targets": list(adapter.targets), "dropout": config.lora.dropout}
    said, default = config.lora.model_dump(), LoraConfig().model_dump()
    for key, value in found.items():
        if said[key] not in (default[key], value):
            raise UserError(
                f"lora.{key} = {said[key]}: the adapter of model.adapter={config.model.adapter} has {value}, and it is "
                "that which is trained on; leave the key out, or merge it (python -m dpo.export) and set model.path"
            )
    return config.model_copy(update={"lora": LoraConfig.model_validate(found)})


def with_experts(shape: ModelConfig, config: Config, packed: bool) -> ModelConfig:
    """The shape with its experts as the policy keeps them: beside an adapter those that are `packed` may stay so."""
    if shape.experts is None:
        return shape
    packed = packed and bool(config.lora.rank) and config.model.experts != "plain"
    return replace(shape, experts=replace(shape.experts, packed=packed))


def policy_shape(config: Config, folder: Path) -> ModelConfig:
    """The policy's shape; UserError where model.experts or moe asks for what there is not."""
    model = read_model_config(folder)
    if config.moe != MoeConfig() and not any(layer.sparse for layer in model.layers):
        raise UserError(
            f"moe.aux_loss, moe.routes: {folder} has no experts, so nothing would read them; leave them out"
        )
    packed = model.experts is not None and model.experts.packed
    if config.model.experts == "packed" and not (packed and config.lora.rank):
        why = (
            "its experts train, and packed ones are frozen: set lora.rank" if packed else "no MXFP4 in its config.json"
        )
        raise UserError(f"model.experts = packed: {folder}: {why}, or leave the key out")
    return with_experts(model, config, packed)


def empty_policy(shape: ModelConfig, config: Config, dtype: torch.dtype) -> Decoder:
    """The policy in no memory (torch's meta device), in eval mode."""
    weight_dtype = dtype if config.lora.rank else torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        policy = Decoder(shape, weight_dtype=weight_dtype, compute_dtype=dtype, backend=config.kernels.backend)
    policy.requires_grad_(not config.lora.rank)
    if config.lora.rank:
        add_lora(policy, adapter_of(config.lora), seed=config.seed)
    policy.checkpoint_activations = config.train.activation_checkpointing
    return policy.eval()


def load_policy(config: Config, folder: Path, dtype: torch.dtype, ranks: Ranks) -> Decoder:
    """The policy: all of it trainable in fp32 masters, or frozen in `dtype` (the arithmetic's) beside an adapter."""
    policy = empty_policy(policy_shape(config, folder), config, dtype)
    _fill_own_part(policy, folder, config, ranks)
    start_lora(policy, config.seed)
    if config.model.adapter:
        load_adapter(Path(config.model.adapter), policy)
    return policy


def load_reference(config: Config, folder: Path, dtype: torch.dtype, ranks: Ranks) -> Decoder:
    """Another model than the policy's, frozen."""
    packed, backend = config.model.experts != "plain", config.kernels.backend
    reference = empty_decoder(folder, weight_dtype=dtype, compute_dtype=dtype, backend=backend, packed=packed)
    _fill_own_part(reference, folder, config, ranks)
    return reference


def _fill_own_part(model: Decoder, folder: Path, config: Config, ranks: Ranks) -> None:
    if ranks.world > 1:
        shard(model, ranks, config.fsdp)
    fill(model, folder, "cpu" if config.fsdp.offload and ranks.world > 1 else ranks.device)
