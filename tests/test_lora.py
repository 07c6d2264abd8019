"""models/lora.py against peft and against the base model: values, files, the merged export, what trains."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo.checkpoint import export
from dpo.config import Config
from dpo.distributed import Ranks
from models.decoder import Decoder, load_decoder, next_token_logits
from models.errors import UserError
from models.lora import Adapter, add_lora, merged_weights, save_adapter
from models.tiny import write_tiny_model

RANK, ALPHA = 4, 12.0
TOKENS = torch.randint(256, (120,), generator=torch.Generator().manual_seed(2)).tolist()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fp32_folder(tmp_path_factory) -> Path:
    """A tiny Llama published in fp32, its head apart: an export of it rounds nothing away."""
    folder = tmp_path_factory.mktemp("fp32") / "model"
    write_tiny_model(folder, dtype=torch.float32, tie=False)
    return folder


def with_lora(folder: Path, dtype: torch.dtype, targets: tuple[str, ...] = ("all-linear",), seed: int = 0) -> Decoder:
    model = load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype)
    add_lora(model, Adapter(RANK, ALPHA, targets), seed=seed)
    return model


def lora_parameters(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora." in name}


@torch.no_grad()
def stir(model: Decoder) -> Decoder:
    """Random updates as training might leave them: about as large as the weights they change."""
    for i, parameter in enumerate(lora_parameters(model).values()):
        generator = torch.Generator().manual_seed(i)
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.1)
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return next_token_logits(model, TOKENS).double()


@torch.no_grad()
def transformers_logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.tensor([TOKENS])).logits[0].double()


def transformers_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapter_of(model: Decoder, folder: Path) -> Path:
    save_adapter(folder, dict(model.named_parameters()), Adapter(RANK, ALPHA), base="base")
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")], ids=["all", "two kinds"])
def test_an_adapter_in_peft_gives_our_logits_with_an_error_at_most_twice_pefts(fp32_folder, tmp_path, targets, dtype):
    peft = pytest.importorskip("peft")
    ours = stir(with_lora(fp32_folder, DTYPES[dtype], targets))
    folder = adapter_of(ours, tmp_path / "adapter")
    base = transformers_model(fp32_folder, DTYPES[dtype])
    without = transformers_logits(base)
    theirs = transformers_logits(peft.PeftModel.from_pretrained(base, folder))
    truth = logits(stir(with_lora(fp32_folder, torch.float64, targets)))
    assert (logits(ours) - truth).norm() <= 2 * (theirs - truth).norm()
    assert (theirs - truth).norm() < 0.1 * (without - truth).norm()  # peft did apply our updates, and as we do


def test_the_adapter_files_are_those_that_peft_writes_itself(fp32_folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapter_of(with_lora(fp32_folder, torch.float32), tmp_path / "ours")
    model = peft.get_peft_model(
        transformers_model(fp32_folder, torch.float32),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    config, published = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert set(config) <= set(published)
    for key in set(config) - {"base_model_name_or_path", "target_modules"}:
        assert config[key] == published[key], key


def test_a_starts_as_pefts_does_and_b_at_zero(fp32_folder):
    """Kaiming-uniform with a = sqrt 5: bounds 1 / sqrt(inputs), variance a third of their square."""
    for name, parameter in lora_parameters(with_lora(fp32_folder, torch.float32)).items():
        if name.endswith(".B"):
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
            # the standard error of a uniform's variance over n values is bound^2 sqrt(4 / 45 / n)
            error = bound**2 * (4 / 45 / parameter.numel()) ** 0.5
            assert abs(parameter.square().mean() - bound**2 / 3) < 4 * error


def test_the_start_is_the_seeds(fp32_folder):
    first, same, other = (lora_parameters(with_lora(fp32_folder, torch.float32, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith(".A"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_b_at_zero_the_model_is_the_base_bit_for_bit(tiny_folder, dtype):
    base = load_decoder(tiny_folder, weight_dtype=dtype, compute_dtype=dtype)
    assert torch.equal(logits(with_lora(tiny_folder, dtype)), logits(base))


def test_only_the_updates_train_and_they_do(tiny_folder):
    model = stir(with_lora(tiny_folder, torch.bfloat16))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(lora_parameters(model)) and len(trained) == 2 * 7 * 2  # A and B, 7 kinds, 2 layers
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}  # masters
    next_token_logits(model, TOKENS).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert name not in trained or parameter.grad.any(), name


def test_gradients_of_the_updates_are_pefts_with_an_error_at_most_twice_pefts(fp32_folder, tmp_path):
    peft = pytest.importorskip("peft")
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = stir(with_lora(fp32_folder, dtype))
        next_token_logits(model, TOKENS).square().mean().backward()
        gradients.append({name: p.grad.double() for name, p in lora_parameters(model).items()})
    truth, ours = gradients
    base = transformers_model(fp32_folder, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter_of(model, tmp_path / "adapter"), is_trainable=True)
    theirs(torch.tensor([TOKENS])).logits.square().mean().backward()
    named = {
        name.removeprefix("base_model.model.")
        .replace("lora_", "lora.")
        .removesuffix(".default.weight"): p.grad.double()
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(named) == set(truth)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return float(sum((gradients[name] - exact).square().sum() for name, exact in truth.items())) ** 0.5

    assert error(ours) <= 2 * error(named)


@pytest.mark.parametrize(("written", "nearest"), [("q_prj", "q_proj"), ("up", "up_proj"), ("all_linear", "all-linear")])
def test_an_unknown_target_is_refused_with_the_nearest_and_all_allowed(tiny_folder, written, nearest):
    model = load_decoder(tiny_folder, weight_dtype=torch.float32, compute_dtype=torch.float32)
    with pytest.raises(UserError) as error:
        add_lora(model, Adapter(RANK, ALPHA, ("v_proj", written)), seed=0)
    message = str(error.value)
    assert repr(written) in message and "lora.targets" in message and not lora_parameters(model)
    for kind in ("all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert kind in message
    assert f"did you mean {nearest!r}?" in message


# --- merged ---------------------------------------------------------------------------------------------------------


def test_merged_weights_are_exact_to_one_rounding(fp32_folder):
    model = stir(with_lora(fp32_folder, torch.float32))
    parameters = dict(model.named_parameters())
    merged = merged_weights(model, parameters)
    assert set(merged) == {name for name in parameters if ".lora." not in name}
    for name, tensor in merged.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora.A" not in parameters:
            assert torch.equal(tensor, parameters[name]), name
            continue
        a, b = (parameters[f"{stem}.lora.{half}"].double() for half in "AB")
        update = ALPHA / RANK * (b @ a)
        exact = parameters[name].double() + update
        # RANK products and sums of them, the scale, then the sum with the weight: each rounds once
        bound = torch.finfo(torch.float32).eps * ((RANK + 1) * ALPHA / RANK * (b.abs() @ a.abs()) + exact.abs())
        assert bool(((tensor - exact).abs() <= bound).all()), name
        assert update.norm() > 0.1 * parameters[name].norm()  # an update that one could not overlook


def test_the_merged_export_opens_in_transformers_with_an_error_at_most_twice_that_of_pefts_merge(fp32_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = stir(with_lora(fp32_folder, torch.float32))
    before = copy.deepcopy(model.state_dict())
    config = Config(exp="test", lora={"rank": RANK, "alpha": ALPHA})
    export(tmp_path, model, fp32_folder, config, ALONE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the policy stays
    truth = logits(stir(with_lora(fp32_folder, torch.float64)))
    opened = transformers_model(tmp_path / "model", "auto")
    assert opened.dtype == torch.float32
    base = transformers_model(fp32_folder, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert (transformers_logits(opened) - truth).norm() <= 2 * (transformers_logits(theirs) - truth).norm()


def test_the_export_of_a_bf16_model_holds_the_merged_weights_rounded_once(tiny_folder, tmp_path):
    model = stir(with_lora(tiny_folder, torch.bfloat16))
    export(tmp_path, model, tiny_folder, Config(exp="test", lora={"rank": RANK, "alpha": ALPHA}), ALONE)
    merged = merged_weights(model, dict(model.named_parameters()))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert set(stored) == set(merged)
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in merged.items())


def test_an_alpha_of_zero_means_twice_the_rank_in_the_adapter_too(tiny_folder, tmp_path):
    model = load_decoder(tiny_folder, weight_dtype=torch.float32, compute_dtype=torch.float32)
    add_lora(model, Adapter(RANK, 2.0 * RANK, ("q_proj",)), seed=0)
    export(tmp_path, model, tiny_folder, Config(exp="test", lora={"rank": RANK, "targets": ["q_proj"]}), ALONE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (RANK, 2 * RANK, ["q_proj"])
    assert Path(config["base_model_name_or_path"]) == tiny_folder
