"""models/lora.py on experts: peft's own files both ways, merged weights, packed bases, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import dequantise
from models.decoder import Decoder, next_token_logits
from models.errors import UserError
from models.lora import Adapter, add_lora, load_adapter, merged_weights, read_adapter, save_adapter
from models.parts import Linear
from tests.moe_models import KINDS, SHARED, decoder, model_config

BOTH = ("experts.gate_up_proj", "experts.down_proj")
TARGETS = {
    "both": BOTH,
    "beside attention": ("q_proj", "o_proj", *BOTH),
    "up alone": BOTH[:1],
    "down alone": BOTH[1:],
    "one layer": ("model.layers.1.{}.experts.gate_up_proj",),
}
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(2)).tolist()
MLP = {"gpt_oss": "mlp", "qwen3_moe": "mlp", "llama4": "feed_forward"}
CASES = [(kind, which) for kind in KINDS for which in TARGETS]


def adapter_for(kind: str, which: str) -> Adapter:
    return Adapter(4, 12.0, tuple(target.format(MLP[kind]) for target in TARGETS[which]))


def their_model(kind: str, ours: Decoder) -> torch.nn.Module:
    """transformers' model with our weights, in fp64."""
    transformers = pytest.importorskip("transformers")
    fields = KINDS[kind][1]
    config_class, model_class = {
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "llama4": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
    }[kind]
    config = config_class(**SHARED, **fields, attn_implementation="eager")
    model = model_class(config).double().eval()
    if kind != "llama4":
        model.set_experts_implementation("eager")
    published = dict(ours.named_parameters())
    with torch.no_grad():
        for key, weight in model.named_parameters():
            value = published[key]
            weight.copy_(value.mT if value.dim() == 3 and kind != "qwen3_moe" else value)
    return model


@torch.no_grad()
def stir(model: torch.nn.Module) -> torch.nn.Module:
    """Updates about as large as the weights that they change."""
    for i, (name, weight) in enumerate(model.named_parameters()):
        if "lora" in name:
            generator = torch.Generator().manual_seed(i)
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return next_token_logits(model, TOKENS)


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0]


