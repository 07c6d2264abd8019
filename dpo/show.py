"""What is scored, for human eyes: a tree's prompt and branches as text, each scored token with its log-prob.

Read next: dpo/trees.py.
"""

from dpo.logprobs import TreeLogps
from dpo.trees import Tree
from models.tokenizer import Tokenizer


def render_tree(tree: Tree, logps: TreeLogps, tokenizer: Tokenizer) -> str:
    """The tree as text: the shared prompt, then each branch; a scored token is written as [token | log p in nats]."""
    lines = [
        f"--- tree {tree.id}: {len(tree.prompt)} prompt tokens, {len(tree.branches)} branches, {len(tree.pairs)} pairs",
        tokenizer.decode(tree.prompt),
    ]
    for b, branch in enumerate(tree.branches):
        lines.append(f"--- branch {b}")
        for index, (completion, logp) in enumerate(zip(tree.completions, logps, strict=True)):
            if completion.branch == b:
                scored = "".join(
                    f"[{tokenizer.decode([token])}|{value:.2f}]"
                    for token, value in zip(completion.targets, logp, strict=True)
                )
                lines.append(f"completion {index}: {tokenizer.decode(branch[: completion.start])}{scored}")
                lines.append(f"    {len(logp)} scored tokens, sum of log p {logp.sum():.3f} nats")
    named = ", ".join(f"{pair.winner} over {pair.loser} (weight {pair.weight:g})" for pair in tree.pairs)
    return "\n".join([*lines, f"--- pairs: {named}", ""])
