"""Model folders of every family, in every layout they are published in, read and written; transformers on both sides.

Letters: `E` experts, `F` ffn width of an expert, `D` model width, `G` blocks of a row.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.export import merge
from models import checkpoint
from models.checkpoint import INDEX, SINGLE, save_folder
from models.decoder import Decoder, load_decoder, next_token_logits
from models.errors import UserError
from models.lora import Adapter, add_lora, save_adapter

transformers = pytest.importorskip("transformers")

SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LLAMA4 = SHARED | {"intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 8, "floor_scale": 4}
# Square experts' down_proj, as published: shapes alone do not say which way round it is.
GPT_OSS = SHARED | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
PICTURES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
MODELS = {  # how transformers builds each
    "llama": ("LlamaForCausalLM", SHARED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in SHARED.items() if k != "head_dim"}),
    "qwen3": ("Qwen3ForCausalLM", SHARED | {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        SHARED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
    ),
    "olmo2": ("Olmo2ForCausalLM", {k: v for k, v in SHARED.items() if k != "head_dim"}),
    "gpt_oss": ("GptOssForCausalLM", GPT_OSS),
    "scout": ("Llama4ForCausalLM", LLAMA4 | {"interleave_moe_layer_step": 1}),
    "maverick": ("Llama4ForCausalLM", LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False}),
    "pictures": ("Llama4ForConditionalGeneration", {"text_config": LLAMA4, "vision_config": PICTURES}),
}
MIXTURES = ["qwen3_moe", "gpt_oss", "scout", "pictures"]
EXPERTS = re.compile(r".*\.experts\.(gate_up|down)_proj")


def random_model(name: str, **changes: object) -> torch.nn.Module:
    """A model of transformers whose every value is drawn: norms, biases and sinks too."""
    architecture, fields = MODELS[name]
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**fields | changes)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float("norm" in key), 0.2)
    return model


def in_memory(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its text parameters under our names, experts [E, out, in]."""
    turn = not type(model).__name__.startswith("Qwen")
    return {
        name.removeprefix("language_model."): p.detach().mT if turn and EXPERTS.fullmatch(name) else p.detach()
        for name, p in model.named_parameters()
        if not name.startswith(("vision_model.", "multi_modal_projector."))
    }


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def parameters(folder: Path) -> dict[str, Tensor]:
    """What we load, in fp32."""
    return dict(load_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32).named_parameters())


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """Put other tensors, and config.json's fields, into a folder of one file."""
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / SINGLE,
        {"format": "pt"},
    )
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def quantised(folder: Path) -> dict[str, Tensor]:
    """A gpt-oss folder whose experts are MXFP4 of drawn bits: its tensors."""
    random_model("gpt_oss").save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if EXPERTS.fullmatch(name)]:
        count, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 128, (count, outputs, inputs // 32), dtype=torch.uint8)
    rewrite(folder, tensors, quantization_config={"quant_method": "mxfp4"})
    return tensors


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    if isinstance(model, Decoder):
        return next_token_logits(model, tokens).double()
    return model(torch.tensor([tokens])).logits[0].double()


# ---------------------------------------------------------------- transformers writes, we read


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_transformers_wrote_loads_bit_for_bit(tmp_path: Path, name: str, shard_size: str) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).is_file() == (shard_size == "20KB")
    assert_equal(parameters(tmp_path), in_memory(model))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path, weight_dtype=torch.float32, compute_dtype=torch.float32)
    exact = load_decoder(tmp_path, weight_dtype=torch.float64, compute_dtype=torch.float64)
    tokens = torch.randint(96, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    truth = logits(exact, tokens)
    error = (logits(theirs, tokens) - truth).abs().max()
    assert (logits(ours, tokens) - truth).abs().max() <= 2 * error < 1e-4 * truth.abs().max()


def test_experts_that_transformers_left_fused_load(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / SINGLE)
    assert_equal(parameters(tmp_path), in_memory(model))


# ---------------------------------------------------------------- we write, transformers reads


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_we_wrote_loads_bit_for_bit_in_transformers(
    tmp_path: Path, name: str, max_shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "source")
    tensors = parameters(tmp_path / "source")
    save_folder(tmp_path / "ours", tensors, tmp_path / "source", dtype=torch.float32)
    if max_shard_bytes == 20_000:
        (tmp_path / "ours" / SINGLE).unlink()
        checkpoint.write_weights(tmp_path / "ours", tensors, torch.float32, max_shard_bytes)
        assert (tmp_path / "ours" / INDEX).is_file()
    kind = transformers.Llama4ForCausalLM if name == "pictures" else type(model)
    theirs, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    assert_equal(in_memory(theirs.eval()), in_memory(model))
    assert_equal(parameters(tmp_path / "ours"), tensors)
    tokens = list(range(21))
    assert torch.equal(logits(theirs, tokens), logits(getattr(model, "language_model", model), tokens))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "maverick"])
