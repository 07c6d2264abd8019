"""Where a parameter's values stand in a model folder: published names, shapes and orders, a function for each family.

Letters: `E` experts, `F` ffn width of an expert, `D` model width. In memory all experts are [E, out, in]: gate_up_proj
[E, 2F, D], down_proj [E, D, F]. Which layout a file has is told by names alone, the same for both tensors of a layer,
and then every shape is checked: since [2F, D] and [D, F] are never both square, experts stored the other way round
cannot pass. Read next: models/checkpoint.py.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from kernels import dequantise

# Stored and not read: a tied head's copy, old files' rotary tables, the part of Llama 4 that sees.
IGNORED = re.compile(r"(\w+\.)?lm_head\.weight|.*rotary_emb\.inv_freq|(vision_model|multi_modal_projector)\..*")


def turned(part: Tensor) -> Tensor:
    """[.., in, out] as [.., out, in], and back."""
    return part.mT


class Piece(NamedTuple):
    """A part of a parameter, and the stored tensors that it is made of."""

    stored: dict[str, tuple[int, ...]]  # name: shape
    place: tuple[int | slice, ...] = ()  # of the parameter; () is all of it
    decode: Callable[..., Tensor] = lambda part: part  # from the same part of each stored tensor

    def where(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of each stored tensor that holds a part of this one; MXFP4 is not divided along its inputs."""
        if self.decode is turned:
            return (*index[:-2], index[-1], index[-2])
        return index[:-1] if self.decode is dequantise else index


# (parameter's name, its shape, names in the files) -> what it is made of. Names decide between a family's layouts;
# without any it is the one that is written, in which `decode` is its own inverse.
Layout = Callable[[str, Sequence[int], Collection[str]], list[Piece]]


def plain(name: str, shape: Sequence[int], stored: Collection[str] = ()) -> list[Piece]:
    """One stored tensor of the same name and shape."""
    return [Piece({name: tuple(shape)})]


def _has(stored: Collection[str], experts: str, ending: str = "") -> bool:
    return any(f"{experts}.{kind}{ending}" in stored for kind in ("gate_up_proj", "down_proj"))


def qwen3_moe(name: str, shape: Sequence[int], stored: Collection[str]) -> list[Piece]:
    """A tensor for each expert's gate, up and down; or fused (transformers with save_original_format=False)."""
    experts, _, kind = name.rpartition(".")
    if not experts.endswith(".experts") or _has(stored, experts):
        return plain(name, shape)
    count, outputs, inputs = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    rows = outputs // len(parts)
    return [
        Piece({f"{experts}.{expert}.{part}.weight": (rows, inputs)}, (expert, slice(i * rows, (i + 1) * rows)))
        for expert in range(count)
        for i, part in enumerate(parts)
    ]


def gpt_oss(name: str, shape: Sequence[int], stored: Collection[str]) -> list[Piece]:
    """MXFP4 [E, out, in / 32, 16] and scales, which may stay packed; or bf16, [E, in, out]."""
    experts, _, kind = name.rpartition(".")
    if kind not in ("gate_up_proj", "down_proj") or not experts.endswith(".experts"):
        return plain(name, shape)
    count, outputs, inputs = shape
    if _has(stored, experts, "_blocks"):
        groups = (count, outputs, inputs // 32)
        return [Piece({f"{name}_blocks": (*groups, 16), f"{name}_scales": groups}, decode=dequantise)]
    return [Piece({name: (count, inputs, outputs)}, decode=turned)]


def llama4(name: str, shape: Sequence[int], stored: Collection[str]) -> list[Piece]:
    """Experts are [E, in, out]; all names begin with language_model. where the folder has pictures too."""
    whole = f"language_model.{name}" if "language_model.model.embed_tokens.weight" in stored else name
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return plain(whole, shape)
    count, outputs, inputs = shape
    return [Piece({whole: (count, inputs, outputs)}, decode=turned)]
