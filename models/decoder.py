"""The decoder: a packed row of preference trees in, the log-prob of every scored token out.

Letters: `T` tokens of a pack, `R` scored tokens, `D` model width, `N` heads, `G` kv heads, `H` head width, `V`
vocabulary. Read next: models/parts.py, models/families/, kernels/linear_logprobs.py, models/lora.py.

Parameter names are the published ones (model.layers.0.self_attn.q_proj.weight).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprobs
from models.attention import Layout, Span, tree_attention
from models.checkpoint import load_weights
from models.config import ModelConfig
from models.families import FAMILIES, read_model_config
from models.padding import rows_to_run
from models.parts import Attend, Context, Embedding, Linear
from models.rope import rope_tables
from models.routing import Routing


def attend_trees(layout: Layout) -> Attend:
    """Attention of a pack laid out as `layout` (see models/attention.py), the same for every layer."""

    def attend(layer: int, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, span: Span, sinks_N: Tensor | None) -> Tensor:
        return tree_attention(q_TNH, k_TGH, v_TGH, layout, span, sinks_N)

    return attend


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden, dtype)
        family = FAMILIES[config.architecture]
        self.layers = nn.ModuleList(family.layer(config, index, dtype) for index in range(len(config.layers)))
        self.norm = family.norm(config.hidden, config.norm_eps, dtype)


class Decoder(nn.Module):
    """A causal language model that answers one question: the log-prob of given tokens at given rows of a pack.

    `weight_dtype` is how weights are kept, `compute_dtype` how they are multiplied, `backend` that of linear_logprobs.
    Weights are uninitialised until `fill`. A tied model has no lm_head parameter: its head is the embedding.
    """

    def __init__(
        self, config: ModelConfig, *, weight_dtype: torch.dtype, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.backend = config, compute_dtype, backend
        self.checkpoint_activations = False
        self.model = Trunk(config, weight_dtype)
        self.lm_head = None if config.tied else Linear(config.hidden, config.vocab, False, weight_dtype)

    @property
    def head(self) -> Embedding | Linear:
        """What makes logits of hidden states: lm_head, or the embedding of a tied model."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, routing: Routing | None = None) -> Tensor:
        """Final-normed hidden states [T, D]; `attend` says which token sees which, `routing` which are no padding."""
        x_TD = self.model.embed_tokens(tokens_T).to(self.compute_dtype)
        tables = rope_tables(positions_T, self.config, self.compute_dtype)
        context = Context(positions_T, *tables, attend, routing or Routing(len(tokens_T)))
        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_TD = checkpoint(layer, x_TD, context, use_reentrant=False)
            else:
                x_TD = layer(x_TD, context)
        return self.model.norm(x_TD)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        rows_R: Tensor,
        targets_R: Tensor,
        head_chunk: int,
        routing: Routing | None = None,
    ) -> Tensor:
        """log p(targets_R[i] | everything that hidden row rows_R[i] sees), nats: fp32 [R] (fp64 in fp64)."""
        if tokens_T.is_cpu:  # elsewhere one shape is compiled, or planned for
            rows = rows_to_run(self.model, layout.tokens, len(tokens_T), self.compute_dtype)
            tokens_T, positions_T = tokens_T[:rows], positions_T[:rows]
        hidden_TD = self.hidden(tokens_T, positions_T, attend_trees(layout), routing or Routing(layout.tokens))
        weight = self.head.weight
        logp_R = linear_logprobs(hidden_TD[rows_R], weight, targets_R, chunk_tokens=head_chunk, backend=self.backend)
        assert isinstance(logp_R, Tensor), "nothing beside them was asked for"
        return logp_R


def empty_decoder(
    folder: Path, *, weight_dtype: torch.dtype, compute_dtype: torch.dtype, backend: str = "auto", packed: bool = False
) -> Decoder:
    """A decoder of a Hugging Face folder's config in no memory (torch's meta device), frozen, in eval mode.

    `packed`: experts that are MXFP4 in the files stay so in memory.
    """
    config = read_model_config(folder)
    if config.experts is not None and not packed:
        config = replace(config, experts=replace(config.experts, packed=False))
    with torch.device("meta"):
        model = Decoder(config, weight_dtype=weight_dtype, compute_dtype=compute_dtype, backend=backend)
    return model.requires_grad_(False).eval()


def fill(model: Decoder, folder: Path, device: torch.device | str) -> int:
    """Give an empty decoder, which may be cut over ranks, its memory and the folder's weights; the bytes read.

    Low-rank updates get memory alone: models.lora.start_lora sets them.
    """
    model.to_empty(device=device)
    base = {name: parameter for name, parameter in model.named_parameters() if ".lora." not in name}
    return load_weights(folder, base, FAMILIES[model.config.architecture].layout)


def load_decoder(
    folder: Path, *, weight_dtype: torch.dtype, compute_dtype: torch.dtype, packed: bool = False
) -> Decoder:
    """empty_decoder, filled on the CPU."""
    model = empty_decoder(folder, weight_dtype=weight_dtype, compute_dtype=compute_dtype, packed=packed)
    fill(model, folder, "cpu")
    return model


def next_token_logits(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of one plain sequence, whole: for inspection and parity tests, never for training."""
    tokens_T = torch.tensor(tokens)
    hidden_TD = model.hidden(tokens_T, torch.arange(len(tokens)), attend_trees(Layout(0, ((len(tokens), ()),))))
    return F.linear(hidden_TD, model.head.weight.to(hidden_TD.dtype))
