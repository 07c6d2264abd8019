"""python -m dpo.judge [exp=NAME] [key=value ...]: judges rows with any model or endpoint, without training.

    rows -> a local model's log-probs, or an endpoint's answers -> verdicts -> results.json

Its keys are dpo.train's, and its run folder holds what there is of one without training. No dimension letters.
Read next: dpo/judge/endpoint.py, dpo/judge/asked.py.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from dpo.config import Config
from dpo.distributed import Ranks, broadcast_first, end_process, join_ranks, leave_ranks, watch_ranks
from dpo.inputs import (
    answer_settings,
    cache_folder,
    check_place,
    judge_settings,
    load_splits,
    pick_device,
    policy_fingerprint,
    read_inputs,
    set_up_cpu,
)
from dpo.judge.asked import ask_rows
from dpo.judge.attacks import attacked_rows
from dpo.judge.benchmarks import OF_PAIRS, Benchmark, choice_score, mean_of_subsets, official_choice, scored
from dpo.judge.calibration import Floats
from dpo.judge.endpoint import MOST_INVALID, Answer, Usage, endpoint
from dpo.judge.local import likelihood_leads, replies, write_verdicts
from dpo.judge.prompts import chosen_slot
from dpo.judge.protocols import PROTOCOLS, verdicts_of
from dpo.judge.robustness import Success, biases, successes, under_attack
from dpo.judge.statistics import Summary, Verdict, summarise
from dpo.judge.written import Pen, written_replies
from dpo.log import stage
from dpo.logprobs import score_trees
from dpo.policy import load_policy, with_adapter
from dpo.report_run import percent
from dpo.rows import Rows
from dpo.runs import new_folder
from dpo.settings import help_text, load_config
from dpo.tokens import token_trees
from dpo.trees import TreeSettings
from models.errors import UserError, exit_code
from models.files import atomic_write_text, write_json

USAGE = """\
usage: python -m dpo.judge [exp=NAME] [key=value ...]      (exp=judge where none is given)
  python -m dpo.judge model.path=path/to/model data.path=rows.jsonl
  python -m dpo.judge endpoint.url=https://api.openai.com/v1 endpoint.model=gpt-5.2 data.path=rows.jsonl
  python -m dpo.judge exp=quickstart judge.split=test model.path=path/to/model    (what that training judged)
  torchrun --nproc-per-node=8 -m dpo.judge model.path=path/to/model data.path=rows.jsonl    (one model over 8 GPUs)
