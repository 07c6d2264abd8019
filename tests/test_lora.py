"""models/lora.py against peft and against the base model: values, files, the merged export, what trains."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.checkpoint import export
from dpo.config import Config
from dpo.distributed import Ranks
from models.decoder import Decoder, load_decoder, next_token_logits
from models.errors import UserError
from models.lora import Adapter, LowRank, add_lora, load_adapter, merged_weights, read_adapter, save_adapter, start_lora
from models.parts import Linear
from models.tiny import write_tiny_model

RANK, ALPHA = 4, 12.0
KINDS = {
    "plain": Adapter(RANK, ALPHA),
    "two kinds": Adapter(RANK, ALPHA, ("q_proj", "down_proj")),
    "one layer": Adapter(RANK, ALPHA, ("model.layers.1.self_attn.v_proj", "layers.0.mlp.up_proj")),
    "rslora": Adapter(RANK, ALPHA, rslora=True),
    "dora": Adapter(RANK, ALPHA, dora=True),
    "both": Adapter(RANK, 6.0, rslora=True, dora=True),
}
TOKENS = torch.randint(256, (120,), generator=torch.Generator().manual_seed(2)).tolist()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fp32_folder(tmp_path_factory) -> Path:
    """A tiny Llama published in fp32, its head apart: an export of it rounds nothing away."""
    folder = tmp_path_factory.mktemp("fp32") / "model"
    write_tiny_model(folder, dtype=torch.float32, changes={"tie_word_embeddings": False})
    return folder


def with_lora(folder: Path, dtype: torch.dtype, kind: str = "plain", seed: int = 0) -> Decoder:
    model = load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype)
    add_lora(model, KINDS[kind], seed=seed)
    return model


def with_adapter(folder: Path, adapter: Path, dtype: torch.dtype) -> Decoder:
    model = load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype)
    add_lora(model, read_adapter(adapter), seed=5)
    load_adapter(adapter, model)
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


def adapter_of(model: Decoder, folder: Path, kind: str = "plain") -> Path:
    save_adapter(folder, dict(model.named_parameters()), KINDS[kind], base="base")
    return folder


def pefts_own(folder: Path, dtype: torch.dtype, kind: str) -> torch.nn.Module:
    """A model with an adapter that peft made, its values stirred."""
    peft = pytest.importorskip("peft")
    adapter = KINDS[kind]
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules="all-linear" if "all-linear" in adapter.targets else list(adapter.targets),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(transformers_model(folder, dtype), config)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(i)
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_peft_gives_our_logits_with_an_error_at_most_twice_pefts(fp32_folder, tmp_path, kind, dtype):
    peft = pytest.importorskip("peft")
    ours = stir(with_lora(fp32_folder, DTYPES[dtype], kind))
    folder = adapter_of(ours, tmp_path / "adapter", kind)
    base = transformers_model(fp32_folder, DTYPES[dtype])
    without = transformers_logits(base)
    theirs = transformers_logits(peft.PeftModel.from_pretrained(base, folder))
    truth = logits(stir(with_lora(fp32_folder, torch.float64, kind)))
    assert (logits(ours) - truth).norm() <= 2 * (theirs - truth).norm()
    assert (theirs - truth).norm() < 0.1 * (without - truth).norm()  # peft did apply our updates, and as we do


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_adapter_opens_here_with_its_logits_and_gradients(fp32_folder, tmp_path, kind, dtype):
    theirs = pefts_own(fp32_folder, DTYPES[dtype], kind)
    theirs.save_pretrained(tmp_path)
    read = read_adapter(tmp_path)
    assert (read.rank, read.scale, read.dora) == (RANK, KINDS[kind].scale, KINDS[kind].dora)
    truth, ours = (with_adapter(fp32_folder, tmp_path, d) for d in (torch.float64, DTYPES[dtype]))
    exact = logits(truth)
    assert (logits(ours) - exact).norm() <= 2 * (transformers_logits(theirs) - exact).norm()
    assert (transformers_logits(theirs) - exact).norm() < 0.05 * exact.norm()
    for model in (truth, ours):
        next_token_logits(model, TOKENS).square().mean().backward()
    theirs(torch.tensor([TOKENS])).logits.square().mean().backward()
    wanted, got = ({n: p.grad.double() for n, p in lora_parameters(model).items()} for model in (truth, ours))
    given = pefts_gradients(theirs)
    assert set(given) == set(wanted) == set(got)
    assert distance(got, wanted) <= 2 * distance(given, wanted)
    zero = dict.fromkeys(wanted, torch.zeros(()))
    assert distance(given, wanted) < 0.1 * distance(zero, wanted)


def pefts_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By our names."""
    return {
        name.removeprefix("base_model.model.")
        .replace("lora_magnitude_vector", "lora.M")
        .replace("lora_", "lora.")
        .replace(".default", "")
        .removesuffix(".weight"): p.grad.double()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def distance(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return float(sum((gradients[name] - exact).square().sum() for name, exact in truth.items())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_written_and_read_again_has_the_bits_it_had(tiny_folder, tmp_path, kind):
    ours = stir(with_lora(tiny_folder, torch.bfloat16, kind))
    again = with_adapter(tiny_folder, adapter_of(ours, tmp_path / "one", kind), torch.bfloat16)
    read = read_adapter(tmp_path / "one")
    assert (read.scale, read.dora, read.rslora) == (KINDS[kind].scale, KINDS[kind].dora, KINDS[kind].rslora)
    assert lora_parameters(again).keys() == lora_parameters(ours).keys()
    save_adapter(tmp_path / "two", dict(again.named_parameters()), read, base="base")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two and torch.equal(logits(again), logits(ours))


def test_an_adapter_of_some_layers_alone_is_read_as_that(fp32_folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    peft.get_peft_model(transformers_model(fp32_folder, torch.float32), config).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).targets == ("model.layers.1.self_attn.q_proj",)
    assert set(lora_parameters(with_adapter(fp32_folder, tmp_path, torch.float32))) == {
        f"model.layers.1.self_attn.q_proj.lora.{part}" for part in "AB"
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"bias": "lora_only"}, 'bias = "lora_only"'),
        ({"modules_to_save": ["embed_tokens"]}, 'modules_to_save = ["embed_tokens"]'),
        ({"rank_pattern": {"q_proj": 8}}, 'rank_pattern = {"q_proj": 8}'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow = 3"),
        ({"r": 0}, "r = 0"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": "12"}, "lora_alpha = '12'"),
        ({"r": 8}, "the config asks for [8, 64]"),
        ({"use_dora": True}, "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, ""),  # the tensors' names say it, exactly
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_adapter_that_we_would_not_compute_as_peft_does_is_refused_by_its_key(tiny_folder, tmp_path, change, named):
    adapter_of(with_lora(tiny_folder, torch.float32), tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    if not named:
        with_adapter(tiny_folder, place.parent, torch.float32)
        return
    with pytest.raises(UserError) as error:
        with_adapter(tiny_folder, place.parent, torch.float32)
    assert named in str(error.value) and str(place.parent) in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda tensors: tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(2)},
            "embed_tokens.weight",
        ),
        (lambda tensors: dict(list(tensors.items())[1:]), "missing: base_model.model.model.layers.0"),
        (lambda tensors: {"lora": torch.zeros(2)}, "holds no tensor of a low-rank update"),
        (lambda tensors: {f"{name}.x": tensor for name, tensor in tensors.items()}, "unexpected: base_model"),
    ],
)
def test_other_tensors_than_the_adapters_are_named(tiny_folder, tmp_path, change, named):
    place = adapter_of(with_lora(tiny_folder, torch.float32), tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(change(load_file(place)), place)
    with pytest.raises(UserError, match=named):
        with_adapter(tiny_folder, place.parent, torch.float32)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_one_of_the_adapters_files_is_named(tiny_folder, tmp_path, name):
    (adapter_of(with_lora(tiny_folder, torch.float32), tmp_path / "adapter") / name).unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'adapter'}: no"):
        with_adapter(tiny_folder, tmp_path / "adapter", torch.float32)


@pytest.mark.parametrize("kind", ["plain", "both"])
def test_the_adapter_files_are_those_that_peft_writes_itself(fp32_folder, tmp_path, kind):
    adapter_of(with_lora(fp32_folder, torch.float32, kind), tmp_path / "ours", kind)
    pefts_own(fp32_folder, torch.float32, kind).save_pretrained(tmp_path / "theirs")
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


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_b_at_zero_the_model_is_the_base_bit_for_bit(tiny_folder, dtype, kind):
    base = load_decoder(tiny_folder, weight_dtype=dtype, compute_dtype=dtype)
    assert torch.equal(logits(with_lora(tiny_folder, dtype, kind)), logits(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_stretches_the_product_and_not_the_bias(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=generator).to(dtype) for n in ((7, 32), (24, 32), (24,)))
    plain = Linear(32, 24, True, dtype)
    plain.weight.data, plain.bias.data = weight, bias
    start = plain(x)
    plain.lora = LowRank(weight, KINDS["dora"])
    start_lora(torch.nn.ModuleDict({"plain": plain}), seed=0)
    assert torch.equal(plain(x), start)  # at the start it is the base's output, bit for bit
    with torch.no_grad():
        plain.lora.B += torch.randn(24, RANK, generator=generator) * 0.3
        plain.lora.M += torch.randn(24, generator=generator)
        adapted = weight.double() + ALPHA / RANK * plain.lora.B.double() @ plain.lora.A.double()
        magnitude = weight.double().norm(dim=1) + plain.lora.M.double()
        exact = x.double() @ (magnitude / adapted.norm(dim=1) * adapted.T) + bias.double()
    eps = torch.finfo(dtype).eps
    assert (plain(x) - exact).norm() < 4 * eps * exact.norm() < 0.2 * (start - exact).norm()


def test_dropout_is_of_the_updates_in_train_mode_alone_and_keeps_their_mean(tiny_folder):
    model = stir(with_lora(tiny_folder, torch.float64, "one layer"))
    still = logits(model)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.dropout = 0.5
    assert torch.equal(logits(model), still)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = torch.nn.functional.linear(x, linear.weight)
    whole = linear(x).detach()
    model.train()
    torch.manual_seed(1)
    drawn = torch.stack([linear(x).detach() for _ in range(4000)])
    assert len(drawn.unique(dim=0)) > 3900
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - whole).abs() < 5 * error).all() and ((whole - base).abs() > 20 * error).any()


def test_activation_checkpointing_draws_the_same_dropout_again(tiny_folder):
    gradients = []
    for checkpointed in (False, True):
        model = stir(with_lora(tiny_folder, torch.float32, "both"))
        model.checkpoint_activations = checkpointed
        for module in model.modules():
            if isinstance(module, LowRank):
                module.dropout = 0.3
        model.train()
        torch.manual_seed(3)
        next_token_logits(model, TOKENS).square().mean().backward()
        gradients.append([p.grad for p in lora_parameters(model).values()])
    assert all(map(torch.equal, *gradients))


def test_only_the_updates_train_and_they_do(tiny_folder):
    model = stir(with_lora(tiny_folder, torch.bfloat16))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(lora_parameters(model)) and len(trained) == 2 * 7 * 2  # A and B, 7 kinds, 2 layers
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}  # masters
    next_token_logits(model, TOKENS).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert name not in trained or parameter.grad.any(), name


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


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_logits_of_the_unmerged_model(fp32_folder, tmp_path, kind):
    """In fp64, to its rounding; and in fp32 with an error at most twice that of the unmerged fp32 model."""
    truth, model = (stir(with_lora(fp32_folder, dtype, kind)) for dtype in (torch.float64, torch.float32))
    exact = logits(truth)
    for one, bound in (
        (truth, 256 * torch.finfo(torch.float64).eps * exact.norm()),
        (model, 2 * (logits(model) - exact).norm()),
    ):
        merged = merged_weights(one, dict(one.named_parameters()))
        plain = load_decoder(fp32_folder, weight_dtype=torch.float64, compute_dtype=torch.float64)
        start = logits(plain)
        plain.load_state_dict(merged)
        assert (logits(plain) - exact).norm() <= bound < 0.01 * (start - exact).norm()


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
