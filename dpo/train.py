"""python -m dpo.train exp=NAME [key=value ...]: from an experiment file to a judge, its figures and a report.

    rows -> split -> trees -> reference store -> train loop -> judge -> results.json -> report

No dimension letters. Read next: dpo/loop.py, the training loop.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch

from dpo.alarms import alarms_of
from dpo.checkpoint import export, trained_digest
from dpo.config import Config
from dpo.critiques import train_rounds
from dpo.distributed import Ranks, broadcast_first, end_process, gather, join_ranks, leave_ranks, watch_ranks
from dpo.inputs import (
    Inputs,
    answer_settings,
    pick_device,
    policy_fingerprint,
    read_inputs,
    reference_fingerprint,
    scores_answers,
    set_up_cpu,
)
from dpo.judge.attacks import write_seen
from dpo.judge.calibration import Floats
from dpo.judge.controls import control_verdicts
from dpo.judge.local import (
    Reply,
    answer_verdicts,
    evaluation,
    judge_results,
    likelihood_leads,
    replies,
    verdicts,
    write_verdicts,
)
from dpo.judge.robustness import biases, successes, under_attack
from dpo.judge.statistics import Verdict
from dpo.judge.written import Pen, written_replies
from dpo.log import peak_rss_mib, stage
from dpo.logprobs import WINDOW_TREES, Note, Score, TreeLogps, score_trees
from dpo.loop import train
from dpo.losses import losses_help, reads
from dpo.pairs import TreeSums, tree_sums
from dpo.policy import load_policy, load_reference, with_adapter
from dpo.reference import Usage, numerics_tag, reference_logps
from dpo.report import write_report
from dpo.report_run import verdict
from dpo.results import Data, Judgement, read_metrics
from dpo.routes import keeps_routes, routes_of, store_missing, store_routes
from dpo.rows import Row, pairs_of
from dpo.runs import new_folder, resumed_folder, sole_process
from dpo.settings import help_text, load_config, unswept
from dpo.show import render_tree
from dpo.step import in_one_kernel, plan_steps
from dpo.store import open_store
from dpo.tokens import token_trees
from dpo.trees import Tree, TreeSettings
from kernels.backend import describe, describe_pairs
from models.decoder import Decoder
from models.errors import UserError, exit_code
from models.files import write_json


def training_references(inputs: Inputs, config: Config, score: Score, ranks: Ranks) -> TreeSums:
    """Reference sums of every training tree; shows the first `show` trees.

    A loss without a reference needs only the first step's, for the check of step 0; the rest is zeros then.
    """
    trees = inputs.train_trees
    tails = 2 * (config.loss.ld_alpha != 1)
    ends = np.cumsum(np.array(trees.column("completions")) + tails * np.array(trees.column("pairs")), dtype=np.int64)
    sums = TreeSums(torch.zeros(int(ends[-1]) if trees else 0, dtype=torch.float64), ends)
    first = plan_steps(trees.column("pairs"), config, trees.column("row"))[0] if trees else []
    chosen = range(len(trees)) if reads(config.loss, "reference") else sorted(first)
    for begin in range(0, len(chosen), WINDOW_TREES):  # of many trees only the sums are held, not what is summed
        window = chosen[begin : begin + WINDOW_TREES]
        part = [trees[i] for i in window]
        for place, (i, tree, logps) in enumerate(zip(window, part, score(part), strict=True), begin):
            if ranks.first and place < config.show:
                print(render_tree(tree, logps, inputs.tokenizer))
            sums[i].copy_(tree_sums(logps, tree, config.loss))
    return sums


def used_kernels(policy: Decoder, inputs: Inputs, config: Config, ranks: Ranks) -> dict[str, dict[str, str]]:
    """results.json's `kernels`: the path that each public kernel takes in this run, and the tiles of its kernels."""
    backend, exact = config.kernels.backend, torch.promote_types(inputs.dtype, torch.float32)
    pairs = in_one_kernel(config, inputs.train_trees, ranks.device, exact)
    return {
        "linear_logprobs": describe(backend, ranks.device, inputs.dtype, policy.config.hidden, not config.lora.rank),
        "preference_loss": describe_pairs(backend if pairs else "torch", ranks.device, exact),
    }