"""


class Judged(NamedTuple):
    """What a judge said."""

    judge: str
    rows: Rows
    attacked: Mapping[str, Rows]  # by each of judge.attacks
    attacks_seen: list[str] | None  # by its training, as its export says
    leads: dict[tuple[str, tuple[int, int]], float]  # likelihood_leads under its own model, with judge.self_preference
    replies: list[Floats]  # of each row (dpo/judge/protocols.py)
    answers: list[Answer]  # one a question, where it was written
    usage: Usage | None  # of an endpoint, for these answers
    spent: Usage | None  # for all that it was asked so far
    data: dict[str, Any]  # of the rows
    reply: Callable[[Rows], list[Floats]]  # of other rows


def by_model(config: Config, settings: TreeSettings, ranks: Ranks) -> Judged:
    """By `model.path` with `model.adapter`: the log-probs of the labels, behind a critique with judge.critique.

    All ranks share the work and get all of it.
    """
    config = with_adapter(config)
    inputs = read_inputs(config, ranks.device.type, judging=True)
    watch_ranks(ranks, config.run.hang_s)
    model = load_policy(config, inputs.model_folder, inputs.dtype, ranks)

    def ask(rows: Rows, most_invalid: float = 1.0) -> tuple[list[Floats], list[Answer]]:
        trees = token_trees(rows, inputs.tokenizer, settings, inputs.cache)
        if config.judge.critique == "off":
            return replies(trees, score_trees(model, trees, config.pack, ranks, "judging")), []
        pen = Pen(
            model,
            policy_fingerprint(inputs, config),
            inputs,
            settings,
            config,
            greedy=config.judge.critique == "greedy",
        )
        return written_replies(pen, trees, most_invalid)

    name, rows = config.model.adapter or config.model.path, inputs.splits.test
    said, answers = ask(rows, MOST_INVALID)
    leads = {}
    if config.judge.self_preference:
        own = token_trees(rows, inputs.tokenizer, answer_settings(config), inputs.cache)
        leads = likelihood_leads(rows, own, score_trees(model, own, config.pack, ranks, "answers"))
    report, seen = inputs.splits.report, inputs.attacks_seen
    return Judged(
        name, rows, inputs.attacked, seen, leads, said, answers, None, None, report, lambda rows: ask(rows)[0]
    )


def by_endpoint(config: Config, settings: TreeSettings) -> Judged:
    """By `endpoint.model`, which is asked for its verdicts in words."""
    check_place("run.root", Path(config.run.root))
    splits, cache = load_splits(config, judging=True), cache_folder(config)
    usage = Usage()
    ask = endpoint(config.endpoint, cache, usage)

    def reply(rows: Rows) -> list[Floats]:
        # An attack that leaves no verdict has not won, and is no reason to stop.
        return ask_rows(rows, lambda prompts, in_form: ask(prompts, lambda answer: True), settings)[0]

    said, answers = ask_rows(splits.test, ask, settings)
    attacked = attacked_rows(splits.test, config.judge.attacks, config.seed, cache)
    asked = replace(usage)  # what the attacks take is added to `usage` later
    name, rows = config.endpoint.model, splits.test
    return Judged(name, rows, attacked, None, {}, said, answers, asked, usage, splits.report, reply)


def benchmark_of(judged: Judged, verdicts: Sequence[Verdict], settings: TreeSettings, seed: int) -> Benchmark | None:
    """results.json's `benchmark`, where judge.protocol or the rows' format is of one.

    Beside `choose` in words stands what RewardBench 2's parser reads in them, where the template asks for its [[A]].
    """
    protocol, rows = PROTOCOLS[settings.protocol], list(judged.rows)
    score, groups = protocol.score, [row.group for row in rows]
    if score is None:
        name, of_pairs = OF_PAIRS.get(", ".join(judged.data["formats"]), ("", None))
        if of_pairs is None:
            return None
        by_row: dict[str, list[Verdict]] = defaultdict(list)
        for verdict in verdicts:
            by_row[verdict.id].append(verdict)
        return scored(name, lambda at: of_pairs([v for p in at for v in by_row[rows[p].id]]), groups, seed)
    parsed: list[float] = []
    boxed = "[[" in settings.template.system + settings.template.user
    if judged.answers and settings.protocol == "choose" and boxed:
        slots = [settings.template.labels[chosen_slot(row, settings.seed)] for row in rows]
        parsed = [choice_score(official_choice(a.text), slot) for a, slot in zip(judged.answers, slots, strict=True)]

    def figures(at: Sequence[int]) -> dict[str, float]:
        of = score([rows[p] for p in at], [judged.replies[p] for p in at], settings)
        read = [(rows[p].subset, parsed[p]) for p in at] if parsed else []
        return of | ({"score_by_its_parser": mean_of_subsets(read)["score"]} if read else {})

    return scored(protocol.benchmark, figures, groups, seed)


def run(config: Config) -> Path:
    """Judge, and write the run folder: config.json, env.json, verdicts.jsonl, results.json, and answers.jsonl."""
    times: dict[str, float] = {}
    set_up_cpu()
    ranks = join_ranks(pick_device(config), config.run.hang_s)
    if ranks.world > 1 and (config.endpoint.url or config.judge.critique != "off"):
        raise UserError("endpoint.url, judge.critique: one process asks or writes; run without torchrun")
    settings = judge_settings(config, sighted=config.judge.sighted)
    with stage("judge", times):
        judged = by_endpoint(config, settings) if config.endpoint.url else by_model(config, settings, ranks)
    verdicts = verdicts_of(judged.rows, judged.replies, settings)
    summary = summarise(verdicts, config.seed, odds=config.judge.protocol == "compare")
    benchmark = benchmark_of(judged, verdicts, settings, config.seed)
    said = {judged.judge: verdicts}
    if judged.attacked:
        with stage("attack", times):
            said |= under_attack(
                judged.judge, verdicts, judged.attacked, lambda rows: verdicts_of(rows, judged.reply(rows), settings)
            )
    attacks = successes(judged.judge, said, judged.attacks_seen, config.seed)
    folder = broadcast_first(new_folder(config, judging=True) if ranks.first else Path(), ranks)
    leave_ranks(ranks)
    if not ranks.first:
        return folder
    write_verdicts(folder / "verdicts.jsonl", said)
    if judged.answers:
        write_answers(folder / "answers.jsonl", judged)
    results: dict[str, object] = {"judge": {judged.judge: summary}, "data": judged.data, "time_s": times}
    results["attacks"] = attacks
    if config.judge.protocol != "choose":  # whose verdicts are on more than two answers
        results["biases"] = biases(judged.judge, judged.rows, verdicts, config.seed, judged.leads)
    results |= {"protocol": config.judge.protocol, "answers": sum(map(len, judged.replies))}
    results |= {"benchmark": benchmark} if benchmark else {}
    if judged.usage:
        results["endpoint"] = asdict(judged.usage)
    if judged.spent and judged.attacked:
        results["endpoint_with_attacks"] = asdict(judged.spent)
    write_json(folder / "results.json", results)
    print(told(folder, judged, summary, benchmark, attacks, config.judge.protocol == "compare"))
    return folder


def write_answers(path: Path, judged: Judged) -> None:
    """A line a question: its row, its place among the row's (`compare`: pair by pair, chosen first, then second)."""
    places = (
        (row.id, q) for row, reply_QL in zip(judged.rows, judged.replies, strict=True) for q in range(len(reply_QL))
    )
    lines = [
        json.dumps({"id": row, "question": question, "text": answer.text}) + "\n"
        for (row, question), answer in zip(places, judged.answers, strict=True)
    ]
    atomic_write_text(path, "".join(lines))


