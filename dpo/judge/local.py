"""A local model as judge: how it does on validation while it trains, and on held-out rows before and after.

Read next: dpo/judge/protocols.py, dpo/judge/controls.py.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo.config import Config
from dpo.inputs import Inputs, judge_settings
from dpo.judge.calibration import Floats
from dpo.judge.controls import conclude, preferring
from dpo.judge.protocols import replies_of, verdicts_of
from dpo.judge.statistics import Verdict, compare, compare_subsets, summarise, verdict_record
from dpo.logprobs import Score, TreeLogps
from dpo.losses import pair_losses, reads, reward_metrics
from dpo.packing import bare_batch
from dpo.pairs import pair_logps, reference_sums, tree_sums
from dpo.rows import Row, pairs_of
from dpo.step import means
from dpo.tokens import token_trees
from dpo.trees import Tree, TreeSettings
from models.errors import UserError
from models.files import atomic_write_text, read_text

Reply = Callable[[Sequence[Tree], TreeSettings], list[Floats]]
"""A judge as a function: verdict trees in, and their settings; replies_of each out."""


def verdicts(rows: Sequence[Row], inputs: Inputs, config: Config, reply: Reply, *, sighted: bool) -> list[Verdict]:
    """The model's verdicts on the first judge.pairs_per_row pairs of each row (0: all), in both orders."""
    settings = judge_settings(config, sighted=sighted)
    trees = token_trees(rows, inputs.tokenizer, settings, inputs.cache)
    return verdicts_of(rows, reply(trees, settings), settings)


def replies(trees: Sequence[Tree], logps: Sequence[TreeLogps]) -> list[Floats]:
    """replies_of each verdict tree."""
    return [replies_of(tree, of_tree) for tree, of_tree in zip(trees, logps, strict=True)]


OF_ANSWERS = ("rewards", "likelihood", "base likelihood")
"""The judges that nobody asked: they are read off the answers' log-probs."""


def prefer(rows: Sequence[Row], trees: Sequence[Tree], values: Sequence[Tensor]) -> list[Verdict]:
    """Verdicts by what the answers are worth, a tree a row and a value a completion; they have no order."""
    pairs = [(row, pair) for row, tree in zip(rows, trees, strict=True) for pair in pairs_of(row, len(tree.pairs))]
    of_pairs = ((pair, value_S) for tree, value_S in zip(trees, values, strict=True) for pair in tree.pairs)
    return preferring(pairs, [float(value_S[pair.winner] - value_S[pair.loser]) for pair, value_S in of_pairs])


def _likelihoods(scored: Sequence[TreeLogps], mean: bool) -> list[Tensor]:
    """log pi(y|x) of each tree's completions, nats, summed or a token's mean."""
    lengths = [torch.tensor([len(logp) if mean else 1 for logp in logps]) for logps in scored]
    return [reference_sums(logps) / length_S for logps, length_S in zip(scored, lengths, strict=True)]


def answer_verdicts(
    rows: Sequence[Row], trees: Sequence[Tree], scored: Sequence[TreeLogps], base: Sequence[TreeLogps], *, mean: bool
) -> dict[str, list[Verdict]]:
    """OF_ANSWERS: by the implicit reward log pi(y|x) - log pi_ref(y|x), and by each of the two alone.

    Rafailov et al. 2023, eq. 5, without beta, so it is no log-odds; nats, or a token's `mean` of them. The reference
    (`base`) is subtracted whether or not the loss read it: else what it finds likely by itself would count as learnt.
    """
    after, before = _likelihoods(scored, mean), _likelihoods(base, mean)
    rewards = [after_S - before_S for after_S, before_S in zip(after, before, strict=True)]
    return {name: prefer(rows, trees, of) for name, of in zip(OF_ANSWERS, (rewards, after, before), strict=True)}


def likelihood_leads(
    rows: Sequence[Row], trees: Sequence[Tree], scored: Sequence[TreeLogps]
) -> dict[tuple[str, tuple[int, int]], float]:
    """By row and pair, how much likelier the chosen answer is as a reply, nats a token, under the model that scored."""
    return {(lead.id, lead.pair): lead.first for lead in prefer(rows, trees, _likelihoods(scored, True))}


def evaluation(
    inputs: Inputs, references: Sequence[Tensor], score: Score, reply: Reply, config: Config
) -> dict[str, float]:
    """Validation figures under eval/: loss and rewards of the trees' pairs, and the judge's two accuracies."""
    rows, trees = inputs.splits.validation, inputs.validation_trees
    if not rows:
        return {}
    logps = score(trees)
    sums: dict[str, float] = {}
    for tree, tree_logps, reference in zip(trees, logps, references, strict=True):
        batch = bare_batch({0: tree})
        scored = tree_sums(tree_logps, tree, config.loss)
        of_pairs = pair_logps(scored, reference * reads(config.loss, "reference"), batch)
        losses_B = pair_losses(of_pairs, config.loss)
        for name, value in reward_metrics(of_pairs, losses_B, batch.weight_B, config.loss.beta).items():
            sums[name] = sums.get(name, 0.0) + value
    if config.objective != "responses" and config.judge.critique == "off":  # the same trees: no second forward
        settings = judge_settings(config, sighted=config.judge.sighted)
        judged = verdicts_of(rows, replies(trees, logps), settings)
    else:
        judged = verdicts(rows, inputs, config, reply, sighted=config.judge.sighted)
    summary = summarise(judged, config.seed)
    figures = {name: summary[name] for name in ("accuracy", "averaged_accuracy", "raw_a_rate", "position_consistency")}  # type: ignore[literal-required]
    return {f"eval/{name}": value for name, value in {**means(sums), **figures}.items()}


def judge_results(
    config: Config, judged: Mapping[str, Sequence[Verdict]], controls: Mapping[str, Sequence[Verdict]]
) -> dict[str, object]:
    """results.json's `judge`: the judges "base" and "trained", their comparison, and the controls.

    `judged` holds verdicts on the test rows by judge: those two, and "blind", "sighted" and OF_ANSWERS where wanted.
    """
    seed, base, trained = config.seed, judged["base"], judged["trained"]
    return {
        **{name: summarise(judge, seed, odds=name not in OF_ANSWERS) for name, judge in judged.items()},
        "comparison": compare(trained, base, seed),
        "subset_tests": compare_subsets(trained, base, seed),
        **conclude(trained, controls, seed),
    }


def write_verdicts(path: Path, judged: Mapping[str, Sequence[Verdict]]) -> None:
    """One line a judge and pair: the judge's name, then the verdict's record."""
    lines = [
        json.dumps({"judge": name, **verdict_record(verdict)}) for name, judge in judged.items() for verdict in judge
    ]
    atomic_write_text(path, "\n".join(lines) + "\n")


def _unzipped(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is missing or was altered") from None


def read_verdicts(path: Path) -> dict[str, list[Verdict]]:
    """What write_verdicts wrote, as it is or gzipped, by judge; a UserError names a line that is none of it."""
    judged: dict[str, list[Verdict]] = {}
    text = _unzipped(path) if path.suffix == ".gz" else read_text(path)
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            odds = {side: math.nan if record[side] is None else record[side] for side in ("first", "second")}
            verdict = Verdict(record["id"], record["subset"], record["group"], tuple(record["pair"]), **odds)
            judged.setdefault(record["judge"], []).append(verdict)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: no verdict: {line[:80]!r}; the file was altered") from None
    return judged
