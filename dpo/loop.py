"""The training loop: steps in a fixed order, validations, checkpoints, and where a stopped run goes on.

No dimension letters. Read next: dpo/step.py, which computes one step's gradient.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpo.adamw import AdamW
from dpo.alarms import DIFFERENCE, Watch, told
from dpo.checkpoint import last_checkpoint, load, save, save_checkpoint, trained_parameters
from dpo.config import Config
from dpo.distributed import Ranks, broadcast_first, clip_gradients, gather, without_gradient
from dpo.inputs import Inputs
from dpo.log import MetricsLog, progress
from dpo.logprobs import score_trees
from dpo.pairs import TreeSums, tree_sums
from dpo.routes import Routes
from dpo.step import accumulate_gradients, in_one_kernel, learning_rate, means, plan_steps, set_dropout
from dpo.trees import Tree
from models.decoder import Decoder
from models.errors import UserError
from models.files import read_json_object, write_json

STEP0_TOLERANCE = DIFFERENCE  # nats per completion on a CPU, where policy = reference is exact; on a GPU it is an alarm


@dataclass
class TrainState:
    """What a checkpoint remembers besides weights and moments."""

    data: str  # digests of the training and the validation trees
    reference: str  # fingerprint of its weights, and of the policy's first ones where these are others
    step: int = 0
    pairs: int = 0
    tokens: int = 0
    time_s: float = 0.0
    step0_loss: float | None = None
    step0_max_difference: float | None = None
    best: list[float] = field(default_factory=list)
    best_step: int = 0
    stale: int = 0  # validations since the best one
    without_gradient: list[str] = field(default_factory=list)  # parameters that never had one but zero


def train(
    policy: Decoder,
    inputs: Inputs,
    references: TreeSums,
    evaluate: Callable[[], dict[str, float]],
    config: Config,
    ranks: Ranks,
    folder: Path,
    *,
    reference: str,
    same_start: bool,
    routes: Routes | None = None,
) -> TrainState:
    """Train to the end (or to Ctrl-C: a checkpoint, then KeyboardInterrupt); the policy then has the best weights.

    `reference`: fingerprint of the weights behind `references` and of the start: a checkpoint goes on with these alone.
    `same_start`: the policy starts as those weights, so that its log-probs must be the stored ones.
    `routes`: of a mixture of experts.
    """
    pairs = inputs.train_trees.column("pairs")
    steps = plan_steps(pairs, config, inputs.train_trees.column("row"))
    exact = torch.promote_types(inputs.dtype, torch.float32)
    one_kernel = in_one_kernel(config, inputs.train_trees, ranks.device, exact)
    epoch_pairs = sum(pairs)
    named = trained_parameters(policy)
    parameters = list(named.values())
    optimizer = AdamW(parameters, config.train)
    data = f"{inputs.train_trees.digest} {inputs.validation_trees.digest}"
    done = TrainState(data, reference, without_gradient=list(named))
    checkpoints, best = folder / "checkpoints", folder / "checkpoints" / "best"
    finished = checkpoints / "finished.json"
    last, over = broadcast_first((last_checkpoint(checkpoints), finished.is_file()), ranks)
    if config.run.resume and over:  # stopped while it judged or exported: there is nothing left to train
        load(best, policy, ranks)
        return _same_run(read_json_object(finished), done, finished)
    if config.run.resume and last:
        done = _same_run(load(last, policy, ranks, optimizer), done, last)

    # Go!
    with (
        interruptible() as interrupted,
        MetricsLog(folder, config, done.step, ranks.first) as log,
        progress(len(steps), "training", "steps", done.step) as bar,
    ):
        watch = Watch(config, log.kept)
        while done.step < len(steps) and not 0 < config.train.patience <= done.stale:
            begin = time.perf_counter()
            members = steps[done.step]
            trees, tree_references = [inputs.train_trees[i] for i in members], [references[i] for i in members]
            set_dropout(policy, done.step, config, ranks)
            sums = accumulate_gradients(
                policy, trees, tree_references, config, ranks, one_kernel=one_kernel, routes=routes
            )
            policy.eval()
            if done.step == 0:
                difference = float(torch.tensor(gather([sums["difference"]], ranks), dtype=torch.float64).max())
                done.step0_loss, done.step0_max_difference = means(sums)["loss"], difference
                if same_start and ranks.device.type == "cpu" and not difference <= STEP0_TOLERANCE:
                    raise refused_start(difference, policy, trees, tree_references, config, ranks)
            rate = learning_rate(done.step, len(steps), config.train)
            grad_norm = clip_gradients(parameters, config.train.clip_norm, ranks)
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"step {done.step}: the gradient's norm is {grad_norm}; the weights are left as they were. "
                    "Lower train.lr or raise loss.beta; checkpoints written so far are whole"
                )
            if done.without_gradient:  # none after a few steps
                silent = {name: named[name] for name in done.without_gradient}
                done.without_gradient = without_gradient(silent, ranks)
            optimizer.step(rate)

            done.step += 1
            done.pairs += sum(pairs[i] for i in members)
            done.tokens += int(sums["tokens"])
            time_s = time.perf_counter() - begin
            done.time_s += time_s
            line = {
                "epoch": done.pairs / epoch_pairs,
                **means(sums),
                **({} if routes is None else routes.figures(ranks)),
                "lr": rate,
                "grad_norm": grad_norm,
                "without_gradient": len(done.without_gradient),
                "tokens_per_s": sums["tokens"] / time_s,
                "time_s": time_s,
            }
            if same_start and done.step == 1:
                line["reference_difference"] = done.step0_max_difference or 0.0
            log.write(done.step, line)
            for alarm in watch.after(done.step, line) if ranks.first else ():
                log.write(done.step, {f"alarm/{alarm['name']}": alarm["value"]})
                bar.write(told(alarm), file=sys.stderr)
            bar.update(1)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_s']:.0f} tokens/s")

            evaluated = due(done.step, len(steps), config.train.eval_every_steps, config.train.n_evals)
            if done.step == len(steps) or evaluated:
                figures = evaluate()
                log.write(done.step, figures)
                if (score := selection_score(figures, config.train.select, done.step)) > done.best:
                    done.best, done.best_step, done.stale = score, done.step, 0
                    save(best, policy, asdict(done), ranks)
                else:
                    done.stale += 1
            stop = any(gather([interrupted()], ranks))
            ends = done.step == len(steps) or 0 < config.train.patience <= done.stale
            every, count = config.train.checkpoint_every_steps, config.train.n_checkpoints
            if stop or due(done.step, len(steps), every, count) or (every and ends):
                keep = len(steps) if count else config.train.keep_checkpoints
                save_checkpoint(checkpoints, policy, optimizer, asdict(done), ranks, keep)
            if stop:
                raise KeyboardInterrupt("a checkpoint is written; the same command with run.resume=latest goes on")
    if done.best_step != done.step:
        load(best, policy, ranks)
    if ranks.first:
        write_json(finished, asdict(done))
    return done


def refused_start(
    difference: float, policy: Decoder, trees: list[Tree], references: list[Tensor], config: Config, ranks: Ranks
) -> UserError:
    """What to tell where step 0 found this difference, nats; a second pass over its trees says who is at fault."""
    scored = score_trees(policy, trees, config.pack, ranks, "once more")
    sums = torch.cat([tree_sums(*of, config.loss) for of in zip(scored, trees, strict=True)])
    again = float((sums - torch.cat(references)).abs().max())
    if again <= STEP0_TOLERANCE:
        why = "this machine gave two answers to one question: run again, and report this"
    else:
        why = "the stored log-probs do not fit this machine or build: set reference.store to a new folder, report this"
    return UserError(
        "step 0: policy and reference are the same weights, yet a completion's log-probs differ by "
        f"{difference:.2e} nats (allowed {STEP0_TOLERANCE}), computed once more by {again:.2e}; {why}"
    )


def _same_run(state: dict[str, object], fresh: TrainState, place: Path) -> TrainState:
    """What was saved at `place`; UserError unless it belongs to the rows and the reference of `fresh`."""
    try:
        saved = TrainState(**state)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(
            f"run.resume: {place} does not hold what this version saves ({error}); remove it, and the run goes on from "
            "what was saved before it"
        ) from error
    if saved.data != fresh.data:
        raise UserError(
            f"run.resume: {place} was begun on other training or validation rows than are read now (their tokens, "
            "pairs or weights differ): give it the file that it had, or start a new run"
        )
    if saved.reference != fresh.reference:
        raise UserError(
            f"run.resume: {place} was begun with a reference and start of other weights ({_short(saved.reference)}) "
            f"than are read now ({_short(fresh.reference)}); put the old ones back, or start a new run"
        )
    return saved


def _short(fingerprints: str) -> str:
    return " and ".join(fingerprint[:16] for fingerprint in fingerprints.split())


def due(step: int, steps: int, every: int, count: int) -> bool:
    """Whether what is done every so many steps, or `count` times in `steps` (0: neither), is to be done after this."""
    return bool(every) and step % every == 0 or step * count // steps > (step - 1) * count // steps


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
