"""What log-probs rounded to bf16, as most trainers round them, do to a pair's margin: question i of questions.toml.

    python -m experiments.bf16_margins exp=q_i_rank judge.split=test [model.adapter=RUN/export/adapter] [key=value ...]

Scores the held-out rows by kernels.backend=torch (fp32-grade log-probs) and by kernels.backend=bf16, same weights and
same hidden states: as verdicts of one token, and as whole answers. The margin is log p(winner) - log p(loser), with
model.adapter less the same of the model under it, in nats. A line a kind: the margins' size, the error's, and how many
margins end at exactly 0 or on the other side.
Read next: kernels/linear_logprobs.py.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from dpo.config import Config, KernelsConfig
from dpo.distributed import join_ranks
from dpo.inputs import Inputs, answer_settings, judge_settings, read_inputs, set_up_cpu
from dpo.logprobs import score_trees
from dpo.policy import load_policy, load_reference, with_adapter
from dpo.settings import load_config
from dpo.tokens import token_trees
from dpo.trees import Tree


def margins(trees: Sequence[Tree], inputs: Inputs, config: Config, backend: str) -> np.ndarray:
    """The margin of every pair of the trees in order, nats."""
    config = config.model_copy(update={"kernels": KernelsConfig(backend=backend)})  # type: ignore[arg-type]
    ranks = join_ranks("cpu", 0)
    models = [load_policy(config, inputs.model_folder, inputs.dtype, ranks)]
    models += [load_reference(config, inputs.model_folder, inputs.dtype, ranks)] if config.model.adapter else []
    found = []
    for model in models:
        scored = score_trees(model, trees, config.pack, ranks, backend)
        sums = [[logps.sum(dtype=np.float64) for logps in of] for of in scored]
        found.append([of[p.winner] - of[p.loser] for tree, of in zip(trees, sums, strict=True) for p in tree.pairs])
    policy, *reference = np.array(found)
    return policy - sum(reference)


def main(argv: list[str]) -> None:
    """A line for verdicts and one for answers."""
    config = with_adapter(load_config(argv))
    set_up_cpu()
    inputs = read_inputs(config, "cpu", judging=True)
    rows = inputs.splits.test
    kinds = {"verdicts": judge_settings(config, sighted=True), "answers": answer_settings(config)}
    print(f"{len(rows)} rows, {inputs.dtype}, {config.model.adapter or 'no adapter'}")
    for kind, settings in kinds.items():
        trees = token_trees(rows, inputs.tokenizer, settings, inputs.cache)
        exact, rounded = (margins(trees, inputs, config, backend) for backend in ("torch", "bf16"))
        tokens = np.mean([len(side.targets) for tree in trees for side in tree.completions])
        print(
            f"{kind:8} {len(exact)} pairs, {tokens:.0f} tokens a side: margin rms {rms(exact):.3f}, error rms "
            f"{rms(rounded - exact):.4f}, largest {np.abs(rounded - exact).max():.3f}; at exactly 0: "
            f"{100 * np.mean(rounded == 0):.1f} % (of {100 * np.mean(exact == 0):.1f} %), on the other side "
            f"{100 * np.mean(rounded * exact < 0):.1f} %"
        )


def rms(x: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
