"""models/decoder.py against transformers and against itself: logits, packed trees, LoRA."""

from pathlib import Path

import pytest
import torch

from models.decoder import Decoder, load_decoder, next_token_logits
from models.tiny import write_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"changes": {"tie_word_embeddings": False}},
    "llama3 rope": {"changes": {"rope_scaling": LLAMA3_ROPE}},
    "sharded": {"sharded": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def hf_logits(folder: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def our_logits(folder: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return next_token_logits(load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype), tokens)


def check_against_transformers(folder: Path, tokens: list[int], dtype: torch.dtype) -> None:
    truth = our_logits(folder, tokens, torch.float64)
    theirs_in_fp64 = hf_logits(folder, tokens, torch.float64)
    # transformers computes norms and angles in fp32 even in an fp64 model: its fp64 is good to fp32's rounding only.
    assert (truth - theirs_in_fp64).norm() <= 64 * torch.finfo(torch.float32).eps * truth.norm()
    ours, theirs = our_logits(folder, tokens, dtype), hf_logits(folder, tokens, dtype)
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_tiny_llamas_are_as_exact_as_transformers_own(tmp_path, variant, dtype):
    write_tiny_model(tmp_path / "model", **VARIANTS[variant])
    tokens = torch.randint(256, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    check_against_transformers(tmp_path / "model", tokens, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_the_imported_smollm2_are_as_exact_as_transformers_own(smollm2_folder, dtype):
    from models.tokenizer import load_tokenizer

    tokens = load_tokenizer(smollm2_folder).prompt_ids(
        ({"role": "user", "content": "Name three rivers of Peru. ¿Sí?"},)
    )
    check_against_transformers(smollm2_folder, tokens, DTYPES[dtype])


def test_tied_model_has_no_head_of_its_own_and_an_untied_one_has(tmp_path):
    for tied in (True, False):
        folder = tmp_path / str(tied)
        write_tiny_model(folder, changes={"tie_word_embeddings": tied})
        model = load_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32)
        assert ("lm_head.weight" in dict(model.named_parameters())) is not tied
        assert isinstance(model, Decoder)
