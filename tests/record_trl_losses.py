"""python tests/record_trl_losses.py > tests/trl_losses.json, in an environment with trl 1.16.0: what its losses are.

TRL's own methods run on made-up per-token log-probs, one pair at a time, so that its means over batches are values of
pairs. Each case holds our settings beside what TRL calls them. Read next: tests/test_losses_trl.py, which compares.
"""

import contextlib
import json
import random
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer

PROMPT = 3
LENGTHS = ((4, 7), (1, 1), (9, 2), (5, 5), (1, 6), (12, 3))  # scored tokens of chosen and rejected

CASES: list[tuple[dict, dict]] = [
    ({"name": "sigmoid", "beta": 0.3}, {"loss_types": ["sigmoid"]}),
    ({"name": "robust", "beta": 0.3, "label_smoothing": 0.1}, {"loss_types": ["robust"]}),
    ({"name": "hinge", "beta": 0.3}, {"loss_types": ["hinge"]}),
    ({"name": "rso", "beta": 0.1}, {"loss_types": ["hinge"]}),
    ({"name": "ipo", "beta": 0.3}, {"loss_types": ["ipo"]}),
    ({"name": "dpo_norm", "beta": 5.0}, {"loss_types": ["sigmoid_norm"]}),
    ({"name": "nca_pair", "beta": 0.3}, {"loss_types": ["nca_pair"]}),
    # (its epsilon is fp32 whatever the log-probs are)
    ({"name": "exo_pair", "beta": 0.3, "label_smoothing": 1e-3}, {"loss_types": ["exo_pair"], "dtype": "float32"}),
    ({"name": "sppo_hard", "beta": 0.3}, {"loss_types": ["sppo_hard"]}),
    ({"name": "apo_zero", "beta": 0.3}, {"loss_types": ["apo_zero"]}),
    ({"name": "apo_down", "beta": 0.3}, {"loss_types": ["apo_down"]}),
    ({"name": "discopop", "beta": 0.3, "discopop_tau": 0.05}, {"loss_types": ["discopop"]}),
    ({"name": "sft"}, {"loss_types": ["sft"]}),
    *(
        ({"name": name, "beta": 0.3, "divergence": ours}, {"loss_types": [theirs], "f_divergence_type": divergence})
        for name, theirs in (("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo"), ("dpo_norm", "sigmoid_norm"))
        for ours, divergence in (("forward_kl", "forward_kl"), ("js", "js_divergence"))
    ),
    *(
        (
            {"name": "sigmoid", "beta": 0.3, "divergence": "alpha", "divergence_alpha": alpha},
            {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "dtype": "float32"},
        )
        for alpha in (0.0, 0.5, 1.0, 1.75)
    ),
    ({"name": "sigmoid", "beta": 0.3, "ld_alpha": 0.25}, {"loss_types": ["sigmoid"], "ld_alpha": 0.25}),
    ({"name": "apo_zero", "beta": 0.3, "ld_alpha": 0.0}, {"loss_types": ["apo_zero"], "ld_alpha": 0.0}),
    ({"name": "sigmoid", "beta": 0.3, "wpo": True}, {"loss_types": ["sigmoid"], "use_weighting": True}),
    (
        {"name": "sigmoid", "beta": 0.3, "mix": ["sft:0.5", "apo_zero:2"]},
        {"loss_types": ["sigmoid", "sft", "apo_zero"], "loss_weights": [1.0, 0.5, 2.0]},
    ),
    ({"name": "simpo", "beta": 2.0, "simpo_gamma": 0.75}, {"trainer": "CPO", "loss_type": "simpo", "cpo_alpha": 0.0}),
    (
        {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.75, "label_smoothing": 0.1, "rpo_alpha": 0.5},
        {"trainer": "CPO", "loss_type": "simpo", "cpo_alpha": 0.5},
    ),
    ({"name": "cpo", "beta": 0.3}, {"trainer": "CPO", "loss_type": "sigmoid", "cpo_alpha": 1.0}),
    (
        {"name": "cpo", "beta": 0.3, "label_smoothing": 0.2},
        {"trainer": "CPO", "loss_type": "sigmoid", "cpo_alpha": 1.0},
    ),
    ({"name": "slic", "beta": 0.3}, {"trainer": "CPO", "loss_type": "hinge", "cpo_alpha": 0.0}),
    ({"name": "orpo", "beta": 0.3}, {"trainer": "ORPO", "dtype": "float32"}),
]


