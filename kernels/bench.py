"""The log-prob path timed on this machine, with its correctness in the same run, against torch and what is installed.

    python -m kernels.bench [--json PATH] [--small]

Letters: `T` rows, `D` model width, `V` vocabulary. Read next: kernels/roofline.py, whose figures this checks.

On a CUDA device: every path of linear_logprobs, plain torch, Liger and TRL where they are installed, at the heads of
kernels/roofline.py, frozen and trained. On a CPU: the torch path alone, against fp32 logits in turn, and the memory it
takes beyond its inputs, as the rise of a fresh process's high-water mark. All times are medians of runs in turn.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kernels import linear_logprobs, preference_loss, selective_log_softmax
from kernels.linear_logprobs import reference_linear_logprobs
from kernels.roofline import HEADS, ROWS
from kernels.widened import multiplies_bf16

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_TD, weight_VD, targets_T -> log p of the targets [T]
Result = dict[str, str | float | bool | None]  # one line of the JSON
FP32_GRADE = 5e-6  # nats rms
LOGIT_DEVIATION = 1.5  # of the random inputs; the errors of bf16 logits are in proportion to it


def inputs(T: int, D: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows of unit deviation, a weight, targets; seeded, made in place so that no larger copy ever existed."""
    random = torch.Generator(device).manual_seed(0)
    hidden_TD = torch.empty(T, D, dtype=dtype, device=device).normal_(generator=random)
    weight_VD = torch.empty(V, D, dtype=dtype, device=device).normal_(generator=random).mul_(LOGIT_DEVIATION / D**0.5)
    return hidden_TD, weight_VD, torch.randint(V, (T,), generator=random, device=device)


# --- what is compared ---------------------------------------------------------------------------------------------


