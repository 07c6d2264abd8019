"""python -m dpo.train exp=NAME [key=value ...]: from an experiment file to a judge, its figures and a report.

    rows -> split -> trees -> reference store -> train loop -> judge -> results.json -> report

The path is `run`, the training loop is `train`. No dimension letters. Read next: dpo/step.py.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
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
from dpo.config import Config, help_text, load_config
from dpo.distributed import (
    Ranks,
    broadcast_first,
    clip_gradients,
    end_process,
    gather,
    join_ranks,
    leave_ranks,
    shard,
)
from dpo.inputs import Inputs, pick_device, read_inputs
from dpo.judge.local import Score, evaluation, judge_results, verdicts, write_verdicts
from dpo.judge.statistics import Verdict
from dpo.log import MetricsLog, peak_rss_mib, progress, stage
from dpo.logprobs import score_trees
from dpo.losses import losses_help, reads
from dpo.pairs import tree_sums
from dpo.reference import Usage, numerics_tag, open_store, reference_logps
from dpo.report import write_report
from dpo.rows import Row
from dpo.runs import new_folder, resumed_folder, write_json
from dpo.show import render_tree
from dpo.step import accumulate_gradients, in_one_kernel, learning_rate, means, plan_steps
from dpo.trees import trees_digest
from kernels.backend import describe, describe_pairs
from models.checkpoint import weights_fingerprint
from models.decoder import Decoder, load_decoder
from models.errors import UserError
from models.files import read_json_object
from models.lora import add_lora

STEP0_TOLERANCE = 1e-5  # nats per completion on a CPU, where policy = reference is exact; on a GPU only reported so far


@dataclass
class TrainState:
    """What a checkpoint remembers besides weights and moments."""

    data: str  # trees_digest of the training trees
    reference: str  # fingerprint of its weights
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
    reference: str,
    check_step0: bool,
) -> TrainState:
    """Train to the end (or to Ctrl-C: a checkpoint, then KeyboardInterrupt); the policy then has the best weights.

    `reference` is the fingerprint of the weights behind `references`: a checkpoint goes on against the same alone.
    """
    steps = plan_steps(inputs.train_trees, config)
    exact = torch.promote_types(inputs.dtype, torch.float32)
    one_kernel = in_one_kernel(config, inputs.train_trees, ranks.device, exact)
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
    done = TrainState(trees_digest(inputs.train_trees), reference)
    checkpoints, best = folder / "checkpoints", folder / "checkpoints" / "best"
    finished = checkpoints / "finished.json"
    if config.run.resume and finished.is_file():  # stopped while it judged or exported: there is nothing left to train
        load_weights_into(best, policy)
        return _same_run(TrainState(**read_json_object(finished)), done, folder)  # type: ignore[arg-type]
    if config.run.resume and (last := last_checkpoint(checkpoints)):
        done = _same_run(TrainState(**load_checkpoint(last, policy, optimizer)), done, folder)  # type: ignore[arg-type]

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
                policy,
                [inputs.train_trees[i] for i in members],
                [references[i] for i in members],
                config,
                ranks,
                one_kernel=one_kernel,
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
            grad_norm = clip_gradients(parameters, config.train.clip_norm, ranks)
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"step {done.step}: the gradient's norm is {grad_norm}; the weights are left as they were. "
                    "Lower train.lr or raise loss.beta; checkpoints written so far are whole"
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
    if ranks.first:
        write_json(finished, asdict(done))
    return done


def _same_run(saved: TrainState, fresh: TrainState, folder: Path) -> TrainState:
    if saved.data != fresh.data:
        raise UserError(
            f"run.resume: {folder} was begun on other training rows than are read now (their tokens, pairs or weights "
            "differ): give it the file that it had, or start a new run"
        )
    if saved.reference != fresh.reference:
        raise UserError(
            f"run.resume: {folder} was begun against a reference of weights {saved.reference[:16]}, they now are "
            f"{fresh.reference[:16]}; put the old ones back, or start a new run"
        )
    return saved


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
        inputs.model_folder,
        weight_dtype=weight_dtype,
        compute_dtype=inputs.dtype,
        device=ranks.device,
        backend=config.kernels.backend,
    )
    if config.lora.rank:
        alpha = config.lora.alpha or 2.0 * config.lora.rank
        add_lora(policy, rank=config.lora.rank, alpha=alpha, targets=config.lora.targets, seed=config.seed)
    else:
        policy.requires_grad_(True)
    policy.checkpoint_activations = config.train.activation_checkpointing
    return shard(policy, ranks)


def training_references(inputs: Inputs, config: Config, score: Score, ranks: Ranks) -> list[Tensor]:
    """Reference sums of every training tree; shows the first `show` trees.

    A loss without a reference needs only the first step's, for the check of step 0; the rest is zeros then.
    """
    trees = inputs.train_trees
    first = plan_steps(trees, config)[0] if trees else []
    chosen = range(len(trees)) if reads(config.loss, "reference") else sorted(first)
    scored = dict(zip(chosen, score([trees[i] for i in chosen]), strict=True))
    if ranks.first:
        for i in list(chosen)[: config.show]:
            print(render_tree(trees[i], scored[i], inputs.tokenizer))
    zeros = ([np.zeros(len(c.targets)) for c in tree.completions] for tree in trees)
    return [tree_sums(scored.get(i, zero), trees[i], config.loss) for i, zero in enumerate(zeros)]


def used_kernels(policy: Decoder, inputs: Inputs, config: Config, ranks: Ranks) -> dict[str, dict[str, str]]:
    """results.json's `kernels`: the path that each public kernel takes in this run, and the tiles of its kernels."""
    shape = (config.pack.head_chunk, policy.config.hidden, policy.config.vocab)
    backend, exact = config.kernels.backend, torch.promote_types(inputs.dtype, torch.float32)
    pairs = in_one_kernel(config, inputs.train_trees, ranks.device, exact)
    return {
        "linear_logprobs": describe(backend, ranks.device, inputs.dtype, *shape, trainable=not config.lora.rank),
        "preference_loss": describe_pairs(backend if pairs else "torch", ranks.device, exact),
    }


