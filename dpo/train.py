"""python -m dpo.train exp=NAME [key=value ...]: from an experiment file to a judge, its figures and a report.

    rows -> split -> trees -> reference store -> train loop -> judge -> results.json -> report

Letters: `S` completions, `B` pairs. The path is `run`, the training loop is `train`. Read next: dpo/losses.py.
"""

import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpo.checkpoint import (
    export,
    last_checkpoint,
    load_checkpoint,
    load_weights_into,
    save_checkpoint,
    save_weights,
    trained_parameters,
)
from dpo.config import Config, TrainConfig, help_text, load_config
from dpo.distributed import Ranks, broadcast_first, clip_gradients, gather, join_ranks, leave_ranks, shard, total
from dpo.inputs import Inputs, pick_device, read_inputs
from dpo.judge.local import Score, judge_results, verdicts, write_verdicts
from dpo.judge.protocols import compare
from dpo.judge.statistics import summarise
from dpo.log import MetricsLog, peak_rss_mib, progress, stage
from dpo.logprobs import TreeLogps, batch_sums, completion_sums, score_trees
from dpo.losses import PairLogps, pair_losses, reward_metrics
from dpo.packing import Batch, pack_share
from dpo.reference import Usage, numerics_tag, open_store, reference_logps
from dpo.report import write_report
from dpo.runs import new_folder, resumed_folder, write_json
from dpo.show import render_tree
from dpo.trees import Tree
from models.checkpoint import weights_fingerprint
from models.decoder import Decoder, load_decoder
from models.errors import UserError
from models.lora import add_lora

STEP0_TOLERANCE = 1e-5  # nats per completion on a CPU, where policy = reference is exact; on a GPU only reported so far


# --- the loss of one optimizer step ---------------------------------------------------------------------------------


def pair_logps(sums_S: Tensor, reference_S: Tensor, batch: Batch) -> PairLogps:
    """The two completions' sums of every pair of a batch."""
    chosen_B, rejected_B = batch.winner_B, batch.loser_B
    return PairLogps(
        sums_S[chosen_B],
        sums_S[rejected_B],
        reference_S[chosen_B],
        reference_S[rejected_B],
        batch.lengths_S[chosen_B],
        batch.lengths_S[rejected_B],
    )


def reference_sums(logps: TreeLogps) -> Tensor:
    """Sum of each completion's log-probs [S], added in the same order as the policy's: equal values, equal bits."""
    lengths = torch.tensor([len(value) for value in logps])
    return completion_sums(
        torch.cat([torch.from_numpy(value) for value in logps]),
        torch.arange(len(logps)).repeat_interleave(lengths),
        len(logps),
    )


def accumulate_gradients(
    policy: Decoder, trees: Sequence[Tree], references: Sequence[Tensor], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Backward through every pair of one optimizer step: the gradient is the mean over all ranks' pairs, exactly.

    Returns sums over all pairs for the log, `weight` to divide them by, and `difference`: this rank's largest
    |policy - reference| of a completion, nats (NaN if any is).
    """
    weight = sum(pair.weight for tree in trees for pair in tree.pairs)
    mine = range(ranks.rank, len(trees), ranks.world)
    sums: dict[str, float] = {}
    differences = [torch.zeros(1, dtype=torch.float64)]
    for batch in pack_share(trees, config.pack.tokens, ranks.rank, ranks.world):
        sums_S = batch_sums(policy, batch, config.pack.head_chunk).cpu()
        reference_S = torch.zeros_like(sums_S)
        for slot, (tree, completion) in enumerate(batch.completions):
            reference_S[slot] = references[mine[tree]][completion]
        differences.append((sums_S.detach() - reference_S).abs())
        logps = pair_logps(sums_S, reference_S * (not config.loss.reference_free), batch)
        losses_B = pair_losses(logps, config.loss)
        ((losses_B * batch.weight_B).sum() / weight).backward()
        for name, value in reward_metrics(logps, losses_B, batch.weight_B, config.loss.beta).items():
            sums[name] = sums.get(name, 0.0) + value
        sums["tokens"] = sums.get("tokens", 0.0) + sum(pack.used_tokens for pack in batch.packs)
    return {**total(sums, ranks), "difference": float(torch.cat(differences).max())}


def means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics as means over pairs."""
    return {
        name: value / sums["weight"] for name, value in sums.items() if name not in ("weight", "tokens", "difference")
    }


# --- the plan of a run ----------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""Share of the peak rate after the warm-up, `done` from 0 to 1."""


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): rising over the warm-up, then by SCHEDULES down to min_lr_ratio of the peak."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    shape = SCHEDULES[config.schedule]((step - warmup) / max(1, steps - warmup))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def plan_steps(trees: Sequence[Tree], config: Config) -> list[list[int]]:
    """Tree indices of every optimizer step: each epoch shuffled by the seed, whole trees until batch_pairs pairs."""
    steps: list[list[int]] = []
    for epoch in range(config.train.epochs):
        order = list(range(len(trees)))
        random.Random(f"epoch {epoch} of seed {config.seed}").shuffle(order)
        step: list[int] = []
        pairs = 0
        for index in order:
            step.append(index)
            pairs += len(trees[index].pairs)
            if pairs >= config.train.batch_pairs:
                steps.append(step)
                step, pairs = [], 0
        steps += [step] if step else []
    return steps[: config.train.max_steps or None]


