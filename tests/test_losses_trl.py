"""dpo/losses.py against TRL 1.16.0's own losses, recorded by tests/record_trl_losses.py; and where TRL deviates.

Known deviations, each chosen: TRL's sigmoid ignores label_smoothing; its `sft` is a mean over the tokens of a batch (a
pair alone, as recorded, is the same); it clamps the alpha divergence's exponent at 80 and leaves forward_kl's and
DiscoPOP's to overflow, where ours go on as tangents; with exo_pair a label_smoothing of 0 silently becomes 1e-3; its
WPO weight divides by sum_v p_v^2 (recorded with that term at 1); its CPO and ORPO take the mean NLL over a batch.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.config import LossConfig
from dpo.losses import LOSSES, pair_losses
from dpo.packing import bare_batch
from dpo.pairs import PairLogps, pair_logps, reference_sums
from dpo.trees import Completion, Pair, Tree

RECORD = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
CASES = RECORD["cases"]
NOT_IN_TRL = {"ipo_sum", "dpop", "rdpo"}


def recorded_pairs(config: LossConfig) -> list[PairLogps]:
    """Each recorded pair, its sums and tails taken the way training takes them."""
    pairs = []
    for chosen, rejected, reference_chosen, reference_rejected in RECORD["pairs"]:
        completions = tuple(Completion(b, 0, (0,) * len(one)) for b, one in enumerate((chosen, rejected)))
        tree = Tree("t", (0,), ((), ()), completions, (Pair(0, 1, 1.0),))
        tailed = tree.pairs if config.ld_alpha != 1 else ()
        sums = [
            reference_sums([np.array(one) for one in two], tailed)
            for two in ((chosen, rejected), (reference_chosen, reference_rejected))
        ]
        pairs.append(pair_logps(*sums, bare_batch({0: tree})))
    return pairs


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case["ours"].items()))
def test_every_loss_has_trls_value(case):
    config = LossConfig(**case["ours"])
    eps = torch.finfo(getattr(torch, case["dtype"])).eps
    for logps, theirs in zip(recorded_pairs(config), case["values"], strict=True):
        # Rounding of TRL's own sums of some tens of nats, in the dtype that it was recorded in.
        assert abs(pair_losses(logps, config).item() - theirs) <= 16 * eps * max(abs(theirs), 16)


def test_every_loss_that_trl_has_is_recorded():
    assert {case["ours"]["name"] for case in CASES} == LOSSES.keys() - NOT_IN_TRL
    assert RECORD["trl"] == "1.16.0"
    lengths = [[len(one) for one in pair] for pair in RECORD["pairs"]]
    assert [1, 1, 1, 1] in lengths and any(a > b for a, b, *_ in lengths) and any(a < b for a, b, *_ in lengths)


def test_label_smoothing_works_where_trls_sigmoid_ignores_it():
    config = LossConfig(beta=0.3, label_smoothing=0.2)
    (plain,) = (case["values"] for case in CASES if case["ours"] == {"name": "sigmoid", "beta": 0.3})
    for logps, theirs in zip(recorded_pairs(config), plain, strict=True):
        flipped = theirs + 0.3 * (logps.chosen_ratio_B - logps.rejected_ratio_B).item()  # -log sigma(-x) is it + x
        expected = 0.8 * theirs + 0.2 * flipped
        assert math.isclose(pair_losses(logps, config).item(), expected, rel_tol=64 * torch.finfo(torch.float64).eps)
