"""python -m dpo.judge [exp=NAME] [key=value ...]: judges rows with any model or endpoint, without training.

    rows -> a local model's log-probs, or an endpoint's answers -> verdicts -> results.json

Its keys are dpo.train's, and its run folder holds what there is of one without training. No dimension letters.
Read next: dpo/judge/endpoint.py, dpo/judge/asked.py.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from dpo.config import Config
from dpo.distributed import Ranks
from dpo.inputs import cache_folder, check_place, load_splits, pick_device, read_inputs
from dpo.judge.asked import compare_asked
from dpo.judge.endpoint import Answer, Usage, endpoint
from dpo.judge.local import verdicts, write_verdicts
from dpo.judge.statistics import Summary, Verdict, summarise
from dpo.log import stage
from dpo.logprobs import score_trees
from dpo.policy import load_policy, with_adapter
from dpo.results import widest_interval
from dpo.runs import new_folder, write_json
from dpo.settings import help_text, load_config
from models.errors import UserError
from models.files import atomic_write_text

USAGE = """\
usage: python -m dpo.judge [exp=NAME] [key=value ...]      (exp=judge where none is given)
  python -m dpo.judge model.path=path/to/model data.path=rows.jsonl
  python -m dpo.judge endpoint.url=https://api.openai.com/v1 endpoint.model=gpt-5.2 data.path=rows.jsonl
  python -m dpo.judge exp=quickstart judge.split=test model.path=path/to/model    (what that training judged)
"""


class Judged(NamedTuple):
    """What a judge said."""

    judge: str
    verdicts: list[Verdict]
    answers: list[Answer]  # two a verdict, where it was written
    usage: Usage | None  # of an endpoint
    data: dict[str, object]  # of the rows


def compare_by_model(config: Config) -> Judged:
    """By `model.path` with `model.adapter`: the log-probs of "A" and "B"."""
    config = with_adapter(config)
    ranks = Ranks(0, 1, torch.device(pick_device(config)))
    inputs = read_inputs(config, ranks.device.type, judging=True)
    model = load_policy(config, inputs.model_folder, inputs.dtype, ranks)
    judged = verdicts(
        inputs.splits.test,
        inputs,
        config,
        lambda trees: score_trees(model, trees, config.pack, ranks, "judging"),
        sighted=config.judge.sighted,
    )
    return Judged(config.model.adapter or config.model.path, judged, [], None, inputs.splits.report)


def compare_by_endpoint(config: Config) -> Judged:
    """By `endpoint.model`, which is asked for its verdicts in words."""
    check_place("run.root", Path(config.run.root))
    splits = load_splits(config, judging=True)
    usage = Usage()
    ask = endpoint(config.endpoint, cache_folder(config), usage)
    judged, answers = compare_asked(splits.test, config.judge.pairs_per_row, ask, sighted=config.judge.sighted)
    return Judged(config.endpoint.model, judged, answers, usage, splits.report)


PROTOCOLS = {"compare": (compare_by_model, compare_by_endpoint)}
"""judge.protocol -> how a local model judges by it, and how an endpoint does."""


def run(config: Config) -> Path:
    """Judge, and write the run folder: config.json, env.json, verdicts.jsonl, results.json, and answers.jsonl."""
    times: dict[str, float] = {}
    with stage("judge", times):
        judged = PROTOCOLS[config.judge.protocol][bool(config.endpoint.url)](config)
    summary = summarise(judged.verdicts, config.seed)
    folder = new_folder(config)
    write_verdicts(folder / "verdicts.jsonl", {judged.judge: judged.verdicts})
    if judged.answers:
        write_answers(folder / "answers.jsonl", judged)
    results: dict[str, object] = {"judge": {judged.judge: summary}, "data": judged.data, "time_s": times}
    if judged.usage:
        results["endpoint"] = asdict(judged.usage)
    write_json(folder / "results.json", results)
    print(told(folder, judged, summary))
    return folder


def write_answers(path: Path, judged: Judged) -> None:
    """A line a verdict: what the judge wrote with the chosen answer first, and with it second."""
    twos = zip(judged.answers[0::2], judged.answers[1::2], strict=True)
    lines = [
        json.dumps({"id": verdict.id, "pair": verdict.pair, "first": first.text, "second": second.text}) + "\n"
        for verdict, (first, second) in zip(judged.verdicts, twos, strict=True)
    ]
    atomic_write_text(path, "".join(lines))


def told(folder: Path, judged: Judged, summary: Summary) -> str:
    """The figures in a few lines."""
    averaged, consistent = (
        f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        for share, (low, high) in (
            (summary["averaged_accuracy"], widest_interval(summary)),
            (summary["accuracy"], summary["accuracy_interval"]),
        )
    )
    lines = [
        f"{judged.judge}: order-averaged accuracy {averaged}, consistent {consistent}; {summary['n']:,} pairs, "
        f"{summary['ties']:,} ties, {summary['invalid']:,} invalid; says A {100 * summary['raw_a_rate']:.0f} %"
    ]
    if usage := judged.usage:
        cost = "no price known" if usage.cost is None else f"{usage.cost:.4f} dollars"
        lines.append(
            f"{2 * summary['n']:,} answers: {usage.found:,} kept from before, {usage.unanswered:,} never had, "
            f"{usage.failed_tries:,} failed tries; {usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens, {cost}"
        )
    return "\n".join([*lines, f"results: {folder / 'results.json'}"])


def main(argv: list[str]) -> int:
    """The command line: exit code 0 when all is written, 2 for a user's mistake, 130 for Ctrl-C."""
    if {"-h", "--help"} & set(argv):
        print(f"{USAGE}\n{help_text()}")
        return 0
    try:
        named = any(argument.startswith("exp=") for argument in argv)
        run(load_config(argv if named else ["exp=judge", *argv]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