@dataclass
class TrainState:
    """What a checkpoint remembers besides weights and moments."""

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    time_s: float = 0.0
    step0_loss: float | None = None
    step0_max_difference: float | None = None
    best: list[float] = field(default_factory=list)
    best_step: int = 0


# --- the loop -------------------------------------------------------------------------------------------------------


def train(
    policy: Decoder,
    inputs: Inputs,
    references: Sequence[Tensor],
    evaluate: Callable[[], dict[str, float]],
    config: Config,
    ranks: Ranks,
    folder: Path,
    *,
    check_step0: bool,
) -> TrainState:
    """Train to the end (or to Ctrl-C: a checkpoint, then KeyboardInterrupt); the policy then has the best weights."""
    steps = plan_steps(inputs.train_trees, config)
    epoch_pairs = sum(len(tree.pairs) for tree in inputs.train_trees)
    parameters = list(trained_parameters(policy).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.train.lr,
        betas=(config.train.beta1, config.train.beta2),
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        fused=True,
    )
    done = TrainState()
    checkpoints, best = folder / "checkpoints", folder / "checkpoints" / "best"
    if config.run.resume and (last := last_checkpoint(checkpoints)):
        done = TrainState(**load_checkpoint(last, policy, optimizer))  # type: ignore[arg-type]

    # Go!
    with (
        interruptible() as interrupted,
        MetricsLog(folder, config, done.step, ranks.first) as log,
        progress(len(steps), "training", "steps", done.step) as bar,
    ):
        while done.step < len(steps):
            begin = time.perf_counter()
            members = steps[done.step]
            sums = accumulate_gradients(
                policy, [inputs.train_trees[i] for i in members], [references[i] for i in members], config, ranks
            )
            if done.step == 0:
                difference = float(torch.tensor(gather([sums["difference"]], ranks), dtype=torch.float64).max())
                done.step0_loss, done.step0_max_difference = means(sums)["loss"], difference
                if check_step0 and not difference <= STEP0_TOLERANCE:
                    raise UserError(
                        "step 0: policy and reference are the same weights, yet a completion's log-probs differ by "
                        f"{difference:.2e} nats (allowed {STEP0_TOLERANCE}); the stored log-probs do not fit this "
                        "machine or build: set reference.store to a new folder, and report this if it happens again"
                    )
            rate = learning_rate(done.step, len(steps), config.train)
            for group in optimizer.param_groups:
                group["lr"] = rate
            grad_norm = clip_gradients(parameters, config.train.clip_norm)
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"step {done.step}: the gradient's norm is {grad_norm}; the weights are left as they were. "
                    "Lower train.lr or raise loss.beta; the last checkpoint is whole"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done.step += 1
            done.pairs += sum(len(inputs.train_trees[i].pairs) for i in members)
            done.tokens += int(sums["tokens"])
            time_s = time.perf_counter() - begin
            done.time_s += time_s
            line = {
                **means(sums),
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens_per_s": sums["tokens"] / time_s,
                "time_s": time_s,
            }
            log.write(done.step, {"epoch": done.pairs / epoch_pairs, **line})
            bar.update(1)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_s']:.0f} tokens/s")

            if done.step == len(steps) or due(done.step, config.train.eval_every_steps):
                figures = evaluate()
                log.write(done.step, figures)
                if (score := selection_score(figures, config.train.select, done.step)) > done.best:
                    done.best, done.best_step = score, done.step
                    save_weights(best, policy, asdict(done), ranks)
            stop = any(gather([interrupted()], ranks))
            every = config.train.checkpoint_every_steps
            if stop or due(done.step, every) or (every and done.step == len(steps)):
                save_checkpoint(checkpoints, policy, optimizer, asdict(done), ranks, config.train.keep_checkpoints)
            if stop:
                raise KeyboardInterrupt("a checkpoint is written; the same command with run.resume=latest goes on")
    if done.best_step != done.step:
        load_weights_into(best, policy)
    return done


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done after this one."""
    return bool(every) and step % every == 0


def selection_score(figures: dict[str, float], select: str, step: int) -> list[float]:
    """What picks the best weights, larger is better: the chosen figure, ties broken by the validation loss.

    Without validation rows (no figures) the last weights are the best.
    """
    if not figures:
        return [float(step)]
    figure = {"last": float(step), "loss": -figures["eval/loss"]}.get(select, figures.get(f"eval/{select}", 0.0))
    return [figure, -figures["eval/loss"]]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, a first Ctrl-C only makes the yielded function true, so that the step ends whole; a second stops."""
    hits: list[int] = []

    def note(number: int, frame: object) -> None:
        hits.append(number)
        signal.signal(signal.SIGINT, old)

    old = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, old)


