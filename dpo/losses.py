"""Preference losses: pure functions of the sums of dpo/pairs.py, one dict, each with its equation and paper.

Letters: `B` pairs. Read next: dpo/packing.py. To add one: write the function, name it in LOSSES and in the rows of
READ_BY whose setting it reads; "reference" and "ld_alpha" list those that do not (CONTRIBUTING.md).

A loss returns one value a pair; the caller weighs and averages over the pairs of the whole optimizer step, so that no
split into micro-batches or ranks can change a gradient. In the equations r_w and r_l are the log-ratios to the
reference of chosen and rejected, d = r_w - r_l, |y| a completion's scored tokens, sigma the logistic function.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config import LossConfig
from dpo.pairs import PairLogps
from models.errors import UserError

EXP_NATS = 30.0  # exp goes on as its tangent from here: what it multiplies stays finite, and still has a gradient
SURE_NATS = -1e-6  # a mean log-prob above this (odds of a million) is where ORPO's log-odds go on as their tangent

# --- the parts ------------------------------------------------------------------------------------------------------


def _exp(x_B: Tensor) -> Tensor:
    """exp(x), beyond EXP_NATS its tangent."""
    return x_B.clamp(max=EXP_NATS).exp() + math.exp(EXP_NATS) * F.relu(x_B - EXP_NATS)


def _log_odds(logp_B: Tensor) -> Tensor:
    """log p - log(1 - p) of log p, beyond SURE_NATS its tangent."""
    below_B = -logp_B.clamp(max=SURE_NATS).expm1()
    return logp_B - below_B.log() + F.relu(logp_B - SURE_NATS) / math.expm1(-SURE_NATS)


def _per_token(sum_B: Tensor, length_B: Tensor) -> Tensor:
    """Mean over scored tokens; 0 where there are none."""
    return sum_B / length_B.clamp(min=1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio_B, alpha: ratio_B,
    "forward_kl": lambda ratio_B, alpha: 1 - _exp(-ratio_B),
    "js": lambda ratio_B, alpha: math.log(2) + F.logsigmoid(ratio_B),
    "alpha": lambda ratio_B, alpha: ratio_B if alpha == 1 else (_exp((alpha - 1) * ratio_B) - 1) / (alpha - 1),
}
"""f'(u) of log u: the reward's shape under each divergence from the reference (Wang et al. 2023, table 1).

The order alpha is TRL's: 1 less the table's, where 0 is the reverse KL and 1 the forward one.
"""


def _scores(logps: PairLogps, config: LossConfig) -> tuple[Tensor, Tensor]:
    """s_w and s_l: the log-ratios, seen through the divergence."""
    shape, alpha = DIVERGENCES[config.divergence], config.divergence_alpha
    return shape(logps.chosen_ratio_B, alpha), shape(logps.rejected_ratio_B, alpha)


def _gap(logps: PairLogps, config: LossConfig) -> Tensor:
    """s_w - s_l, which is d under the reverse KL."""
    chosen_B, rejected_B = _scores(logps, config)
    return chosen_B - rejected_B


def _mean_gap(logps: PairLogps, config: LossConfig) -> Tensor:
    """s_w / |y_w| - s_l / |y_l|."""
    chosen_B, rejected_B = _scores(logps, config)
    return _per_token(chosen_B, logps.chosen_length_B) - _per_token(rejected_B, logps.rejected_length_B)


def _wrong(logps: PairLogps, config: LossConfig) -> Tensor | float:
    """Probability that a pair's label is wrong: 1 - soft label, flipped further with the odds of label_smoothing."""
    smooth = config.label_smoothing
    return smooth * logps.soft_label_B + (1 - smooth) * (1 - logps.soft_label_B)


def _logistic(logits_B: Tensor, logps: PairLogps, config: LossConfig) -> Tensor:
    """-(1 - e) log sigma(x - m) - e log sigma(m - x): e of _wrong, m the pair's margin."""
    logits_B, wrong_B = logits_B - logps.margin_B, _wrong(logps, config)
    return -(1 - wrong_B) * F.logsigmoid(logits_B) - wrong_B * F.logsigmoid(-logits_B)


# --- the losses -----------------------------------------------------------------------------------------------------


def sigmoid(logps: PairLogps, config: LossConfig) -> Tensor:
    """DPO: -(1 - e) log sigma(beta d) - e log sigma(-beta d) (Rafailov et al. 2023, eq. 7; e: cDPO, Mitchell 2023)."""
    return _logistic(config.beta * _gap(logps, config), logps, config)


def robust(logps: PairLogps, config: LossConfig) -> Tensor:
    """[-(1 - e) log sigma(beta d) + e log sigma(-beta d)] / (1 - 2e), e = label_smoothing (Chowdhury et al. 2024)."""
    logits_B, wrong = config.beta * _gap(logps, config) - logps.margin_B, config.label_smoothing
    return (wrong * F.logsigmoid(-logits_B) - (1 - wrong) * F.logsigmoid(logits_B)) / (1 - 2 * wrong)


