"""Which code computes the log-probs: what can be had on a device, what is the faster, and how to say it in a line.

Letters: `T` rows, `D` model width, `V` vocabulary. Read next: kernels/tiles.py, kernels/linear_logprobs.py.

Three paths give the same numbers to fp32's accuracy:

    torch     plain torch, chunk by chunk: the CPU's, and whatever Triton cannot do
    chunked   the vendor's matrix product with fp32 output, our Triton row kernel, the vendor's product
    fused     our Triton kernels alone: no logits in memory, and a row's bits do not depend on the batch

Backend "bf16" gives others: logits and softmax rounded as most trainers round them, to measure what that costs.
"""

import importlib.metadata
import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

import torch

from kernels.tiles import ARCHS, TILES, tile_of

BACKENDS = ("auto", "torch", "triton", "bf16")
OLDEST_TRITON = (3, 6)  # the oldest that the kernels were compiled with
log = logging.getLogger("kernels")


class Rates(NamedTuple):
    """What a GPU is assumed to reach: bf16 matrix products of the vendor's library and of ours, and its memory."""

    vendor_tflops: float
    fused_tflops: float
    memory_tbps: float


# Assumed, not measured by us: the H100's are others' published figures (library products 800, pure Triton 370-470, on
# memory 3.0 of 3.35); the other GPUs' keep those shares of their peaks.
RATES = {
    "sm_80": Rates(250, 130, 1.8),
    "sm_90": Rates(800, 420, 3.0),
    "sm_100": Rates(1700, 800, 7.0),
    "gfx942": Rates(650, 400, 4.2),
}


def arch_of(device: torch.device) -> str:
    """The name of a device in the tile table: sm_80, gfx942, ...; "interpret" is Triton's interpreter, on the CPU.

    GPUs run what was tuned for the nearest older one of their kind: sm_86 and sm_89 as sm_80, sm_103 as sm_100. The
    small Blackwells (sm_120) have an Ampere's products and 99 KiB of shared memory, and run as sm_80 too.
    """
    if device.type == "cpu":
        return "interpret" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return "sm_80"
    return next(
        (name for name in ("sm_100", "sm_90", "sm_80") if int(name[3:]) <= 10 * major + minor), f"sm_{major}{minor}"
    )


def triton_version() -> str:
    """The installed Triton's: AMD's wheels and torch's nightly ones carry the package under other names."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module("triton").__version__)


@cache
def triton_missing() -> str | None:
    """Why this installation has no Triton to use, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    version = triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} (pip install -U triton)"
    return None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is missing to run the Triton kernels on a device in a dtype, in words, or None."""
    arch = arch_of(device)
    if arch == "cpu":
        return "the tensors are on the CPU, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    if (missing := triton_missing()) is not None:
        return missing
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if arch not in TILES:
        return f"no tile is shipped for {arch}: the Triton kernels need one of {', '.join(ARCHS)}, or a newer GPU"
    return None


def choose(arch: str, D: int) -> str:
    """The faster of chunked and fused at the assumed rates, whatever T and V: both take time in proportion to TV.

    Either makes three products of 2TVD FLOP: the head counts as one that trains, since a reference, which never does,
    is computed as its policy is. The chunked path's row kernels read fp32 logits twice and write bf16 probabilities, 10
    bytes a logit that no product hides.
    """
    rates = RATES[arch]
    fused, chunked = 6 * D / rates.fused_tflops, 6 * D / rates.vendor_tflops + 10 / rates.memory_tbps
    return "fused" if fused < chunked else "chunked"


@cache
def _say(line: str) -> None:
    log.warning(line)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, D: int = 0) -> str:
    """The path of linear_logprobs: "torch", "chunked" or "fused"; the same for a frozen head and one that trains.

    Other kernels ask only whether it is "torch". "triton" is the fused kernels, or in fp32 the row kernel between
    library products; ValueError says what is missing. "auto" on a GPU that Triton cannot serve says so once, and why.
    "bf16" is the torch path to all but the log-probs.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    if backend in ("torch", "bf16") or (backend == "auto" and device.type in ("cpu", "meta")):
        return "torch"
    missing, arch = why_not_triton(device, dtype), arch_of(device)
    tiled = dtype != torch.float32 or arch == "interpret"  # fp32 has no matrix units to feed, and its tiles spill
    if backend == "triton":
        if missing is not None:
            raise ValueError(f"backend='triton' cannot be had: {missing}")
        return "fused" if tiled else "chunked"
    if missing is not None:
        _say(f"kernels: the torch path is used, because {missing}")
        return "torch"
    return choose(arch, D) if tiled else "chunked"


def describe(backend: str, device: torch.device, dtype: torch.dtype, D: int, trainable: bool) -> dict[str, str]:
    """What `resolve` picks, for a run's record: the path, why it is torch's, or the tile of each kernel in use."""
    path, arch = resolve(backend, device, dtype, D), arch_of(device)
    said = {"asked": backend, "path": path, "arch": arch}
    if backend in ("torch", "bf16"):
        return said | {"path": backend, "why": "asked for"}
    if path == "torch":
        return said | {"why": why_not_triton(device, dtype) or "on a CPU auto takes torch"}
    kernels = ["row_forward", "row_backward"] if path == "chunked" else ["linear_forward", "linear_hidden_grad"]
    kernels.append("combine_parts")
    if trainable:
        kernels += ["linear_weight_grad"] * (path == "fused") + ["linear_target_rows"]
    return said | {"triton": triton_version()} | _tiles(arch, kernels)


def describe_pairs(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The same of preference_loss, for losses that it has."""
    path, arch = resolve(backend, device, dtype), arch_of(device)
    said = {"asked": backend, "path": "torch" if path == "torch" else "fused", "arch": arch}
    return said | ({} if path == "torch" else _tiles(arch, ["pair_forward", "pair_backward"]))


def _tiles(arch: str, kernels: list[str]) -> dict[str, str]:
    return {k: " ".join(f"{key}={value}" for key, value in tile_of(arch, k).items()) for k in kernels}