def plain_torch(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """All logits at once in the inputs' dtype, softmax in fp32."""
    return (hidden_TD @ weight_VD.T).float().log_softmax(-1).gather(1, targets_T[:, None])[:, 0]


def fp32_logits(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The same from fp32 copies of the inputs."""
    return plain_torch(hidden_TD.float(), weight_VD.float(), targets_T)


def liger(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy, unreduced."""
    peer = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    return -peer(reduction="none")(weight_VD, hidden_TD, targets_T)


def trl(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """TRL's selective log-softmax on all logits at once."""
    return importlib.import_module("trl.trainer.utils").selective_log_softmax(hidden_TD @ weight_VD.T, targets_T)


def ours(backend: str) -> Loss:
    """linear_logprobs by a backend."""
    return cast(Loss, partial(linear_logprobs, backend=backend))


PEERS = {"liger_kernel": liger, "trl": trl}


# --- measuring ----------------------------------------------------------------------------------------------------


def timed_s(run: Callable[[], object], device: str) -> float:
    """Seconds of one run, the GPU's work included."""
    wait = torch.get_device_module(device).synchronize  # a CPU's returns at once
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def in_turn_s(runs: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each run over `rounds` rounds, one warming round before them."""
    times = [{name: timed_s(run, device) for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(one[name] for one in times) for name in runs}


def rms_error(loss: Loss, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> float:
    """Of the log-probs of at most 256 rows against fp64 of the same inputs, in nats."""
    hidden_TD, targets_T = hidden_TD[:256], targets_T[:256]
    truth_T = reference_linear_logprobs(hidden_TD, weight_VD, targets_T)
    with torch.no_grad():
        return float((loss(hidden_TD, weight_VD, targets_T).double() - truth_T).square().mean().sqrt())


def train_step(loss: Loss, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> None:
    """Forward and backward of the sum; gradients are dropped."""
    loss(hidden_TD, weight_VD, targets_T).sum().backward()
    hidden_TD.grad = weight_VD.grad = None


def bench_rows(rounds: int, device: str, backend: str, T: int, V: int) -> list[Result]:
    """selective_log_softmax on bf16 logits and preference_loss on completions of 64 tokens, against plain torch's."""
    random = torch.Generator(device).manual_seed(0)
    logits_TV = torch.empty(T, V, dtype=torch.bfloat16, device=device).normal_(generator=random).requires_grad_()
    index_T = torch.randint(V, (T,), generator=random, device=device)
    policy_T = torch.empty(T * 64, device=device).normal_(generator=random).requires_grad_()
    cu_seqlens = torch.arange(T + 1, device=device) * 64

    def plain_pairs() -> Tensor:
        sums_S = policy_T.view(-1, 64).sum(1)
        return -torch.nn.functional.logsigmoid(0.1 * (sums_S[::2] - sums_S[1::2]))

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "selective_log_softmax": (
            lambda: cast(Tensor, selective_log_softmax(logits_TV, index_T, backend=backend)),
            lambda: logits_TV.float().log_softmax(-1).gather(1, index_T[:, None])[:, 0],
        ),
        "preference_loss": (lambda: preference_loss(policy_T, cu_seqlens, backend=backend).losses_B, plain_pairs),
    }
    found: list[Result] = []
    for name, (run, plain) in cases.items():
        steps = {"ms": lambda: run().sum().backward(), "torch_ms": lambda: plain().sum().backward()}  # noqa: B023
        times = {key: seconds * 1e3 for key, seconds in in_turn_s(steps, device, rounds).items()}
        found.append({"kernel": name, **times, "largest_difference": float((run() - plain()).detach().abs().max())})
    return found


def bench_gpu(rounds: int) -> list[Result]:
    """Every path, plain torch, the installed peers, at each head, frozen and trained: ms, MiB over the inputs, rms."""
    found: list[Result] = []
    losses = {f"ours, {name}": ours(name) for name in ("auto", "triton", "torch")} | {"torch": plain_torch}
    losses |= {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name) is not None}
    for head, (D, V) in HEADS.items():
        hidden_TD, weight_VD, targets_T = inputs(ROWS, D, V, torch.bfloat16, "cuda")
        hidden_TD.requires_grad_()
        for trained in (False, True):
            weight_VD.requires_grad_(trained)
            for name, loss in losses.items():
                run = partial(train_step, loss, hidden_TD, weight_VD, targets_T)
                line: Result = {"head": head, "trained": trained, "path": name, "ms": None}
                try:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    line["ms"] = in_turn_s({name: run}, "cuda", rounds)[name] * 1e3
                    line["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                    line["rms_nats"] = rms_error(loss, hidden_TD.detach(), weight_VD.detach(), targets_T)
                except (torch.OutOfMemoryError, ValueError) as reason:
                    line["failed"] = str(reason).splitlines()[0]
                found.append(line)
    return found


def memory_mib() -> dict[str, float]:
    """This process's resident memory (VmRSS) and its high-water mark (VmHWM), as Linux tells them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


def peak_rise_mib(T: int, D: int, V: int, dtype: torch.dtype) -> float:
    """How far a forward and backward with a frozen head raises this process's memory, at its highest."""
    warm, measured = inputs(8, 16, 32, dtype, "cpu"), inputs(T, D, V, dtype, "cpu")
    train_step(ours("torch"), warm[0].requires_grad_(), *warm[1:])
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = memory_mib()["VmRSS"]
    train_step(ours("torch"), measured[0].requires_grad_(), *measured[1:])
    return memory_mib()["VmHWM"] - before


def bench_cpu(rounds: int, small: bool) -> list[Result]:
    """The torch path against fp32 logits in turn, in bf16 and fp32, and its memory in a process of its own."""
    T, D, V = (32, 64, 1000) if small else (512, 576, 49152)
    found: list[Result] = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        tensors = inputs(T, D, V, dtype, "cpu")
        runs = {"ours": ours("torch"), "fp32 logits": fp32_logits}
        with torch.no_grad():
            times = in_turn_s({key: partial(run, *tensors) for key, run in runs.items()}, "cpu", rounds)
        command = [sys.executable, "-m", "kernels.bench", "--memory", name, *["--small"] * small]
        rise = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append({
            "dtype": name, "T": T, "D": D, "V": V, "ms": times["ours"] * 1e3, "fp32_ms": times["fp32 logits"] * 1e3,
            "ratio": times["ours"] / times["fp32 logits"], "rms_nats": rms_error(ours("torch"), *tensors),
            "bf16_rms_nats": rms_error(plain_torch, *tensors), "peak_rise_mib": float(rise),
        })  # fmt: skip
    return found


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status: 1 where log-probs are not of fp32's grade."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each, in turn (%(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it works, not how fast it is")
    parser.add_argument("--memory", choices=("bfloat16", "float32"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.memory:
        shape = (64, 64, 1000) if asked.small else (4096, 576, 49152)
        print(peak_rise_mib(*shape, {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked.memory]))
        return 0
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads, {capability()}"
    print(f"torch {torch.__version__} on {device}; medians of {asked.rounds} runs in turn")
    if not gpu:
        print("no GPU: the torch path is timed, the Triton kernels are not")
    found = bench_gpu(asked.rounds) if gpu else bench_cpu(asked.rounds, asked.small)
    rows, backend = (ROWS, "triton") if gpu else (64, "torch")
    found += bench_rows(asked.rounds, "cuda" if gpu else "cpu", backend, rows, 1000 if asked.small else 128256)
    for line in found:
        print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    if asked.json:
        asked.json.write_text(json.dumps({"torch": torch.__version__, "device": device, "results": found}, indent=1))
    mine = [line for line in found if "rms_nats" in line and "ours" in str(line.get("path", "ours"))]
    errors = [float(str(line["rms_nats"])) for line in mine]
    good = bool(errors) and all(error <= FP32_GRADE for error in errors)  # max passes over a NaN
    told = f"log-probs within {max(errors):.1e} nats rms of fp64" if good else f"nats rms of fp64: {errors}"
    print(f"{'ok' if good else 'FAULT'}: {told} (<= {FP32_GRADE:g})")
    return 0 if good else 1


def capability() -> str:
    """What the CPU's products are made of, as far as the torch path cares."""
    native = "units for bf16" if multiplies_bf16() else "no units for bf16"
    return f"{torch.backends.cpu.get_cpu_capability()}, {native}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