def told(
    folder: Path, judged: Judged, summary: Summary, own: Benchmark | None, attacks: Sequence[Success], ordered: bool
) -> str:
    """The figures in a few lines."""
    averaged = percent(summary["averaged_accuracy"], summary["averaged_interval"])
    consistent = percent(summary["accuracy"], summary["accuracy_interval"])
    says_a = f"; says A {100 * summary['raw_a_rate']:.0f} %" * ordered
    lines = [
        f"{judged.judge}: order-averaged accuracy {averaged}, consistent {consistent}; {summary['n']:,} pairs, "
        f"{summary['ties']:,} ties, {summary['invalid']:,} invalid{says_a}"
    ]
    if own:
        of = ((key, share, own["intervals"].get(key)) for key, share in own["figures"].items())
        told = (f"{key} {100 * x:.1f}" + (f" [{100 * i[0]:.1f}, {100 * i[1]:.1f}]" if i else "") for key, x, i in of)
        lines.append(f"{own['name']}, its own score: {', '.join(told)}")
    if attacks:
        shares = ", ".join(f"{one['attack']} {100 * one['wins'] / one['n']:.1f} %" for one in attacks)
        lines.append(f"of answers that lose clean, so many win when attacked: {shares}")
    elif judged.attacked:
        lines.append("attacks: no answer loses clean, so that none could win")
    if usage := judged.usage:
        lines.append(f"{len(judged.answers):,} answers: {_spent(usage)}")
    if judged.spent and judged.attacked:
        lines.append(f"with the attacks: {_spent(judged.spent)}")
    return "\n".join([*lines, f"results: {folder / 'results.json'}"])


def _spent(usage: Usage) -> str:
    cost = "cost unknown" if usage.cost is None else f"{usage.cost:.4f} dollars"
    return (
        f"{usage.found:,} kept from before, {usage.unanswered:,} never had, {usage.failed_tries:,} failed tries; "
        f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens, {cost}"
    )


def main(argv: list[str]) -> int:
    """The command line: 0 when all is written, else exit_code's."""
    named = any(argument.startswith("exp=") for argument in argv)

    def command() -> None:
        config = load_config(argv if named else ["exp=judge", *argv])
        if config.judge.split == "all" and (given := [word for word in argv if word.startswith("data.rows=")]):
            raise UserError(f"{given[-1]}: chooses rows to train on; judge.rows chooses those to judge")
        run(config)

    stopped = "no run folder is written; what was answered or written is kept, and the same command goes on"
    return exit_code(command, argv, f"{USAGE}\n{help_text()}", stopped)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
