"""The decoder: a packed row of preference trees in, the log-prob of every scored token out.

Letters: `T` tokens of a pack, `R` scored tokens, `D` model width, `F` ffn width, `N` heads, `G` kv heads, `H` head
width, `V` vocabulary. Read next: kernels/linear_logprobs.py, models/lora.py.

Parameter names are the published ones (model.layers.0.self_attn.q_proj.weight), so that checkpoints stream in and out
without a conversion. Weights may be kept in fp32 (masters, when they train) while the arithmetic runs in
`compute_dtype`: each layer casts its own weight as it is used.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprobs
from models.attention import Layout, tree_attention
from models.checkpoint import load_weights
from models.config import ModelConfig, read_model_config
from models.rope import rope_tables, rotate


class Linear(nn.Module):
    """y = x W^T (+ b), in x's dtype; plus a low-rank update when models/lora.py has attached one."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, weight, bias)
        return y if self.lora is None else self.lora(x, y, weight, bias)


class Embedding(nn.Module):
    """One row of the weight per token."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back to x's dtype, then times the weight (Llama's order)."""

    def __init__(self, hidden: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden, dtype=dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = F.rms_norm(exact, (x.shape[-1],), eps=self.eps)
        return normal.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        bias, width = config.attention_bias, config.head_dim
        self.q_proj = Linear(config.hidden, config.heads * width, bias, dtype)
        self.k_proj = Linear(config.hidden, config.kv_heads * width, bias, dtype)
        self.v_proj = Linear(config.hidden, config.kv_heads * width, bias, dtype)
        self.o_proj = Linear(config.heads * width, config.hidden, bias, dtype)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        q_TNH, k_TGH, v_TGH = (
            project(x_TD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_TNH = tree_attention(rotate(q_TNH, cos, sin), rotate(k_TGH, cos, sin), v_TGH, layout)
        return self.o_proj(out_TNH.flatten(1))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden, config.ffn, config.mlp_bias, dtype)
        self.up_proj = Linear(config.hidden, config.ffn, config.mlp_bias, dtype)
        self.down_proj = Linear(config.ffn, config.hidden, config.mlp_bias, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps, dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, layout)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden, dtype)
        self.layers = nn.ModuleList(Layer(config, dtype) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps, dtype)


class Decoder(nn.Module):
    """A causal language model that answers one question: the log-prob of given tokens at given rows of a pack.

    `weight_dtype` is how weights are kept, `compute_dtype` how they are multiplied, `backend` that of linear_logprobs.
    Weights are uninitialised until `load_weights`. A tied model has no lm_head parameter: its head is the embedding.
    """

    def __init__(
        self, config: ModelConfig, *, weight_dtype: torch.dtype, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.backend = config, compute_dtype, backend
        self.checkpoint_activations = False
        self.model = Trunk(config, weight_dtype)
        self.lm_head = None if config.tied else Linear(config.hidden, config.vocab, False, weight_dtype)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
        """Final-normed hidden states [T, D] of a pack laid out as `layout` (see models/attention.py)."""
        x_TD = self.model.embed_tokens(tokens_T).to(self.compute_dtype)
        cos, sin = rope_tables(positions_T, self.config, self.compute_dtype)
        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_TD = checkpoint(layer, x_TD, cos, sin, layout, use_reentrant=False)
            else:
                x_TD = layer(x_TD, cos, sin, layout)
        return self.model.norm(x_TD)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        rows_R: Tensor,
        targets_R: Tensor,
        head_chunk: int,
    ) -> Tensor:
        """log p(targets_R[i] | everything that hidden row rows_R[i] sees), nats: fp32 [R] (fp64 in fp64)."""
        hidden_TD = self.hidden(tokens_T, positions_T, layout)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear_logprobs(hidden_TD[rows_R], head.weight, targets_R, chunk_tokens=head_chunk, backend=self.backend)


def load_decoder(
    folder: Path,
    *,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Decoder:
    """A decoder with a Hugging Face folder's weights, frozen (nothing requires a gradient), in eval mode."""
    config = read_model_config(folder)
    with torch.device(device):
        model = Decoder(config, weight_dtype=weight_dtype, compute_dtype=compute_dtype, backend=backend)
    load_weights(folder, dict(model.named_parameters()))
    return model.requires_grad_(False).eval()


def next_token_logits(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of one plain sequence, whole: for inspection and parity tests, never for training."""
    tokens_T = torch.tensor(tokens)
    hidden_TD = model.hidden(tokens_T, torch.arange(len(tokens)), Layout(0, ((len(tokens), ()),)))
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return F.linear(hidden_TD, head.weight.to(hidden_TD.dtype))
