"""models/families/ against transformers: logits and every gradient of tiny random models, packed or not.

The truth is theirs: transformers in fp64, its fp32 islands (norms, angles, softmax) widened by `Exact`. In fp32 and
bf16 a near tie between experts can fall either way, in their router as in ours, and a flipped expert is no rounding
error: there both are told the truth's choices, by `Choices`. In fp64 both choose for themselves, and choose the same.
"""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.decoder import Decoder, next_token_logits
from models.families import read_model_config
from models.files import write_json
from models.tiny import FAMILIES, SHARED

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3_RAMP = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_STEP = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}  # Scout's: no ramp between
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_EXACT = YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
TOKENS = 37  # longer than the windows and chunks of models/tiny.py

# "family: what varies" -> (model of models/tiny.py, fields of its config.json that differ)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama: tied": ("llama", {}),
    "llama: untied": ("llama", {"tie_word_embeddings": False}),
    "llama: one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama: as many kv heads as heads": ("llama", {"num_key_value_heads": 4}),
    "llama: 9 heads on 3": ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama: heads of 10": ("llama", {"head_dim": 10}),
    "llama: biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama: rope of Llama 3": ("llama", {"rope_scaling": LLAMA3_RAMP, "rope_theta": 5e5}),
    "llama: rope of Llama 3 without a ramp": ("llama", {"rope_scaling": LLAMA3_STEP}),
    "llama: yarn in whole indices": ("llama", {"rope_scaling": YARN}),
    "qwen2: tied": ("qwen2", {}),
    "qwen2: untied, one kv head": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen2: yarn": ("qwen2", {"rope_scaling": YARN_EXACT}),
    "qwen3: heads wider than the model": ("qwen3", {}),
    "qwen3: tied, heads of 10": ("qwen3", {"tie_word_embeddings": True, "head_dim": 10}),
    "qwen3: biases": ("qwen3", {"attention_bias": True}),
    "qwen3: eps 1e-2": ("qwen3", {"rms_norm_eps": 1e-2}),
    "qwen3_moe: weights that sum to 1": ("qwen3_moe", {}),
    "qwen3_moe: weights that do not": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe: every second layer sparse": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe: first layer dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe: one expert": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen3_moe: all experts": ("qwen3_moe", {"num_experts_per_tok": 8}),
    "gpt_oss: window of 8": ("gpt_oss", {}),
    "gpt_oss: window of 1": ("gpt_oss", {"sliding_window": 1}),
    "gpt_oss: window longer than the text": ("gpt_oss", {"sliding_window": 128}),
    "gpt_oss: full first, windows then": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gpt_oss: yarn in whole indices": ("gpt_oss", {"rope_scaling": YARN}),
    "gpt_oss: plain rope": ("gpt_oss", {"rope_scaling": {"rope_type": "default"}}),
    "gpt_oss: no attention bias": ("gpt_oss", {"attention_bias": False}),
    "gpt_oss: most activations clamped": ("gpt_oss", {"swiglu_limit": 0.25}),
    "gpt_oss: four experts, experts not square": ("gpt_oss", {"num_experts_per_tok": 4, "intermediate_size": 40}),
    "llama4: scout": ("scout", {}),
    "llama4: maverick": ("maverick", {}),
    "llama4: chunks longer than the text": ("scout", {"attention_chunk_size": 64}),
    "llama4: chunks of 5": ("maverick", {"attention_chunk_size": 5}),
    "llama4: other layers without rope": ("scout", {"no_rope_layers": [0, 1, 1, 0]}),
    "llama4: no rope at all": ("scout", {"no_rope_layers": [0, 0, 0, 0]}),
    "llama4: no temperature": ("scout", {"attn_temperature_tuning": False}),
    "llama4: hotter": ("maverick", {"floor_scale": 3, "attn_scale": 0.5}),
    "llama4: rope of Llama 3 without a ramp": ("scout", {"rope_scaling": LLAMA3_STEP}),
    "llama4: named sparse layers": ("maverick", {"moe_layers": [0, 3]}),
    "llama4: all layers dense": ("maverick", {"moe_layers": []}),
    "llama4: two experts": ("scout", {"num_experts_per_tok": 2}),
    "llama4: biases": ("maverick", {"attention_bias": True}),
    "olmo2: grouped heads": ("olmo2", {}),
    "olmo2: as many kv heads as heads, biases": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "olmo2: tied, heads wider than the model": ("olmo2", {"tie_word_embeddings": True, "head_dim": 24}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Exact(TorchFunctionMode):
    """What is asked for in fp32 is done in fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widened = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        args = [torch.float64 if value is torch.float32 else value for value in args]
        return (Tensor.double if func is Tensor.float else func)(*args, **widened)


class Choices(TorchFunctionMode):
    """Keeps what topk chooses, call by call; or makes it choose as in `told`."""

    def __init__(self, told: list[Tensor] | None = None) -> None:
        super().__init__()
        self.told, self.made = told, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        indices = result.indices if self.told is None else self.told[len(self.made)]
        self.made.append(indices)
        return torch.return_types.topk((args[0].gather(-1, indices), indices))


def turned(name: str, architecture: str, tensor: Tensor) -> Tensor:
    """A parameter (or its gradient) of one side in the other's layout: these two keep experts as [E, in, out]."""
    is_turned = architecture in ("GptOssForCausalLM", "Llama4ForCausalLM") and tensor.dim() == 3
    return tensor.transpose(1, 2) if is_turned else tensor


def both(folder: Path, dtype: torch.dtype, seed: int) -> tuple[torch.nn.Module, Decoder]:
    """transformers' model and ours of the folder's config.json, of the same random weights, all exact in bf16."""
    config = read_model_config(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager", dtype=dtype
    )
    if "Moe" in config.architecture or "Oss" in config.architecture:
        theirs.set_experts_implementation("eager")
    ours = Decoder(config, weight_dtype=dtype, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    weights = dict(theirs.named_parameters())
    assert weights.keys() == dict(ours.named_parameters()).keys()
    with torch.no_grad():
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator) * (0.15 if weight.dim() > 1 else 0.5)
            weight.copy_((noise + ("norm" in name)).bfloat16())
        for name, weight in ours.named_parameters():
            weight.copy_(turned(name, config.architecture, weights[name]))
    return theirs.eval(), ours.eval()


def run(model: torch.nn.Module, tokens: list[int], *modes: TorchFunctionMode) -> dict[str, Tensor]:
    """Logits and the gradients of a fixed random mix of them, by name, in fp64 and transformers' layout."""
    for mode in modes:
        mode.__enter__()
    ours = isinstance(model, Decoder)
    logits = next_token_logits(model, tokens) if ours else model(torch.tensor([tokens])).logits[0]
    for mode in reversed(modes):
        mode.__exit__(None, None, None)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (logits.double() * upstream).sum().backward()
    architecture = model.config.architecture if ours else ""
    gradients = {name: turned(name, architecture, p.grad).double() for name, p in model.named_parameters()}
    return {"logits": logits.detach().double()} | gradients


def errors(values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each kind of tensor over all layers, relative to the truth's norm; and their root mean square over kinds."""
    kinds: dict[str, list[str]] = {}
    for name in truth:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    found = {}
    for kind, names in kinds.items():
        off = math.hypot(*((values[name] - truth[name]).norm().item() for name in names))
        found[kind] = off / math.hypot(*(truth[name].norm().item() for name in names))
    return found | {"all": root_mean_square(found.values())}


def root_mean_square(values: Iterable[float]) -> float:
    return math.sqrt(fmean(value**2 for value in values))


@pytest.mark.parametrize("family", dict.fromkeys(name.split(":")[0] for name in VARIANTS))
def test_logits_and_gradients_are_as_exact_as_transformers_own(tmp_path, family):
    """In each variant the logits and all gradients together; each kind of parameter over all of the family's.

    One kind's error in one run is a throw of the dice: a family has at least ten runs, and a kind is also held against
    their error over all kinds.
    """
    variants = {name: variant for name, variant in VARIANTS.items() if name.split(":")[0] == family}
    tokens = torch.randint(2, 304, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for variant, seed in itertools.product(variants, range(-(-10 // len(variants)))):
        tiny, changes = variants[variant]
        write_json(tmp_path / "config.json", {**SHARED, **FAMILIES[tiny], **changes})
        theirs, ours = both(tmp_path, torch.float64, seed)
        chosen, our_choices = Choices(), Choices()
        truth = run(theirs, tokens, Exact(), chosen)
        exact = errors(run(ours, tokens, our_choices), truth)
        assert all(torch.equal(*choice) for choice in zip(chosen.made, our_choices.made, strict=True)), variant
        assert max(exact.values()) <= 1e5 * torch.finfo(torch.float64).eps, (variant, exact)
        for name, dtype in DTYPES.items():
            theirs, ours = both(tmp_path, dtype, seed)
            of_both = [errors(run(model, tokens, Choices(chosen.made)), truth) for model in (ours, theirs)]
            for kind, error in of_both[0].items():
                pairs.setdefault((name, kind), []).append((error, of_both[1][kind]))
            for kind in ("logits", "all"):
                assert of_both[0][kind] <= 2 * of_both[1][kind], (variant, name, kind)
    for (name, kind), errors_of_both in pairs.items():
        our_error, their_error = map(root_mean_square, zip(*errors_of_both, strict=True))
        over_all = root_mean_square(theirs for _, theirs in pairs[name, "all"])
        assert our_error <= 2 * max(their_error, over_all), (name, kind)