class Accelerator:
    """Of one process."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def tokens() -> list[list[list[float]]]:
    """Per pair: log p of chosen's and rejected's tokens under the policy, then the reference; 64ths of a nat."""
    draw = random.Random(0)
    return [
        [[-draw.randrange(1, 200) / 64 for _ in range(n)] for _ in ("policy", "reference") for n in lengths]
        for lengths in LENGTHS
    ]


def dpo_loss(pair: list[list[float]], ours: dict, theirs: dict, dtype: torch.dtype) -> float:
    lengths = [len(pair[0]), len(pair[1])]
    longest = PROMPT + max(lengths)
    mask = torch.tensor([[0] * PROMPT + [1] * n + [0] * (longest - PROMPT - n) for n in lengths])

    def outputs(two: list[list[float]]) -> SimpleNamespace:
        logps = torch.zeros(2, longest - 1, dtype=dtype)
        for side, values in enumerate(two):
            logps[side, PROMPT - 1 : PROMPT - 1 + len(values)] = torch.tensor(values, dtype=dtype)
        zero = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, log_sum_sq_probs=zero, entropy=zero, mean_logits=zero, is_top1=zero.bool(), aux_loss=None
        )

    settings = {"f_divergence_type": "reverse_kl", "loss_weights": [1.0] * len(theirs["loss_types"])}
    settings |= {"ld_alpha": None, "use_weighting": False} | theirs
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=torch.nn.Module(),
        ref_model=lambda **inputs: outputs(pair[2:]),
        args=SimpleNamespace(discopop_tau=ours.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        beta=ours.get("beta", 0.1),
        label_smoothing=ours.get("label_smoothing", 0.0),
        f_alpha_divergence_coef=ours.get("divergence_alpha", 1.0),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {"input_ids": mask.clone(), "completion_mask": mask, "attention_mask": torch.ones_like(mask)}
    loss = dpo_trainer.DPOTrainer._compute_loss(
        trainer, lambda **inputs: outputs(pair[:2]), inputs, return_outputs=False
    )
    return float(loss)


def other_loss(pair: list[list[float]], ours: dict, theirs: dict, dtype: torch.dtype) -> float:
    """CPO's and ORPO's whole loss; their means over tokens are what their forward hands over."""
    chosen, rejected = (torch.tensor(values, dtype=dtype) for values in pair[:2])
    mean = theirs["trainer"] == "ORPO" or theirs["loss_type"] == "simpo"  # what concatenated_forward asks for
    logps = [(one.mean() if mean else one.sum())[None] for one in (chosen, rejected)]
    forward = (*logps, torch.zeros(1), torch.zeros(1), -chosen.mean())
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        concatenated_forward=lambda model, batch: forward,
        beta=ours.get("beta", 0.1),
        label_smoothing=ours.get("label_smoothing", 0.0),
        simpo_gamma=ours.get("simpo_gamma", 0.0),
        alpha=0.0,
        aux_loss_enabled=False,
        **theirs,
    )
    kind = {"CPO": CPOTrainer, "ORPO": ORPOTrainer}[theirs["trainer"]]
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(trainer, name, getattr(kind, name).__get__(trainer))
    return float(kind.get_batch_loss_metrics(trainer, None, {})[0])


def main() -> None:
    dpo_trainer.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    pairs, cases = tokens(), []
    for ours, theirs in CASES:
        dtype = getattr(torch, theirs.get("dtype", "float64"))
        theirs = {key: value for key, value in theirs.items() if key != "dtype"}
        loss = other_loss if "trainer" in theirs else dpo_loss
        values = [loss(pair, ours, theirs, dtype) for pair in pairs]
        cases.append({"ours": ours, "trl": theirs, "dtype": str(dtype)[6:], "values": values})
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    rows = ",\n".join(f"  {json.dumps(pair)}" for pair in pairs)
    sys.stdout.write(f'{{"trl": "{trl.__version__}", "pairs": [\n{rows}\n], "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
