"""What a model folder's config.json says, in our words: one frozen ModelConfig for every family.

Letters: V vocab, D hidden, N heads, G kv heads, H head dim, F ffn, E experts, K experts per token.
Both spellings are read: rope_theta + rope_scaling (transformers < 5) and rope_parameters (>= 5); torch_dtype and dtype.
What would change the arithmetic and is not built is refused, never dropped.
Read next: models/families/, one file for each family.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from models.attention import FULL, Span
from models.errors import UserError

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Fields that change the arithmetic of some model or other and are read by none of ours, with the value that does not.
NEUTRAL = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logit_scale": 1.0,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "auto_map": None,  # code of the folder's own
}
ROPE_KEYS = {  # of each type, beside theta; any other key is refused
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "truncate"),
}
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
class Yarn:
    """YaRN (Peng et al. 2023): a ramp over the frequencies' index, and larger tables (so larger attention logits)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    truncate: bool  # the ramp's ends are rounded outwards to whole indices


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    span: Span = FULL
    rotary: bool = True
    sparse: bool = False  # experts instead of one dense MLP


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a sparse layer."""

    count: int  # E
    per_token: int  # K
    ffn: int  # F of one expert
    renormalise: bool = True  # the chosen experts' weights sum to 1 (Qwen3-MoE's norm_topk_prob)
    limit: float = math.inf  # gpt-oss: gate and up are clamped to it
    packed: bool = False  # the weights are MXFP4, in the files and, unless load_decoder unpacks them, in memory


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape and constants."""

    architecture: str  # a key of models.families.FAMILIES
    vocab: int  # V
    hidden: int  # D
    layers: tuple[LayerKind, ...]
    heads: int  # N
    kv_heads: int  # G, divides N
    head_dim: int  # H, even; N * H need not be D
    ffn: int  # F of a dense MLP
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | Yarn | None
    tied: bool  # lm_head is embed_tokens: the module then has no lm_head.weight of its own
    qkv_bias: bool
    output_bias: bool  # of attention's o_proj
    mlp_bias: bool  # on gate, up and down
    dtype: str  # of the stored weights, one of DTYPES
    experts: ExpertsConfig | None = None
    qk_norm: bool = False
    temperature: tuple[float, float] | None = None  # Llama 4's (floor_scale, attn_scale), in layers without rope


def decoder_config(
    architecture: str,
    fields: Fields,
    path: Path,
    *,
    layers: tuple[LayerKind, ...] | None = None,
    qkv_bias: bool = False,
    mlp_bias: bool = False,
    experts: ExpertsConfig | None = None,
    qk_norm: bool = False,
    temperature: tuple[float, float] | None = None,
    ffn_key: str = "intermediate_size",
    defaults: Fields = {},  # noqa: B006 (never written)
) -> ModelConfig:
    """What every family's config.json says in the same words; `defaults` are the published class's for absent keys.

    `qkv_bias`: q, k and v have one whatever attention_bias says, which otherwise speaks for them as for o_proj.
    """
    fields = {key: value for key, value in {**defaults, **fields}.items() if value is not None}
    for key, only in NEUTRAL.items():
        supported(fields, key, path, only)
    if experts is not None and experts.per_token > experts.count:
        raise UserError(f"{path}: num_experts_per_tok = {experts.per_token} of only {experts.count} experts")
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    hidden, heads = positive(fields, "hidden_size", path, int), positive(fields, "num_attention_heads", path, int)
    kv_heads = positive(fields, "num_key_value_heads", path, int, default=heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
    head_dim = positive(fields, "head_dim", path, int, default=max(hidden // heads, 1))
    if head_dim % 2:
        raise UserError(f"{path}: head_dim = {head_dim} must be even: rotary embedding turns pairs")
    bias = flag(fields, "attention_bias", path)
    rope_theta, rope_scaling = _read_rope(fields, path, positive(defaults, "rope_theta", path, float, 10000.0))
    return ModelConfig(
        architecture=architecture,
        vocab=positive(fields, "vocab_size", path, int),
        hidden=hidden,
        layers=(LayerKind(),) * positive(fields, "num_hidden_layers", path, int) if layers is None else layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=positive(fields, ffn_key, path, int),
        norm_eps=positive(fields, "rms_norm_eps", path, float, default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=flag(fields, "tie_word_embeddings", path),
        qkv_bias=qkv_bias or bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        dtype=str(dtype),
        experts=experts,
        qk_norm=qk_norm,
        temperature=temperature,
    )


def _read_rope(fields: Fields, path: Path, default_theta: float) -> tuple[float, RopeScaling | Yarn | None]:
    """(theta, scaling), from either spelling."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling = {rope!r} must be an object or null")
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = positive({**fields, **rope}, "rope_theta", path, float, default_theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported: {', '.join(map(repr, ROPE_KEYS))}")
    supported(rope, "partial_rotary_factor", path, 1.0)
    for key in rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind]}:
        supported(rope, key, path)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, RopeScaling(
            factor=positive(rope, "factor", path, float),
            low_freq_factor=positive(rope, "low_freq_factor", path, float),
            high_freq_factor=positive(rope, "high_freq_factor", path, float),
            original_max_position=positive(rope, "original_max_position_embeddings", path, int),
        )
    return theta, Yarn(
        factor=positive(rope, "factor", path, float),
        beta_fast=positive(rope, "beta_fast", path, float, default=32.0),
        beta_slow=positive(rope, "beta_slow", path, float, default=1.0),
        original_max_position=positive(rope, "original_max_position_embeddings", path, int),
        truncate=flag(rope, "truncate", path, default=True),
    )


def positive(fields: Fields, key: str, path: Path, kind: type[Number], default: Number | None = None) -> Number:
    """The key's value; absent and null both mean the default, and no default means that the key is required."""
    value = default if fields.get(key) is None else fields[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
        wanted = "a whole number of at least 1" if kind is int else "a number above 0"
        raise UserError(f"{path}: {key} = {value!r} must be {wanted}")
    return kind(value)


def flag(fields: Fields, key: str, path: Path, default: bool = False) -> bool:
    """The key's truth value; absent and null both mean the default."""
    value = default if fields.get(key) is None else fields[key]
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} = {value!r} must be true or false")
    return value


def layer_types(fields: Fields, path: Path, default: Sequence[str], allowed: Collection[str]) -> Sequence[str]:
    """The kind of attention of each layer, one of `allowed`; as many as `default` has."""
    kinds = fields.get("layer_types") or default
    if not isinstance(kinds, Sequence) or len(kinds) != len(default) or not all(kind in allowed for kind in kinds):
        wanted = f"must name one of {', '.join(allowed)} for each of {len(default)} layers"
        raise UserError(f"{path}: layer_types = {kinds!r} is not supported; it {wanted}")
    return kinds


def layer_numbers(fields: Fields, key: str, path: Path, layers: int, default: Sequence[int] = ()) -> Sequence[int]:
    """A list of layers, counted from 0; absent and null both mean the default."""
    numbers = default if fields.get(key) is None else fields[key]
    if not isinstance(numbers, Sequence) or not all(number in range(layers) for number in numbers):
        raise UserError(f"{path}: {key} = {numbers!r} must be a list of numbers below {layers}, the number of layers")
    return numbers


def supported(fields: Fields, key: str, path: Path, *values: object) -> None:
    """Refuse a key whose value is none of `values`; an absent key and null are fine."""
    if fields.get(key) is not None and fields[key] not in values:
        allowed = ", ".join(repr(value) for value in values if value is not None) or "leave it out"
        raise UserError(f"{path}: {key} = {fields[key]!r} is not supported; supported: {allowed}")
