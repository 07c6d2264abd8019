"""One training step: the share of the machine's matrix rate that it reaches, and where its time goes.

    python -m experiments.bench_step exp=quickstart [key=value ...]        # STEPS=5 ROUNDS=3 in the environment

FLOP are counted by hand, of what is needed alone: a token of the packs that is no padding, a pair of tokens of which
one sees the other, a scored token times the vocabulary. Forward 2 a weight and token, backward 2 for the input's
gradient and 2 for the weight's where it is trained; attention 4 a visible pair and head width forward, 8 backward.
What is computed again (attention's scores in its backward) or for nothing (padding, the unseen half of a square) does
not count. The rate is that of one square product, measured before and after, in the same dtype and threads. The time by
part is of torch.profiler, of one step more. Read next: dpo/step.py.
"""

import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dpo import step
from dpo.adamw import AdamW
from dpo.config import Config
from dpo.distributed import clip_gradients, join_ranks
from dpo.inputs import Inputs, read_inputs, set_up_cpu
from dpo.packing import Pack, pack_share
from dpo.policy import load_policy
from dpo.settings import load_config
from kernels.bench import capability, in_turn_s, timed_s
from models.attention import runs
from models.decoder import Decoder
from models.parts import Linear

PARTS = {  # what a profiled event, or one around it, is called; the first that fits
    "head": ("LinearLogprobs",),
    "optimizer": ("part: optimizer", "part: clip"),
    "loss": ("part: loss",),
    "embedding": ("aten::embedding", "EmbeddingBackward"),
    "gradients added": ("AccumulateGrad",),
    "attention": ("ByRuns",),
    "linear layers": ("aten::mm", "aten::addmm", "aten::linear", "MmBackward", "AddmmBackward"),
}


def matrix_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of a square product, the median of some."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / in_turn_s({"product": lambda: a @ b}, "cpu", rounds)["product"]


def useful_flop(packs: Sequence[Pack], policy: Decoder, rank: int) -> dict[str, float]:
    """FLOP that forward and backward of these packs need, by part; `rank` of the adapters, 0: all weights train."""
    linears = [module for module in policy.model.modules() if isinstance(module, Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    adapters = sum(rank * sum(linear.weight.shape) for linear in linears)
    pairs, tokens = 0, sum(pack.layout.tokens for pack in packs)
    for pack in packs:
        for run in runs(pack.layout):
            pairs += run.tokens * run.before + run.tokens * (run.tokens + 1) // 2
    config, scored = policy.config, sum(len(pack.rows_R) for pack in packs)
    head = 2.0 * scored * config.hidden * config.vocab
    return {
        "linear layers": (4.0 * weights + 6.0 * adapters if rank else 6.0 * weights) * tokens,
        "attention": 12.0 * pairs * len(config.layers) * config.heads * config.head_dim,
        "head": head * (2 if rank else 3),
    }


def time_by_part(run: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of a run by part, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        around, names = event, ""
        while around is not None:
            names += around.name + " "
            around = around.cpu_parent
        part = next((part for part, marks in PARTS.items() if any(mark in names for mark in marks)), "other")
        times[part]["autograd::engine" in names] += event.self_cpu_time_total / 1e6
    return times


def labelled(label: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function under a name that the profiler sees."""

    def run(*given: object, **named: object) -> object:
        with record_function(f"part: {label}"):
            return function(*given, **named)

    return run


def bench(config: Config, inputs: Inputs, steps: int, rounds: int) -> str:
    """The table, as markdown."""
    ranks = join_ranks("cpu", config.run.hang_s)
    policy = load_policy(config, inputs.model_folder, inputs.dtype, ranks)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, config.train)
    plan = step.plan_steps(inputs.train_trees.column("pairs"), config)[: steps + 1]

    def run(steps: Sequence[Sequence[int]]) -> None:
        for members in steps:
            trees = [inputs.train_trees[i] for i in members]
            zeros = [torch.zeros(len(tree.completions), dtype=torch.float64) for tree in trees]
            step.accumulate_gradients(policy, trees, zeros, config, ranks)
            with record_function("part: clip"):
                clip_gradients(parameters, config.train.clip_norm, ranks)
            with record_function("part: optimizer"):
                optimizer.step(1e-9)

    run(plan[:1])  # warms up
    rates = [matrix_rate(inputs.dtype)]
    times = [timed_s(lambda: run(plan[1:]), "cpu") for _ in range(rounds)]
    rates.append(matrix_rate(inputs.dtype))
    chosen = [[inputs.train_trees[i] for i in members] for members in plan[1:]]
    packs = [p for t in chosen for batch in pack_share(t, config.pack.tokens, 0, 1) for p in batch.packs]
    flop, time_s, rate = useful_flop(packs, policy, config.lora.rank), statistics.median(times), statistics.mean(rates)
    share = sum(flop.values()) / time_s / rate
    step.pair_losses, step.pair_logps = labelled("loss", step.pair_losses), labelled("loss", step.pair_logps)  # type: ignore[assignment]
    step.reward_metrics = labelled("loss", step.reward_metrics)  # type: ignore[assignment]
    parts = time_by_part(lambda: run(plan[1:]))
    profiled_s = sum(map(sum, parts.values()))
    useful = sum(pack.layout.tokens for pack in packs) / (len(packs) * config.pack.tokens)
    how = f"LoRA r{config.lora.rank}" if config.lora.rank else "all weights"
    lines = [
        f"{how}, {inputs.dtype}, {torch.get_num_threads()} threads, {capability()}: {time_s / steps:.3f} s a step "
        f"({steps} steps, median of {rounds} rounds), **{share:.1%}** of the matrix rate of {rate / 1e12:.3f} TFLOP/s "
        f"({rates[0] / 1e12:.3f} before, {rates[1] / 1e12:.3f} after); {useful:.1%} of the packs are no padding.\n",
        "| part | forward s | backward s | share of the time | useful GFLOP | of the rate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part in (*PARTS, "other"):
        forward, backward = (seconds * time_s / profiled_s / steps for seconds in parts[part])
        done = flop.get(part, 0.0) / steps
        worth = f"{done / 1e9:,.1f} | {done / (forward + backward) / rate:.0%}" if done else " | "
        lines.append(
            f"| {part} | {forward:.3f} | {backward:.3f} | {(forward + backward) / time_s * steps:.1%} | {worth} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    set_up_cpu()
    config = load_config(sys.argv[1:])
    inputs = read_inputs(config, "cpu")
    print(bench(config, inputs, int(os.environ.get("STEPS", "5")), int(os.environ.get("ROUNDS", "3"))))


if __name__ == "__main__":
    main()