# --- the path -------------------------------------------------------------------------------------------------------


def load_policy(config: Config, inputs: Inputs, ranks: Ranks) -> Decoder:
    """The policy at its start: all of it trainable in fp32 masters, or frozen in the arithmetic's dtype under LoRA."""
    exact = torch.promote_types(inputs.dtype, torch.float32)
    weight_dtype = inputs.dtype if config.lora.rank else exact
    policy = load_decoder(
        inputs.model_folder, weight_dtype=weight_dtype, compute_dtype=inputs.dtype, device=ranks.device
    )
    if config.lora.rank:
        alpha = config.lora.alpha or 2.0 * config.lora.rank
        add_lora(policy, rank=config.lora.rank, alpha=alpha, targets=config.lora.targets, seed=config.seed)
    else:
        policy.requires_grad_(True)
    policy.checkpoint_activations = config.train.activation_checkpointing
    return shard(policy, ranks)


def evaluation(inputs: Inputs, references: Sequence[Tensor], score: Score, config: Config) -> dict[str, float]:
    """Validation figures under eval/: loss and rewards of the objective's pairs, and the judge's two accuracies."""
    rows, trees = inputs.splits.validation, inputs.validation_trees
    if not rows:
        return {}
    logps = score(trees)
    sums: dict[str, float] = {}
    for tree, tree_logps, reference_S in zip(trees, logps, references, strict=True):
        pairs = torch.tensor([(pair.winner, pair.loser) for pair in tree.pairs]).T
        weight_B = torch.tensor([pair.weight for pair in tree.pairs], dtype=torch.float64)
        lengths_S = torch.tensor([len(value) for value in tree_logps])
        batch = Batch((), (), lengths_S, pairs[0], pairs[1], weight_B)
        of_pairs = pair_logps(reference_sums(tree_logps), reference_S * (not config.loss.reference_free), batch)
        losses_B = pair_losses(of_pairs, config.loss)
        for name, value in reward_metrics(of_pairs, losses_B, weight_B, config.loss.beta).items():
            sums[name] = sums.get(name, 0.0) + value
    if config.objective == "verdicts":  # the same trees: no second forward
        judged = compare(rows, trees, config.judge.pairs_per_row, lambda _: logps)
    else:
        judged = verdicts(rows, inputs, config, score, sighted=config.judge.sighted)
    summary = summarise(judged, config.seed)
    figures = {name: summary[name] for name in ("accuracy", "averaged_accuracy", "raw_a_rate", "position_consistency")}  # type: ignore[literal-required]
    return {f"eval/{name}": value for name, value in {**means(sums), **figures}.items()}