def run(config: Config) -> Path:
    """The whole path, from inputs to report; the run folder."""
    times: dict[str, float] = {}
    config = with_adapter(config)
    set_up_cpu()
    ranks = join_ranks(pick_device(config), config.run.hang_s)
    if ranks.world > 1 and (config.objective == "critiques" or config.judge.critique != "off"):
        raise UserError("objective=critiques, judge.critique: a judge writes in one process; run without torchrun")
    restarts = gather([os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")], ranks)
    if not config.run.resume and any(count != "0" for count in restarts):  # torchrun started us again
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    resume = config.run.resume
    resumed = broadcast_first(resumed_folder(config, resume) if resume and ranks.first else None, ranks)
    with stage("inputs", times):
        inputs = read_inputs(config, ranks.device.type)
    watch_ranks(ranks, config.run.hang_s)
    with stage("model", times):
        policy = load_policy(config, inputs.model_folder, inputs.dtype, ranks)
        weights = policy_fingerprint(inputs, config), reference_fingerprint(inputs, config)
    folder = resumed or broadcast_first(new_folder(config) if ranks.first else Path(), ranks)
    if ranks.first:
        parts = {"training": inputs.splits.train, "validation": inputs.splits.validation, "test": inputs.splits.test}
        rows = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
        report = cast(Data, inputs.splits.report)
        without = sum(report["dropped"].values()) + sum(report.get("too_long", {}).values())
        print(f"run: {folder} ({rows} rows{f'; {without:,} left out' if without else ''})", flush=True)
    with sole_process(folder) if ranks.first else nullcontext():
        train_and_judge(config, inputs, policy, weights, ranks, folder, times)
    leave_ranks(ranks)
    return folder


def train_and_judge(
    config: Config,
    inputs: Inputs,
    policy: Decoder,
    weights: tuple[str, str],
    ranks: Ranks,
    folder: Path,
    times: dict[str, float],
) -> None:
    """All that is written into the run folder; `weights`: fingerprints of the policy's first ones, the reference's."""
    fingerprint, of_reference = weights
    same = of_reference == fingerprint
    usage = Usage()
    root = Path(config.reference.store) if config.reference.store else inputs.cache / "reference"
    used = used_kernels(policy, inputs, config, ranks)
    tag = numerics_tag(ranks.device, inputs.dtype, config.pack, used["linear_logprobs"])

    def tag_of(model: Decoder) -> dict[str, str]:
        packed = ranks.device.type == "cuda" and model.config.experts is not None and model.config.experts.packed
        return tag | ({"experts": "packed"} if packed else {})  # other products; on the CPU they are the same

    def live(model: Decoder, label: str, routes: Path | None = None) -> Score:
        def score(trees: Sequence[Tree], note: Note | None = None) -> list[TreeLogps]:
            return score_trees(model, trees, config.pack, ranks, label, note)

        return score if routes is None else lambda trees: store_routes(routes, trees, score, ranks)

    def stored(model: Decoder, weights: str, label: str, routes: Path | None = None) -> Score:
        score = live(model, label, routes)
        return lambda trees: reference_logps(open_store(root, weights, tag_of(model)), trees, score, ranks, usage)

    def reply(score: Score, weights: str = "") -> Reply:
        """A judge by what it says in one forward, or writes: the policy, of these weights or of those it then has."""
        if config.judge.critique == "off":
            return lambda trees, settings: replies(trees, score(trees))
        greedy = config.judge.critique == "greedy"

        def write(trees: Sequence[Tree], settings: TreeSettings) -> list[Floats]:
            now = weights or trained_digest(policy, fingerprint)
            return written_replies(Pen(policy, now, inputs, settings, config, greedy=greedy), trees)[0]

        return write

    def judge(rows: Sequence[Row], reply: Reply, sighted: bool = config.judge.sighted) -> list[Verdict]:
        return verdicts(rows, inputs, config, reply, sighted=sighted)

    def attack(name: str, reply: Reply) -> dict[str, list[Verdict]]:
        if not inputs.attacked:
            return {}
        with stage(f"attack {name}", times):
            return under_attack(name, judged[name], inputs.attacked, lambda rows: judge(rows, reply))

    with stage("reference", times):
        reference = policy if same else load_reference(config, inputs.reference_folder, inputs.dtype, ranks)
        score = stored(reference, of_reference, "reference")
        kept = None
        if config.objective != "critiques":  # whose rounds have references of their own
            if keeps_routes(config, policy.config, reference.config):
                kept = open_store(root, of_reference, tag_of(reference) | {"values": "routes"})
            score_training = stored(reference, of_reference, "reference", kept)
            train_references = training_references(inputs, config, score_training, ranks)
            del score_training
            if kept is not None:
                store_missing(kept, inputs.train_trees, live(reference, "reference's routes", kept), ranks)
        validation = inputs.validation_trees
        validated = zip(score(validation), validation, strict=True)
        validation_references = [tree_sums(*one, config.loss) for one in validated]
        test, rewards, own = inputs.splits.test, config.judge.rewards != "off", config.judge.self_preference
        settings = answer_settings(config)
        answers = token_trees(test, inputs.tokenizer, settings, inputs.cache) if scores_answers(config) else []
        base_answers = score(answers if rewards else [])
        del reference, score

    with stage("judge base", times):
        base = reply(stored(policy, fingerprint, "judging base"), fingerprint)
        judged = {"base": judge(test, base)}
        base_validation = judge(inputs.splits.validation, base)
        base_leads = likelihood_leads(test, answers, stored(policy, fingerprint, "answers")(answers)) if own else {}
    attacked = attack("base", base)

    def evaluate() -> dict[str, float]:
        score = live(policy, "validation")
        return evaluation(inputs, validation_references, score, reply(score), config)

    def references_of(of_round: Inputs, weights: str) -> TreeSums:
        return training_references(of_round, config, stored(policy, weights, "reference"), ranks)

    critiques: list[dict[str, int]] = []
    with stage("train", times):
        if config.objective == "critiques":
            done, critiques = train_rounds(policy, inputs, references_of, evaluate, config, ranks, folder, fingerprint)
        else:
            done = train(
                policy,
                inputs,
                train_references,
                evaluate,
                config,
                ranks,
                folder,
                reference=of_reference if same else f"{of_reference} {fingerprint}",
                same_start=same,
                routes=routes_of(config, policy.config, kept),
            )

    with stage("judge trained", times):
        trained = reply(live(policy, "judging trained"))
        judged["trained"] = judge(test, trained)
    attacked |= attack("trained", trained)
    sighted = config.judge.sighted
    control, wanted = ("blind", config.judge.blind_control) if sighted else ("sighted", config.judge.sighted_control)
    if wanted:
        with stage(f"judge {control}", times):
            judged[control] = judge(test, reply(live(policy, f"judging {control}")), sighted=not sighted)
    leads = {}
    if answers:
        with stage("judge rewards" if rewards else "answers", times):
            scored = live(policy, "answers")(answers)
            leads = likelihood_leads(test, answers, scored) if own else {}
    if rewards:
        judged |= answer_verdicts(test, answers, scored, base_answers, mean=config.judge.rewards == "mean")
    with stage("export", times):
        export(folder / "export", policy, inputs.model_folder, config, ranks)
    if ranks.first:
        write_seen(folder / "export", inputs.attacks_seen or [])
        with stage("statistics", times):
            pairs = [(row, pair) for row in test for pair in pairs_of(row, config.judge.pairs_per_row)]
            base_said, blind = judged["base"], judged.get("blind")
            controls = control_verdicts(inputs.splits.train, pairs, base_said, base_validation, blind, config.seed)
            judgement = judge_results(config, judged, controls)
        told = judged | attacked
        write_verdicts(folder / "verdicts.jsonl", told | controls)
        results = {
            "step0_loss": done.step0_loss,
            "step0_max_difference": done.step0_max_difference,
            "reference": asdict(usage),
            "judge": judgement,
            "attacks": [
                of for role in ("base", "trained") for of in successes(role, told, inputs.attacks_seen, config.seed)
            ],
            "biases": [
                bias
                for name, said in judged.items()
                for bias in biases(name, test, said, config.seed, base_leads if name == "base" else leads)
            ],
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
            "alarms": alarms_of(read_metrics(folder / "metrics.jsonl"), done.without_gradient),
            "kernels": used,
            "data": inputs.splits.report,
            **({"critiques": critiques} if critiques else {}),
            "time_s": times,
        }
        write_json(folder / "results.json", results)
        write_report([folder], inputs.splits.test)
        print(*verdict(cast(Judgement, judgement), config), f"report: {folder / 'report.md'}", sep="\n")


def main(argv: list[str]) -> int:
    """The command line: 0 when all is written, else exit_code's."""

    def command() -> None:
        config = load_config(argv)
        if config.exp == "judge":
            raise UserError("exp=judge is the experiment of python -m dpo.judge; e.g. exp=quickstart trains")
        if (told := unswept(argv)) and not Path(config.run.root).parent.name.endswith("-sweep"):
            print(told, file=sys.stderr)
        run(config)

    outside = "run.resume=latest goes on from what is whole by now: log-probs, a checkpoint, the trained weights"
    return exit_code(command, argv, f"{help_text()}\n{losses_help()}", outside)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
