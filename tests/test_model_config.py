"""models/config.py: both spellings read alike, absent keys as published, what we cannot follow refused by its key."""

import json
from pathlib import Path

import pytest

from models.config import RopeScaling
from models.errors import UserError
from models.families import read_model_config

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def config_folder(folder: Path, removed: tuple[str, ...] = (), **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {k: v for k, v in (CONFIG | changes).items() if k not in removed}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_config_of_both_spellings_is_the_same(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "torch_dtype": "bfloat16"}
    older = old | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA3_ROPE.items()}}
    new = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "dtype": "bfloat16"}
    removed = ("dtype",)
    read = [read_model_config(config_folder(tmp_path / "old", removed, **old))]
    read.append(read_model_config(config_folder(tmp_path / "older", removed, **older)))
    read.append(read_model_config(config_folder(tmp_path / "new", (), **new)))
    assert read[0] == read[1] == read[2]
    assert read[0].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32) and read[0].rope_theta == 5e5
    assert read[0].dtype == "bfloat16"


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE])
@pytest.mark.parametrize("tied", [False, True])
def test_config_that_transformers_wrote_is_read_as_it_was_meant(tmp_path: Path, tied: bool, rope: object) -> None:
    parameters = {} if rope is None else {"rope_parameters": rope | {"rope_theta": 7e4}}  # type: ignore[operator]
    given = (
        CONFIG | parameters | {"tie_word_embeddings": tied, "head_dim": 10, "attention_bias": True, "mlp_bias": True}
    )
    transformers.LlamaConfig(**given).save_pretrained(tmp_path / "m")
    config = read_model_config(tmp_path / "m")
    assert (config.vocab, config.hidden, len(config.layers), config.ffn) == (40, 24, 2, 36)
    assert (config.heads, config.kv_heads, config.head_dim) == (6, 2, 10)
    assert (config.tied, config.qkv_bias, config.mlp_bias) == (tied, True, True)
    assert (config.rope_theta, config.rope_scaling is None) == ((1e4, True) if rope is None else (7e4, False))
    assert (config.norm_eps, config.dtype) == (1e-5, "float32")


def test_absent_keys_mean_what_transformers_means_by_them(tmp_path: Path) -> None:
    optional = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "dtype")
    folder = config_folder(tmp_path / "m", optional)
    ours, theirs = read_model_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert (ours.tied, ours.qkv_bias, ours.mlp_bias) == (theirs.tie_word_embeddings, False, False)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, "architectures = None"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported: .*llama3",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor = None must be a number"),
        ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3' must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 must be a multiple of num_key_value_heads = 4"),
        ({"hidden_size": None}, "hidden_size = None must be a whole number"),
        ({"hidden_size": "24"}, "hidden_size = '24' must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be a whole number"),
        ({"vocab_size": 0}, "vocab_size = 0 must be a whole number of at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
        ({"dtype": "int8"}, "dtype = 'int8' is not supported"),
    ],
)
def test_a_config_we_cannot_follow_is_refused_by_key(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = config_folder(tmp_path / "m", **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n 'a'", r"config.json:2: broken JSON"),
        ("[1]", "one JSON object"),
        ("\udcff", "not UTF-8"),
        (None, "no config.json"),
    ],
)
def test_a_broken_or_absent_config_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_model_config(tmp_path)