def agree(one: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> None:
    """Up to transformers' norms and angles, which are fp32 in an fp64 model too; and far from the base model."""
    bound = 64 * torch.finfo(torch.float32).eps * other.norm()
    assert (one - other).norm() <= bound < 1e-3 * (base - other).norm()


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_our_adapter_opens_in_peft_with_our_logits(kind, which, tmp_path):
    peft = pytest.importorskip("peft")
    base, ours = decoder(kind, torch.float64), decoder(kind, torch.float64)
    add_lora(ours, adapter_for(kind, which), seed=0)
    stir(ours)
    parameters, architecture = dict(ours.named_parameters()), ours.config.architecture
    save_adapter(tmp_path / "a", parameters, adapter_for(kind, which), base="base", architecture=architecture)
    theirs = peft.PeftModel.from_pretrained(their_model(kind, base), tmp_path / "a")
    agree(their_logits(theirs), logits(ours), logits(base))


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_pefts_own_adapter_opens_here_with_its_logits_and_is_written_again_as_it_was(kind, which, tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter = decoder(kind, torch.float64), adapter_for(kind, which)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12.0,
        target_modules=[target for target in adapter.targets if "experts" not in target],
        target_parameters=[target for target in adapter.targets if "experts" in target],
        task_type="CAUSAL_LM",
    )
    theirs = stir(peft.get_peft_model(their_model(kind, base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs")
    assert set(read.targets) == set(adapter.targets)
    ours = decoder(kind, torch.float64)
    add_lora(ours, read, seed=1)
    load_adapter(tmp_path / "theirs", ours)
    agree(logits(ours), their_logits(theirs), logits(base))

    parameters, architecture = dict(ours.named_parameters()), ours.config.architecture
    save_adapter(tmp_path / "ours", parameters, read, base="base", architecture=architecture)
    one, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    told, published = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert set(told) <= set(published)
    for key in ("r", "lora_alpha", "peft_type", "bias", "use_dora"):
        assert told[key] == published[key], key
    for key in ("target_modules", "target_parameters"):
        assert sorted(told[key] or []) == sorted(published[key] or []), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_merged_weights_give_the_logits_of_the_unmerged_model_and_nothing_packed_is_left(kind, packed):
    if packed and kind != "gpt_oss":
        pytest.skip("only gpt-oss is published in MXFP4")
    model = decoder(kind, torch.float64, packed=packed)
    start = logits(model)
    add_lora(model, adapter_for(kind, "beside attention"), seed=0)
    stir(model)
    merged = merged_weights(model, dict(model.named_parameters()))
    plain = Decoder(model_config(kind), weight_dtype=torch.float64, compute_dtype=torch.float64)
    plain.load_state_dict(merged)
    bound = 1000 * torch.finfo(torch.float64).eps * logits(model).norm()
    assert (logits(plain) - logits(model)).norm() <= bound < (start - logits(model)).norm()


def test_packed_experts_are_merged_into_the_bf16_that_they_mean_and_stay_packed_without_an_update():
    model, plain = (decoder("gpt_oss", torch.bfloat16, **how) for how in ({"packed": True}, {"unpack": True}))
    add_lora(model, Adapter(4, 8.0, ("q_proj", "experts.down_proj")), seed=0)
    merged, exact = dict(merged_weights(model, dict(model.named_parameters()))), dict(plain.named_parameters())
    for name, weight in exact.items():
        if name in merged:
            assert torch.equal(merged.pop(name).bfloat16(), weight)
        else:
            assert torch.equal(dequantise(merged.pop(f"{name}_blocks"), merged.pop(f"{name}_scales")), weight)
            assert name.endswith("experts.gate_up_proj")
    assert not merged


def test_all_linear_leaves_experts_and_routers_alone_and_they_are_named_beside_it():
    model = decoder("qwen3_moe", torch.float32)
    add_lora(model, Adapter(4, 8.0), seed=0)
    trained = {
        name.rpartition(".lora.")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = decoder("qwen3_moe", torch.float32)
    add_lora(model, Adapter(4, 8.0, ("all-linear", *BOTH)), seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * (4 + 2) and sum(isinstance(m, Linear) for m in model.modules()) == 9


def test_a_dense_layers_target_is_no_experts_and_an_experts_no_dense_layers():
    model = decoder("llama4", torch.float32)
    add_lora(model, Adapter(4, 8.0, ("down_proj",)), seed=0)
    assert not any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    assert any("shared_expert.down_proj" in name for name, p in model.named_parameters() if p.requires_grad)


def test_with_b_at_zero_the_model_is_the_base_bit_for_bit():
    for dtype in (torch.bfloat16, torch.float32):
        model = decoder("gpt_oss", dtype, packed=True)
        start = logits(model)
        add_lora(model, adapter_for("gpt_oss", "beside attention"), seed=0)
        assert torch.equal(logits(model), start)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (Adapter(4, 8.0, BOTH, dropout=0.1), "lora.dropout = 0.1"),
        (Adapter(4, 8.0, BOTH, dora=True), "lora.dora = True"),
        (Adapter(4, 8.0, ("experts.gate_up_prj",)), "did you mean 'experts.gate_up_proj'?"),
        (Adapter(4, 8.0, ("gate_up_proj",)), "no linear layer is called 'gate_up_proj'"),
    ],
)
def test_what_peft_has_not_either_is_refused_by_its_key(adapter, told):
    with pytest.raises(UserError) as error:
        add_lora(decoder("gpt_oss", torch.float32), adapter, seed=0)
    assert told in str(error.value)


def test_an_adapter_that_lacks_one_of_its_tensors_is_refused(tmp_path):
    ours = decoder("gpt_oss", torch.float32)
    add_lora(ours, adapter_for("gpt_oss", "both"), seed=0)
    save_adapter(tmp_path / "a", dict(ours.named_parameters()), adapter_for("gpt_oss", "both"), base="base")
    place: Path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(place).items() if "base_layer.lora_B" not in name}, place)
    with pytest.raises(
        UserError, match="missing: base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    ):
        load_adapter(tmp_path / "a", ours)