def train_results(done: TrainState, dtype: torch.dtype) -> dict[str, object]:
    """results.json's `train`."""
    return {
        "steps": done.step,
        "pairs": done.pairs,
        "tokens": done.tokens,
        "time_s": done.time_s,
        "tokens_per_s": done.tokens / max(done.time_s, 1e-9),
        "peak_rss_mib": peak_rss_mib(),
        "best_step": done.best_step,
        "dtype": str(dtype).removeprefix("torch."),
    }


def run(config: Config) -> Path:
    """The whole path, from inputs to report; the run folder."""
    times: dict[str, float] = {}
    torch.set_flush_denormal(True)  # peaked softmaxes make denormals, which slow the CPU thirty-fold
    ranks = join_ranks(pick_device(config))
    resumed = resumed_folder(config) if config.run.resume else None
    with stage("inputs", times):
        inputs = read_inputs(config, ranks.device.type)
    with stage("model", times):
        policy = load_policy(config, inputs, ranks)
        memo = inputs.cache / "fingerprints.json"
        fingerprint = weights_fingerprint(inputs.model_folder, memo)
        reference_fingerprint = weights_fingerprint(inputs.reference_folder, memo)
        same = reference_fingerprint == fingerprint
    folder = resumed or broadcast_first(new_folder(config) if ranks.first else Path(), ranks)

    usage = Usage()
    root = Path(config.reference.store) if config.reference.store else inputs.cache / "reference"
    used = used_kernels(policy, inputs, config, ranks)
    tag = numerics_tag(ranks.device, inputs.dtype, config.pack, used["linear_logprobs"])

    def live(model: Decoder, label: str) -> Score:
        return lambda trees: score_trees(model, trees, config.pack, ranks, label)

    def stored(model: Decoder, weights: str, label: str) -> Score:
        return lambda trees: reference_logps(open_store(root, weights, tag), trees, live(model, label), ranks, usage)

    def judge(rows: Sequence[Row], score: Score, sighted: bool = config.judge.sighted) -> list[Verdict]:
        return verdicts(rows, inputs, config, score, sighted=sighted)

    with stage("reference", times):
        dtype = inputs.dtype
        reference = (
            policy
            if same
            else load_decoder(
                inputs.reference_folder,
                weight_dtype=dtype,
                compute_dtype=dtype,
                device=ranks.device,
                backend=config.kernels.backend,
            )
        )
        score = stored(reference, reference_fingerprint, "reference")
        train_references = training_references(inputs, config, score, ranks)
        validation = inputs.validation_trees
        scored = score(validation)
        validation_references = [tree_sums(*one, config.loss) for one in zip(scored, validation, strict=True)]
        del reference, score, scored

    test = inputs.splits.test
    with stage("judge base", times):
        base = stored(policy, fingerprint, "judging base")
        judged = {"base": judge(test, base)}
        base_validation = judge(inputs.splits.validation, base)

    with stage("train", times):
        done = train(
            policy,
            inputs,
            train_references,
            lambda: evaluation(inputs, validation_references, live(policy, "validation"), config),
            config,
            ranks,
            folder,
            reference=reference_fingerprint,
            check_step0=same and ranks.device.type == "cpu",
        )

    with stage("judge trained", times):
        judged["trained"] = judge(test, live(policy, "judging trained"))
        if config.judge.sighted and config.judge.blind_control:
            judged["blind"] = judge(test, live(policy, "judging blind"), sighted=False)
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
            "train": train_results(done, inputs.dtype),
            "kernels": used,
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
        print(f"{help_text()}\n{losses_help()}")
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
        outside = "run.resume=latest goes on from what is whole by now: log-probs, a checkpoint, the trained weights"
        print(f"interrupted: {str(stop) or outside}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