def test_we_write_the_names_and_shapes_that_are_published(tmp_path: Path, name: str) -> None:
    random_model(name).save_pretrained(tmp_path / "source")
    save_folder(tmp_path / "ours", parameters(tmp_path / "source"), tmp_path / "source", dtype=torch.float32)
    assert_equal(load_file(tmp_path / "ours" / SINGLE), load_file(tmp_path / "source" / SINGLE))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_llama4_with_pictures_is_written_as_its_text_model(tmp_path: Path, spelling: str, inside: bool) -> None:
    random_model("pictures").save_pretrained(tmp_path / "source")
    tensors = parameters(tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text())
    del fields["dtype"]
    (fields["text_config"] if inside else fields)[spelling] = "float32"
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    save_folder(tmp_path / "ours", tensors, tmp_path / "source", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == ["Llama4ForCausalLM"] and written["model_type"] == "llama4_text"
    assert written[spelling] == "bfloat16" and len({"dtype", "torch_dtype"} & written.keys()) == 1
    assert not {"text_config", "vision_config"} & written.keys()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(theirs).__name__ == "Llama4ForCausalLM" and theirs.dtype == torch.bfloat16
    assert_equal(in_memory(theirs), {name: tensor.bfloat16() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_is_merged_into_a_folder_of_the_published_layout(tmp_path: Path, name: str) -> None:
    quantised(tmp_path / "base") if name == "gpt_oss" else random_model(name).save_pretrained(tmp_path / "base")
    model = load_decoder(tmp_path / "base", weight_dtype=torch.float32, compute_dtype=torch.float32)
    adapter = Adapter(rank=2, alpha=4.0, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
    add_lora(model, adapter, seed=0)
    for key, parameter in model.named_parameters():
        if key.endswith(".B"):
            parameter.data.normal_(0, 0.1)
    values, architecture = dict(model.named_parameters()), model.config.architecture
    save_adapter(tmp_path / "adapter", values, adapter, base=str(tmp_path / "base"), architecture=architecture)
    found = merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert found.written <= found.allowed < found.trained / 100
    kind = getattr(transformers, json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"][0])
    _, report = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report


# ---------------------------------------------------------------- MXFP4


def by_definition(blocks: Tensor, scales: Tensor) -> Tensor:
    """One row, byte by byte (OCP MX 1.0: e2m1 elements, e8m0 scales)."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    row = []
    for block, scale in zip(blocks.tolist(), scales.tolist(), strict=True):
        for byte in block:
            for nibble in (byte & 15, byte >> 4):
                row.append((-1.0 if nibble & 8 else 1.0) * table[nibble & 7] * 2.0 ** (scale - 127))
    return torch.tensor(row)


def test_mxfp4_is_its_definition_and_what_transformers_makes_of_it(tmp_path: Path) -> None:
    tensors = quantised(tmp_path)
    ours = parameters(tmp_path)
    for name in ours:
        if EXPERTS.fullmatch(name):
            packed = (tensors[f"{name}_{part}"].flatten(0, 1) for part in ("blocks", "scales"))
            rows = [by_definition(*row) for row in zip(*packed, strict=True)]
            assert torch.equal(ours[name].flatten(0, 1), torch.stack(rows))
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    assert_equal(ours, in_memory(theirs))


def test_blocks_and_scales_may_lie_in_different_files_that_count_from_zero(tmp_path: Path) -> None:
    tensors = quantised(tmp_path)
    truth = parameters(tmp_path)
    weight_map = {name: f"model-0000{int('scales' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal(parameters(tmp_path), truth)


def test_packed_parameters_get_the_stored_bytes(tmp_path: Path) -> None:
    tensors = quantised(tmp_path)
    packed = load_decoder(tmp_path, weight_dtype=torch.float32, compute_dtype=torch.float32, packed=True)
    assert_equal(dict(packed.named_parameters()), tensors)


def test_what_was_quantised_is_written_in_bf16(tmp_path: Path) -> None:
    packed = quantised(tmp_path / "source")
    tensors = parameters(tmp_path / "source")
    save_folder(tmp_path / "ours", tensors, tmp_path / "source", dtype=torch.bfloat16)
    save_folder(tmp_path / "packed", packed, tmp_path / "source", dtype=torch.bfloat16)
    assert_equal(load_file(tmp_path / "ours" / SINGLE), load_file(tmp_path / "packed" / SINGLE))
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert_equal(parameters(tmp_path / "ours"), {name: p.bfloat16().float() for name, p in tensors.items()})
    theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert_equal(in_memory(theirs), {name: p.bfloat16().to(theirs.dtype) for name, p in tensors.items()})


# ---------------------------------------------------------------- what must not load


@pytest.mark.parametrize("hidden", [32, 64, 48])
@pytest.mark.parametrize("name", ["gpt_oss", "scout", "pictures"])
def test_experts_stored_the_other_way_round_are_refused(tmp_path: Path, name: str, hidden: int) -> None:
    """At width 32 = F down_proj is square, at 64 = 2F gate_up_proj is; never both."""
    changes = {"hidden_size": hidden, "intermediate_size": 32}
    random_model(name, **({"text_config": LLAMA4 | changes} if name == "pictures" else changes)).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / SINGLE)
    rewrite(tmp_path, {key: t.mT if EXPERTS.fullmatch(key) else t for key, t in tensors.items()})
    with pytest.raises(UserError, match=r"wrong shape: .*experts\.(gate_up|down)_proj is \["):
        parameters(tmp_path)


@pytest.mark.parametrize("hidden", [24, 48, 32])
def test_fused_qwen_experts_stored_the_other_way_round_are_refused(tmp_path: Path, hidden: int) -> None:
    random_model("qwen3_moe", hidden_size=hidden).save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / SINGLE)
    rewrite(tmp_path, {key: t.mT if EXPERTS.fullmatch(key) else t for key, t in tensors.items()})
    with pytest.raises(UserError, match=r"wrong shape: .*experts\.(gate_up|down)_proj is \["):
        parameters(tmp_path)


def test_experts_in_two_layouts_are_refused(tmp_path: Path) -> None:
    """Where gate_up_proj is MXFP4, nothing would say which way round a square bf16 down_proj is."""
    tensors = quantised(tmp_path)
    down = "model.layers.0.mlp.experts.down_proj"
    half = {key: t for key, t in tensors.items() if not key.startswith(down)} | {down: torch.zeros(4, 32, 32)}
    half[f"{down}_bias"] = tensors[f"{down}_bias"]
    with pytest.raises(UserError, match=f"missing: {down}_blocks, {down}_scales; unexpected: {down}$"):
        parameters(rewrite(tmp_path, half))
    with pytest.raises(UserError, match=f"config.json; unexpected: {down}$"):
        parameters(rewrite(tmp_path, tensors | {down: torch.zeros(4, 32, 32)}))

    random_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    down = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(UserError, match="missing: .*experts.gate_up_proj; unexpected: .*experts.0.down_proj.weight"):
        parameters(rewrite(tmp_path, tensors | {down: torch.zeros(4, 32, 24)}))


def test_faults_are_told_in_the_names_of_the_files(tmp_path: Path) -> None:
    random_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(UserError, match=f"missing: {expert}$"):
        parameters(rewrite(tmp_path, {key: t for key, t in tensors.items() if key != expert}))
    with pytest.raises(UserError, match=re.escape(f"wrong shape: {expert} is [32, 24], the config asks for [24, 32]")):
        parameters(rewrite(tmp_path, tensors | {expert: tensors[expert].mT}))
    with pytest.raises(UserError, match=f"unexpected: {expert.replace('.3.', '.4.')}$"):
        parameters(rewrite(tmp_path, tensors | {expert.replace(".3.", ".4."): tensors[expert]}))
    with pytest.raises(UserError, match=f"wrong type: {expert} is F8_E4M3, read are BF16, F16, F32, F64$"):
        parameters(rewrite(tmp_path, tensors | {expert: tensors[expert].to(torch.float8_e4m3fn)}))


def test_floats_that_are_called_blocks_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 names dequantised experts so when it saves them again; it cannot open them either."""
    quantised(tmp_path / "source")
    model = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        UserError, match=r"missing: .*down_proj_scales.*wrong type: .*down_proj_blocks is F32, read are U8"
    ):
        parameters(tmp_path / "saved")


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from pathlib import Path
from models import checkpoint, layouts

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

checkpoint.STEP_VALUES = 2**18
names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
parameters = {name: torch.ones(256, 512, 256, dtype=torch.bfloat16) for name in names}
checkpoint.load_weights(Path(sys.argv[1]), {name: p[:1] for name, p in parameters.items()}, layouts.gpt_oss)
before = peak_kib()
checkpoint.load_weights(Path(sys.argv[2]), parameters, layouts.gpt_oss)
print((peak_kib() - before) / 1024)
"""


@pytest.mark.parametrize("packed", [True, False])
def test_loading_holds_less_than_one_tensor_beside_the_model(tmp_path: Path, packed: bool) -> None:
    for folder, count in (("warm", 1), ("large", 256)):
        tensors = {}
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            if packed:
                tensors[f"{name}_blocks"] = torch.zeros(count, 512, 8, 16, dtype=torch.uint8)
                tensors[f"{name}_scales"] = torch.zeros(count, 512, 8, dtype=torch.uint8)
            else:
                tensors[name] = torch.zeros(count, 256, 512, dtype=torch.bfloat16)
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / SINGLE)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "warm"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    tensor_mib = 256 * 512 * 256 * (17 / 32 if packed else 2) / 2**20
    assert float(done.stdout) < tensor_mib, "one of two stored tensors"
