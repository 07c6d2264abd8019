"""What a model folder's config.json says, in our words: one frozen ModelConfig for every family.

Letters: V vocab, D hidden, N heads, G kv heads, H head dim, F ffn.
Both spellings are read: rope_theta + rope_scaling (transformers < 5) and rope_parameters (>= 5); torch_dtype and dtype.
What would change the arithmetic and is not built is refused, never dropped. A new family is one function in FAMILIES.
Read next: models/decoder.py, which builds the module from this.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from models.errors import UserError
from models.files import read_json_object

DTYPES = ("bfloat16", "float16", "float32", "float64")
Fields = Mapping[str, object]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float  # equal to low_freq_factor = no ramp: a reader must not divide by the difference
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape and constants."""

    vocab: int  # V
    hidden: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # G, divides N
    head_dim: int  # H, even; N * H need not be D
    ffn: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool  # lm_head is embed_tokens: the module then has no lm_head.weight of its own
    attention_bias: bool  # on q, k, v and o
    mlp_bias: bool  # on gate, up and down
    dtype: str  # of the stored weights, one of DTYPES


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face model folder; every fault is a UserError that names the key."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there; a Hugging Face model folder has one")
    fields = read_json_object(path)
    named = fields.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise UserError(f"{path}: architectures = {named!r} is not supported; supported: {', '.join(FAMILIES)}")
    if fields.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config: quantised weights are not supported; use a bf16 or fp32 copy")
    return FAMILIES[named[0]](fields, path)


def _read_llama(fields: Fields, path: Path) -> ModelConfig:
    """LlamaForCausalLM (Llama 2 and 3, SmolLM2). Absent keys mean the published class's defaults."""
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act = {fields['hidden_act']!r} is not supported; supported: 'silu'")
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    hidden, heads = _positive(fields, "hidden_size", path, int), _positive(fields, "num_attention_heads", path, int)
    kv_heads = _positive(fields, "num_key_value_heads", path, int, default=heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
    rope_theta, rope_scaling = _read_rope(fields, path)
    return ModelConfig(
        vocab=_positive(fields, "vocab_size", path, int),
        hidden=hidden,
        layers=_positive(fields, "num_hidden_layers", path, int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(fields, "head_dim", path, int, default=hidden // heads),
        ffn=_positive(fields, "intermediate_size", path, int),
        norm_eps=_positive(fields, "rms_norm_eps", path, float, default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=_flag(fields, "tie_word_embeddings", path),
        attention_bias=_flag(fields, "attention_bias", path),
        mlp_bias=_flag(fields, "mlp_bias", path),
        dtype=str(dtype),
    )


FAMILIES: dict[str, Callable[[Fields, Path], ModelConfig]] = {"LlamaForCausalLM": _read_llama}


def _read_rope(fields: Fields, path: Path) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from either spelling."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling = {rope!r} must be an object or null")
    theta = _positive({**fields, **rope}, "rope_theta", path, float, default=10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
    return theta, RopeScaling(
        factor=_positive(rope, "factor", path, float),
        low_freq_factor=_positive(rope, "low_freq_factor", path, float),
        high_freq_factor=_positive(rope, "high_freq_factor", path, float),
        original_max_position=_positive(rope, "original_max_position_embeddings", path, int),
    )


def _positive(fields: Fields, key: str, path: Path, kind: type[Number], default: Number | None = None) -> Number:
    """The key's value; absent and null both mean the default, and no default means that the key is required."""
    value = default if fields.get(key) is None else fields[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
        wanted = "a whole number of at least 1" if kind is int else "a number above 0"
        raise UserError(f"{path}: {key} = {value!r} must be {wanted}")
    return kind(value)


def _flag(fields: Fields, key: str, path: Path) -> bool:
    value = fields.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} = {value!r} must be true or false")
    return value