def hinge(logps: PairLogps, config: LossConfig) -> Tensor:
    """max(0, 1 - beta d), SLiC's hinge on the log-ratios (Liu et al. 2023, RSO: hinge-norm; TRL's "hinge")."""
    return F.relu(1 + logps.margin_B - config.beta * _gap(logps, config))


def slic(logps: PairLogps, config: LossConfig) -> Tensor:
    """max(0, 1 - beta (log pi(y_w) - log pi(y_l))), no reference (Zhao et al. 2023, SLiC-HF eq. 1 without NLL)."""
    return F.relu(1 + logps.margin_B - config.beta * (logps.chosen_B - logps.rejected_B))


def ipo(logps: PairLogps, config: LossConfig) -> Tensor:
    """(r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2, token means (Azar et al. 2023, eq. 17, tau = beta; TRL's form)."""
    return (_mean_gap(logps, config) - 1 / (2 * config.beta)) ** 2


def ipo_sum(logps: PairLogps, config: LossConfig) -> Tensor:
    """(d - 1 / (2 beta))^2, of sums as written (Azar et al. 2023, eq. 17, tau = beta)."""
    return (_gap(logps, config) - 1 / (2 * config.beta)) ** 2


def dpo_norm(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta (r_w / |y_w| - r_l / |y_l|)), beta of 2 to 10 (Lambert et al. 2024, Tulu 3)."""
    return _logistic(config.beta * _mean_gap(logps, config), logps, config)


def simpo(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma), no reference (Meng et al. 2024, eq. 6)."""
    chosen_B = _per_token(logps.chosen_B, logps.chosen_length_B)
    rejected_B = _per_token(logps.rejected_B, logps.rejected_length_B)
    return _logistic(config.beta * (chosen_B - rejected_B) - config.simpo_gamma, logps, config)


