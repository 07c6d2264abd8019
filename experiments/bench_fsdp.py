"""FSDP2 measured on CPU ranks: what it costs one rank, what each of several holds, how they load a folder.

    python -m experiments.bench_fsdp [--gib 2] [--runs 5] [--parts overhead memory load]

overhead: a training step of one rank whose parameters are cut against the plain model's, in turn, medians.
memory: bytes of parameters, gradients and moments on the fullest of 2 and of 4 ranks, against 1/N of the whole.
load: 2 ranks read a folder of so many GiB: bytes read in all, and most memory beside what a rank holds at the end.
Nothing else may run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dpo.adamw import AdamW
from dpo.config import Config, FsdpConfig
from dpo.distributed import Ranks, gather, join_ranks, leave_ranks, shard
from dpo.inputs import set_up_cpu
from kernels.bench import in_turn_s, memory_mib
from models.attention import Layout
from models.checkpoint import weight_files
from models.decoder import Decoder, empty_decoder, fill
from models.sharded import own_part
from models.tiny import write_tiny_model

TOKENS = 2048  # of a pack, by default
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
LARGE = {"vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8192}  # 97 MiB a layer
LAYER_MIB = 97
WORLDS = {"overhead": (1,), "memory": (2, 4), "load": (2,)}
MAX_OVERHEAD, MAX_SHARE = 1.03, 1.15


def build(folder: Path, ranks: Ranks, cut: bool) -> Decoder:
    """The folder's model, all of it trainable."""
    model = empty_decoder(folder, weight_dtype=torch.float32, compute_dtype=torch.float32).requires_grad_(True)
    if cut:
        shard(model, ranks, FsdpConfig())
    fill(model, folder, "cpu")
    return model


def backward(model: Decoder, tokens: int) -> None:
    """Gradients of one full pack."""
    tokens_T = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(0))
    rows_R, layout = torch.arange(tokens - 1), Layout(0, ((tokens, ()),))
    model(tokens_T, torch.arange(tokens), layout, rows_R, tokens_T[1:], 128).mean().backward()


def bound(value: float, most: float) -> str:
    """What a figure may be, and whether it is."""
    return f" (at most {most}{', MISSED' if value > most else ''})"


def overhead(folder: Path, ranks: Ranks, runs: int) -> str:
    """One rank, plain and cut, in turn."""

    def step(model: Decoder, optimizer: AdamW) -> None:
        backward(model, TOKENS)
        optimizer.step(1e-4)

    steps: dict[str, Callable[[], object]] = {}
    for name, cut in (("plain", False), ("one rank", True)):
        model = build(folder, ranks, cut)
        steps[name] = partial(step, model, AdamW(list(model.parameters()), Config(exp="bench").train))
    plain, one_rank = in_turn_s(steps, "cpu", runs).values()
    told = f"overhead: plain {plain:.3f} s a step, one rank {one_rank:.3f} s: {one_rank / plain:.3f}"
    return told + bound(one_rank / plain, MAX_OVERHEAD)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's storage behind tensors, each once."""
    storages = [own_part(tensor).values.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(folder: Path, ranks: Ranks, runs: int) -> str:
    """What the fullest rank holds when the second step's gradients are there."""
    model = build(folder, ranks, True)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, Config(exp="bench").train)
    for _ in range(2):
        optimizer.step(1e-4)  # of nothing at first
        backward(model, 64)
    sizes = {
        "parameters": held(parameters),
        "gradients": held(p.grad for p in parameters if p.grad is not None),
        "moments": held(optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")) // 2,
    }
    whole = sum(parameter.nbytes for parameter in parameters)  # of all ranks
    shares = {name: max(gather([size], ranks)) * ranks.world / whole for name, size in sizes.items()}
    told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    told = f"memory of {ranks.world} ranks, the fullest over 1/{ranks.world} of the whole: {told}"
    return told + bound(max(shares.values()), MAX_SHARE)


def load(folder: Path, ranks: Ranks, runs: int) -> str:
    """Bytes that the ranks read, and the most that one held beside its parameters."""
    model = empty_decoder(folder, weight_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    shard(model, ranks, FsdpConfig())
    before, begin = memory_mib()["VmRSS"], time.perf_counter()
    read = sum(gather([fill(model, folder, "cpu")], ranks))
    time_s = time.perf_counter() - begin
    extra = max(gather([(memory_mib()["VmHWM"] - before) * 2**20 - held(model.parameters())], ranks))
    largest = max(parameter.nbytes for parameter in model.parameters())
    stored = sum(parameter.nbytes for parameter in model.parameters())
    return (
        f"load: {sum(file.stat().st_size for file in weight_files(folder)) / 2**30:.2f} GiB on {ranks.world} ranks in "
        f"{time_s:.1f} s: bytes read over bytes of tensors {read / stored:.6f}{bound(read / stored, 1)}, most memory "
        f"beside them {extra / 2**20:.0f} MiB, over the largest tensor {extra / largest:.2f}{bound(extra / largest, 1)}"
    )


PARTS = {"overhead": overhead, "memory": memory, "load": load}


def main(arguments: Sequence[str]) -> int:
    """Starts the ranks of every part, one part after the other; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gib", type=float, default=2, help="size of the folder that is loaded")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    asked = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:
        set_up_cpu()
        ranks = join_ranks("cpu", 60.0)
        told = PARTS[asked.parts[0]](asked.folder, ranks, asked.runs)
        if ranks.first:
            print(told, flush=True)
        leave_ranks(ranks)
        return 0
    missed = False
    with tempfile.TemporaryDirectory() as root:
        for part in asked.parts:
            folder = Path(root) / part
            layers = {"num_hidden_layers": max(1, round(1024 * asked.gib / LAYER_MIB))}
            write_tiny_model(folder, family="qwen3", changes=LARGE | layers if part == "load" else WIDE, sharded=True)
            for world in WORLDS[part]:
                launch = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
                launch += ["-m", "experiments.bench_fsdp"]
                options = ["--parts", part, "--runs", str(asked.runs), "--folder", str(folder)]
                threads = str(max(1, (os.cpu_count() or 1) // world))
                environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
                command = [sys.executable, *launch, *options]
                told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(told, end="", flush=True)
                missed |= "MISSED" in told
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
