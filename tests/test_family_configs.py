"""models/families/: every field that a published config class has is read, harmless, or refused: never dropped."""

import dataclasses
import json
from pathlib import Path

import pytest

from models.attention import FULL, Span
from models.config import ModelConfig, Yarn
from models.errors import UserError
from models.families import parse_model_config
from models.tiny import FAMILIES, SHARED

transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gpt_oss": transformers.GptOssConfig,
    "scout": transformers.Llama4TextConfig,
    "olmo2": transformers.Olmo2Config,
}
# A value of each field that no model of models/tiny.py has.
OTHER: dict[str, object] = {
    "attention_bias": True,
    "attention_chunk_size": 7,
    "attn_scale": 0.3,
    "attn_temperature_tuning": False,
    "decoder_sparse_step": 2,
    "floor_scale": 99,
    "head_dim": 12,
    "hidden_act": "gelu",
    "hidden_size": 60,
    "interleave_moe_layer_step": 2,
    "intermediate_size": 20,
    "intermediate_size_mlp": 20,
    "layer_types": ["sliding_attention", "sliding_attention"],
    "mlp_bias": True,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 20,
    "moe_layers": [2],
    "no_rope_layer_interval": 2,
    "no_rope_layers": [0, 1, 1, 1],
    "norm_topk_prob": False,
    "num_attention_heads": 6,
    "num_experts": 5,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "num_local_experts": 7,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "sliding_window": 5,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 3.0,
    "tie_word_embeddings": True,
    "use_qk_norm": False,
    "use_sliding_window": True,
    "vocab_size": 99,
}
# Of generation, of training from scratch, of memory; and attention_dropout, which is 0 wherever it is published.
HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_position_embeddings", "pretraining_tp"}
HARMLESS |= {"initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef"}
HARMLESS |= {"router_jitter_noise"}  # transformers reads it nowhere


def fields_of(family: str, **changes: object) -> dict[str, object]:
    return {**SHARED, **FAMILIES[family], **changes}


def read(family: str, **changes: object) -> ModelConfig:
    return parse_model_config(fields_of(family, **changes), Path("config.json"))


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_the_published_class_is_read_harmless_or_refused(family: str) -> None:
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = [f.name for f in dataclasses.fields(CLASSES[family]) if f.name not in base or f.name in OTHER]
    unaccounted = []
    for name in own:
        if name in HARMLESS or (name in ("sliding_window", "max_window_layers") and "qwen" in family):
            continue
        before = {name: False} if name in ("tie_word_embeddings", "attention_bias") else {}
        try:
            unaccounted += [name] if read(family, **{name: OTHER[name]}) == read(family, **before) else []
        except UserError as error:
            assert name in str(error)
    assert len(own) > 15 and unaccounted == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_again_is_read_alike(family: str, tmp_path: Path) -> None:
    """Its new spellings: rope_parameters, dtype, num_local_experts, layer_types, lists instead of steps."""
    (tmp_path / "config.json").write_text(json.dumps(fields_of(family, torch_dtype="bfloat16")))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again and "rope_theta" not in again and again["dtype"] == "bfloat16"
    assert parse_model_config(again, tmp_path) == read(family, torch_dtype="bfloat16")


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_field_and_null_mean_what_transformers_means_by_them_or_are_refused(
    family: str, value: str | None, tmp_path: Path
) -> None:
    for key in fields_of(family).keys() - {"architectures", "model_type"}:
        fields = fields_of(family, **{key: None})
        if value == "absent":
            del fields[key]
        try:
            ours = parse_model_config(fields, tmp_path)
        except UserError as error:
            assert key in str(error)
            continue
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        except Exception as error:  # a null that its strict class refuses
            assert value is None and key in str(error)
            continue
        theirs.save_pretrained(tmp_path / "again")
        assert ours == parse_model_config(json.loads((tmp_path / "again" / "config.json").read_text()), tmp_path), key


def test_old_spellings_and_absent_fields_mean_what_they_were_published_as() -> None:
    for tuned in (4, True):
        assert read("scout", attn_temperature_tuning=tuned) == read("scout")
    assert read("scout", attn_temperature_tuning=False).temperature is None
    assert [kind.rotary for kind in read("scout").layers] == [True, True, True, False]
    assert [kind.span for kind in read("scout").layers] == [Span(chunk=16)] * 3 + [FULL]
    for absent in ([], None):
        assert read("scout", no_rope_layers=absent) == read("scout")
    assert [kind.sparse for kind in read("maverick").layers] == [False, True, False, True]
    assert not any(kind.sparse for kind in read("maverick", moe_layers=[]).layers)
    assert read("qwen3_moe", num_experts=None, num_local_experts=8) == read("qwen3_moe")
    assert read("gpt_oss", rope_scaling=None).rope_scaling == Yarn(32.0, 32.0, 1.0, 4096, False)
    nested = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": fields_of("scout")}
    outer = {"vision_config": {"hidden_size": 8}, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    config = parse_model_config({**nested, **outer}, Path("config.json"))
    assert dataclasses.replace(config, architecture="Llama4ForCausalLM") == read("scout", dtype="bfloat16")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported; supported: False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "must name one of full_attention for each"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers = \[2\] must be a list of numbers below 2"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 of only 8 experts"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5 is not supported; supported: 1.702"),
        (
            "gpt_oss",
            {"layer_types": ["linear_attention"] * 2},
            "one of sliding_attention, full_attention for each of 2",
        ),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types .* for each of 2 layers"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window = None must be a whole number"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method = 'fp8' .* supported: 'mxfp4'"),
        ("gpt_oss", {"quantization_config": {"bits": 4}}, "quant_method = None is not supported"),
        ("llama", {"quantization_config": {"quant_method": "mxfp4"}}, "quant_method = 'mxfp4' is not supported"),
        ("scout", {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\] must be a list of 0 or 1 for each of 4"),
        ("scout", {"moe_layers": ["1"]}, r"moe_layers = \['1'\] must be a list of numbers below 4"),
        ("scout", {"attention_chunk_size": None}, "attention_chunk_size = None must be a whole number"),
        ("scout", {"attn_temperature_tuning": "yes"}, "attn_temperature_tuning = 'yes' must be true or false"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; supported: 1.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ("llama", {"auto_map": {"AutoModel": "m.M"}}, "auto_map .* is not supported; supported: leave it out"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope type 'longrope'.*supported: 'default', 'llama3', 'y",
        ),
        ("gpt_oss", {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0}}, "mscale = 1.0 is not supported"),
        (
            "llama",
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            r"mrope_section = \[1\] is not supported",
        ),
    ],
)
def test_a_value_that_is_not_built_is_refused_by_field_value_and_what_is(
    family: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(family, **changes)
    assert "config.json: " in str(caught.value)


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        UserError, match=r"architectures = \['Gemma3ForCausalLM'\].*GptOssForCausalLM.*Olmo2ForCausalLM"
    ):
        parse_model_config({**SHARED, "architectures": ["Gemma3ForCausalLM"]}, Path("config.json"))