def cpo(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) + NLL(y_w) / |y_w|, no reference (Xu et al. 2024, TRL's NLL)."""
    return _logistic(config.beta * (logps.chosen_B - logps.rejected_B), logps, config) + chosen_nll(logps)


def orpo(logps: PairLogps, config: LossConfig) -> Tensor:
    """NLL(y_w) / |y_w| - beta log sigma(log-odds_w - log-odds_l), p = token mean, no reference (Hong et al. 2024)."""
    chosen_B = _log_odds(_per_token(logps.chosen_B, logps.chosen_length_B))
    rejected_B = _log_odds(_per_token(logps.rejected_B, logps.rejected_length_B))
    return chosen_nll(logps) - config.beta * F.logsigmoid(chosen_B - rejected_B)


def nca_pair(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta r_w) - [log sigma(-beta r_w) + log sigma(-beta r_l)] / 2 (Chen et al. 2024, NCA for pairs)."""
    chosen_B, rejected_B = config.beta * logps.chosen_ratio_B, config.beta * logps.rejected_ratio_B
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def exo_pair(logps: PairLogps, config: LossConfig) -> Tensor:
    """KL(q || p) over the pair, q_w = sigma(beta d), p_w = 1 - e, e > 0 (Ji et al. 2024, eq. 16)."""
    logits_B = config.beta * _gap(logps, config) - logps.margin_B
    wrong_B = torch.as_tensor(_wrong(logps, config), dtype=logits_B.dtype)
    right = logits_B.sigmoid() * (F.logsigmoid(logits_B) - (-wrong_B).log1p())
    return right + (-logits_B).sigmoid() * (F.logsigmoid(-logits_B) - wrong_B.log())


def sppo_hard(logps: PairLogps, config: LossConfig) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2 (Wu et al. 2024, eq. 4.7, P of 1 and 0, beta = 1 / eta)."""
    aim = 1 / (2 * config.beta)
    return (logps.chosen_ratio_B - aim) ** 2 + (logps.rejected_ratio_B + aim) ** 2


def apo_zero(logps: PairLogps, config: LossConfig) -> Tensor:
    """1 - sigma(beta r_w) + sigma(beta r_l): chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7)."""
    return (-config.beta * logps.chosen_ratio_B).sigmoid() + (config.beta * logps.rejected_ratio_B).sigmoid()


def apo_down(logps: PairLogps, config: LossConfig) -> Tensor:
    """sigma(beta r_w) + 1 - sigma(beta d): both down, rejected more (D'Oosterlinck et al. 2024, eq. 8)."""
    ratio_B = logps.chosen_ratio_B
    return (config.beta * ratio_B).sigmoid() + (-config.beta * (ratio_B - logps.rejected_ratio_B)).sigmoid()


def discopop(logps: PairLogps, config: LossConfig) -> Tensor:
    """(1 - k) (-log sigma(x)) + k exp(-x), x = beta d, k = sigma(x / tau) (Lu et al. 2024, DiscoPOP eq. 5)."""
    logits_B = config.beta * _gap(logps, config) - logps.margin_B
    scaled_B = logits_B / config.discopop_tau
    # k exp(-x) in one exponent: where x is far below 0, 0 * inf would be NaN.
    return -(-scaled_B).sigmoid() * F.logsigmoid(logits_B) + _exp(F.logsigmoid(scaled_B) - logits_B)


def dpop(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta (d - lambda max(0, -r_w))): the chosen may not fall (Pal et al. 2024, Smaug eq. 3)."""
    fall_B = config.dpop_lambda * F.relu(-logps.chosen_ratio_B)
    return _logistic(config.beta * (logps.chosen_ratio_B - logps.rejected_ratio_B - fall_B), logps, config)


def rdpo(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log sigma(beta d + alpha (|y_w| - |y_l|)): length earns nothing (Park et al. 2024, R-DPO)."""
    length_B = config.rdpo_alpha * (logps.chosen_length_B - logps.rejected_length_B).to(logps.chosen_B.dtype)
    return _logistic(config.beta * _gap(logps, config) + length_B, logps, config)


def sft(logps: PairLogps, config: LossConfig) -> Tensor:
    """-log pi(y_w) / |y_w|: supervised fine-tuning on the chosen answers, each pair counting alike; no reference."""
    return chosen_nll(logps)


LOSSES: dict[str, Callable[[PairLogps, LossConfig], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "rso": hinge,  # as its paper names the method
    "slic": slic,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "dpo_norm": dpo_norm,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "nca_pair": nca_pair,
    "exo_pair": exo_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "dpop": dpop,
    "rdpo": rdpo,
    "sft": sft,
}

_LOGISTIC = {"sigmoid", "dpo_norm", "simpo", "cpo", "exo_pair", "dpop", "rdpo"}
_HINGED = {"hinge", "rso"}
READ_BY: dict[str, set[str]] = {
    "reference": LOSSES.keys() - {"slic", "simpo", "cpo", "orpo", "sft"},
    "label_smoothing": {*_LOGISTIC, "robust"},
    "soft_label": _LOGISTIC,
    "margin": {*_LOGISTIC, *_HINGED, "robust", "slic", "discopop"},
    "divergence": {*_HINGED, "sigmoid", "robust", "ipo", "ipo_sum", "dpo_norm", "exo_pair", "discopop", "rdpo"},
    "ld_alpha": LOSSES.keys() - {"cpo", "orpo", "sft"},
    "simpo_gamma": {"simpo"},
    "discopop_tau": {"discopop"},
    "dpop_lambda": {"dpop"},
    "rdpo_alpha": {"rdpo"},
}
"""Which losses look at a setting, a column of the rows, or the reference: elsewhere it would be silently ignored."""

# --- what is trained on ---------------------------------------------------------------------------------------------


def chosen_nll(logps: PairLogps) -> Tensor:
    """-log pi(y_w|x) / |y_w| per pair (Pang et al. 2024: the term that rpo_alpha weighs).

    Each pair's own length divides, so that pairs count alike; TRL divides by all the batch's tokens instead.
    """
    return -_per_token(logps.chosen_B, logps.chosen_length_B)


def desensitised(logps: PairLogps, alpha: float) -> PairLogps:
    """Sums in which a token beyond the other side's length weighs alpha, in policy and reference alike (LD-DPO).

    Liu et al. 2024: log pi(y) -> sum over t <= min(|y_w|, |y_l|) + alpha * the rest.
    """
    assert logps.tails_4B is not None, "LD-DPO needs the pairs' tails (dpo/pairs.py)"
    chosen_B, rejected_B, reference_chosen_B, reference_rejected_B = (1 - alpha) * logps.tails_4B
    return replace(
        logps,
        chosen_B=logps.chosen_B - chosen_B,
        rejected_B=logps.rejected_B - rejected_B,
        reference_chosen_B=logps.reference_chosen_B - reference_chosen_B,
        reference_rejected_B=logps.reference_rejected_B - reference_rejected_B,
    )


def wpo_weight(logps: PairLogps) -> Tensor:
    """pi(y_w)^(1/|y_w|) pi(y_l)^(1/|y_l|), no gradient: pairs the policy would say count (Zhou et al. 2024, WPO eq. 2).

    TRL divides each token by sum_v p_v^2 besides (the paper's sampled alignment), which needs the whole distribution.
    """
    chosen_B = _per_token(logps.chosen_B, logps.chosen_length_B)
    rejected_B = _per_token(logps.rejected_B, logps.rejected_length_B)
    return (chosen_B + rejected_B).detach().clamp(max=0).exp()


def swap_penalty(logps: PairLogps) -> Tensor:
    """(m - m')^2, m = log pi(y_w) - log pi(y_l) of a verdict and m' of its twin, the other order: our own, nats^2."""
    assert logps.twin_B is not None, "a swap penalty needs twins"
    margin_B = logps.chosen_B - logps.rejected_B
    return (margin_B - margin_B[logps.twin_B]) ** 2


def terms(config: LossConfig) -> dict[str, float]:
    """The losses that are added, by name, with their weights: loss.name with 1 and those of loss.mix."""
    found = {config.name: 1.0}
    for text in config.mix:
        name, _, number = text.partition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if name not in LOSSES or name in found or not 0 < weight < math.inf:
            raise UserError(
                f'loss.mix: "{text}" must be NAME:WEIGHT, e.g. sft:0.1, with a weight above 0 and a loss that is not '
                f"added yet ({', '.join(found)} {'is' if len(found) == 1 else 'are'}); losses: {', '.join(LOSSES)}"
            )
        found[name] = weight
    return found


def reads(config: LossConfig, what: str) -> bool:
    """Whether any of the configured losses looks at `what`, a key of READ_BY."""
    return not READ_BY[what].isdisjoint(terms(config)) and not (what == "reference" and config.reference_free)


def check_loss(config: LossConfig, columns: Collection[str]) -> None:
    """UserError where a loss is not there, lacks what it needs, or would ignore a setting or a column of the rows."""
    if config.name not in LOSSES:
        near = ["sigmoid"] if config.name.lower() == "dpo" else get_close_matches(config.name.lower(), LOSSES, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f'loss.name = "{config.name}": there is no such loss; {meant}Allowed are {", ".join(LOSSES)}')
    changed = {key: value for key, value in config if value != LossConfig.model_fields[key].default}
    given = {key: f"loss.{key} = {value}" for key, value in changed.items() if key in READ_BY}
    given |= {column: f"the rows' column {column}" for column in columns if column in READ_BY}
    for what, told in given.items():
        if not reads(config, what):
            readers = ", ".join(name for name in LOSSES if name in READ_BY[what])
            raise UserError(f"{told}: is not read by loss {' + '.join(terms(config))}; leave it out, or use {readers}")
    if "divergence_alpha" in changed and config.divergence != "alpha":
        raise UserError(
            f"loss.divergence_alpha = {config.divergence_alpha}: set loss.divergence=alpha, or leave it out"
        )
    if config.reference_free and READ_BY["reference"].isdisjoint(terms(config)):
        raise UserError(f"loss.reference_free: loss {' + '.join(terms(config))} has no reference anyway; leave it out")
    if "exo_pair" in terms(config) and not config.label_smoothing:
        raise UserError(
            "loss.label_smoothing = 0: exo_pair takes its log; set loss.label_smoothing=1e-3, as its paper does"
        )


def pair_losses(logps: PairLogps, config: LossConfig) -> Tensor:
    """The configured loss of every pair [B]: the terms, weighted as WPO says, + rpo_alpha * NLL + the swap penalty."""
    shorter = logps if config.ld_alpha == 1 else desensitised(logps, config.ld_alpha)
    losses_B = torch.zeros_like(logps.chosen_B)
    for name, weight in terms(config).items():
        losses_B = losses_B + weight * LOSSES[name](shorter if name in READ_BY["ld_alpha"] else logps, config)
    if config.wpo:
        losses_B = losses_B * wpo_weight(logps)
    if config.rpo_alpha:
        losses_B = losses_B + config.rpo_alpha * chosen_nll(logps)
    return losses_B + config.swap_consistency * swap_penalty(logps) if config.swap_consistency else losses_B


def losses_help() -> str:
    """What `--help` says of loss.name: every loss with its equation and paper."""
    return "\n".join(["losses (loss.name)", *(f"  {name}: {(f.__doc__ or '')}" for name, f in LOSSES.items())]) + "\n"


def reward_metrics(logps: PairLogps, losses_B: Tensor, weight_B: Tensor, beta: float) -> dict[str, float]:
    """Weighted SUMS over pairs under TRL's metric names (divide by `weight`): rewards are beta * log-ratios, in nats.

    A pair counts as right when its chosen reward is the larger, as half when they are equal.
    """
    chosen_B, rejected_B = beta * logps.chosen_ratio_B, beta * logps.rejected_ratio_B
    margin_B = chosen_B - rejected_B
    columns = {
        "loss": losses_B,
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": margin_B,
        "rewards/accuracies": (margin_B > 0).double() + 0.5 * (margin_B == 0).double(),
        "logps/chosen": logps.chosen_B,
        "logps/rejected": logps.rejected_B,
        "weight": torch.ones_like(weight_B),
    }
    return {name: float((column_B.detach() * weight_B).sum()) for name, column_B in columns.items()}