def run(config: Config) -> Path:
    """The whole path, from inputs to report; the run folder."""
    times: dict[str, float] = {}
    torch.set_flush_denormal(True)  # peaked softmaxes make denormals, which slow the CPU thirty-fold
    ranks = join_ranks(pick_device(config))
    with stage("inputs", times):
        inputs = read_inputs(config, ranks.device.type)
    with stage("model", times):
        policy = load_policy(config, inputs, ranks)
        memo = inputs.cache / "fingerprints.json"
        fingerprint = weights_fingerprint(inputs.model_folder, memo)
        reference_fingerprint = weights_fingerprint(inputs.reference_folder, memo)
    folder = (
        resumed_folder(config)
        if config.run.resume
        else broadcast_first(new_folder(config) if ranks.first else Path(), ranks)
    )

    usage = Usage()
    root = Path(config.reference.store) if config.reference.store else inputs.cache / "reference"
    tag = numerics_tag(ranks.device, inputs.dtype, config.pack)

    def live(model: Decoder, label: str) -> Score:
        return lambda trees: score_trees(model, trees, config.pack, ranks, label)

    def stored(model: Decoder, weights: str, label: str) -> Score:
        return lambda trees: reference_logps(open_store(root, weights, tag), trees, live(model, label), ranks, usage)

    with stage("reference", times):
        # With reference_free only the first step's trees are needed, for the check of step 0.
        needed = (
            set(plan_steps(inputs.train_trees, config)[0])
            if config.loss.reference_free
            else range(len(inputs.train_trees))
        )
        chosen = [i for i in range(len(inputs.train_trees)) if i in needed]
        same = reference_fingerprint == fingerprint
        reference = (
            policy
            if same
            else load_decoder(
                inputs.reference_folder, weight_dtype=inputs.dtype, compute_dtype=inputs.dtype, device=ranks.device
            )
        )
        reference_score = stored(reference, reference_fingerprint, "reference")
        scored = dict(zip(chosen, reference_score([inputs.train_trees[i] for i in chosen]), strict=True))
        train_references = [
            reference_sums(scored[i]) if i in scored else torch.zeros(len(tree.completions), dtype=torch.float64)
            for i, tree in enumerate(inputs.train_trees)
        ]
        validation_references = [reference_sums(logps) for logps in reference_score(inputs.validation_trees)]
        for i in chosen[: config.show] if ranks.first else []:
            print(render_tree(inputs.train_trees[i], scored[i], inputs.tokenizer))
        del reference, scored

    test, sighted = inputs.splits.test, config.judge.sighted
    with stage("judge base", times):
        base = stored(policy, fingerprint, "judging base")
        judged = {"base": verdicts(test, inputs, config, base, sighted=sighted)}
        base_validation = verdicts(inputs.splits.validation, inputs, config, base, sighted=sighted)

    with stage("train", times):
        done = train(
            policy,
            inputs,
            train_references,
            lambda: evaluation(inputs, validation_references, live(policy, "validation"), config),
            config,
            ranks,
            folder,
            check_step0=same and ranks.device.type == "cpu",
        )

    with stage("judge trained", times):
        judged["trained"] = verdicts(test, inputs, config, live(policy, "judging trained"), sighted=sighted)
        if sighted and config.judge.blind_control:
            judged["blind"] = verdicts(test, inputs, config, live(policy, "judging blind"), sighted=False)
    with stage("export", times):
        export(folder / "export", policy, inputs.model_folder, config, ranks)
    if ranks.first:
        with stage("statistics", times):
            judgement = judge_results(inputs, config, judged, base_validation)
        write_verdicts(folder / "verdicts.jsonl", judged)
        results = {
            "step0_loss": done.step0_loss,
            "step0_max_difference": done.step0_max_difference,
            "reference": asdict(usage),
            "judge": judgement,
            "train": {
                "steps": done.step,
                "pairs": done.pairs,
                "tokens": done.tokens,
                "time_s": done.time_s,
                "tokens_per_s": done.tokens / max(done.time_s, 1e-9),
                "peak_rss_mib": peak_rss_mib(),
                "best_step": done.best_step,
                "dtype": str(inputs.dtype).removeprefix("torch."),
            },
            "data": inputs.splits.report,
            "time_s": times,
        }
        write_json(folder / "results.json", results)
        write_report(folder)
        print(f"report: {folder / 'report.md'}")
    leave_ranks(ranks)
    return folder


def main(argv: list[str]) -> int:
    """The command line: exit code 0 when all is written, 2 for a user's mistake, 130 for Ctrl-C."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    try:
        run(load_config(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; a full disk or a missing permission? What was there is whole", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        outside = "the same command starts anew, with the log-probs that are stored by now"
        print(f"interrupted: {stop or outside}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
