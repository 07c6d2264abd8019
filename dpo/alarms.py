"""Alarms: what is going wrong in a run, told once when it shows, with what it means and what to try.

Each is a function of lines of metrics.jsonl, so that a resumed run is told what an uninterrupted one is.
No dimension letters. Read next: dpo/loop.py, which asks after every step.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dpo.config import Config
from dpo.losses import reads
from dpo.results import Alarm

WINDOW = 20  # steps that a figure is averaged over; with 16 pairs a step an accuracy's standard error is .03
FALL_NATS = 1.0  # a fall of an answer's log-ratio that is told: e times less probable
SATURATED = 10.0  # reward units; the sigmoid's slope at a margin of 10 is 5e-5: what moves on is not the loss's doing
CHANCE = 0.55  # an accuracy whose upper bound is below it has learnt nothing that matters
LATE = 2 / 3  # share of the run before which nothing is said of that: a judge may start late (experiments/LOG.md)
SPIKE = 10.0  # times the median of the window: no step's rows differ that much from others'
CLIPPED = 10.0  # times clip_norm in every step of a window: less than a tenth is ever left of a gradient
GRADIENT_STEPS = 5  # a LoRA update's A has none in step 1, where B is 0; by then everything has had one
DIFFERENCE = 1e-5  # nats a completion; on a CPU more than this stops the run (dpo/loop.py), elsewhere it is told

Line = dict[str, float]
Sign = Callable[[Sequence[Line], Config], float | None]


class Kind(NamedTuple):
    """`sign` is its value where it shows in a run's first and last WINDOW training lines; `meaning` says what it is."""

    sign: Sign
    meaning: str
    advice: str


def _mean(lines: Sequence[Line], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _falling(lines: Sequence[Line], config: Config) -> float | None:
    if len(lines) < 2 * WINDOW or not reads(config.loss, "reference"):
        return None
    chosen, rejected = (
        (_mean(lines[-WINDOW:], name) - _mean(lines[:WINDOW], name)) / config.loss.beta
        for name in ("rewards/chosen", "rewards/rejected")
    )
    return chosen if max(chosen, rejected) < -FALL_NATS else None


def _divergence(lines: Sequence[Line], config: Config) -> float | None:
    if len(lines) < WINDOW or not reads(config.loss, "reference"):
        return None
    moved = [(abs(line["rewards/chosen"]) + abs(line["rewards/rejected"])) / 2 for line in lines[-WINDOW:]]
    return statistics.fmean(moved) / config.loss.beta if statistics.fmean(moved) > SATURATED else None


def _chance(lines: Sequence[Line], config: Config) -> float | None:
    if len(lines) < 2 * WINDOW or not reads(config.loss, "reference"):
        return None
    done = max(lines[-1]["epoch"] / config.train.epochs, lines[-1]["step"] / (config.train.max_steps or math.inf))
    if done < LATE:
        return None
    shares = [line["rewards/accuracies"] for line in lines[-WINDOW:]]
    share = statistics.fmean(shares)
    return share if share + 2 * statistics.stdev(shares) / WINDOW**0.5 < CHANCE else None


def _spike(lines: Sequence[Line], config: Config) -> float | None:
    if len(lines) <= WINDOW:
        return None
    *norms, last = (line["grad_norm"] for line in lines[-WINDOW - 1 :])
    usual = statistics.median(norms)
    return last / usual if usual and last > SPIKE * usual else None


def _clipped(lines: Sequence[Line], config: Config) -> float | None:
    if len(lines) < WINDOW or not config.train.clip_norm:
        return None
    least = min(line["grad_norm"] for line in lines[-WINDOW:]) / config.train.clip_norm
    return least if least > CLIPPED else None


def _without_gradient(lines: Sequence[Line], config: Config) -> float | None:
    count = lines[-1].get("without_gradient", 0.0)
    return count if count and lines[-1]["step"] >= GRADIENT_STEPS else None


def _difference(lines: Sequence[Line], config: Config) -> float | None:
    difference = lines[-1].get("reference_difference", 0.0)
    return None if difference <= DIFFERENCE else difference


ALARMS: dict[str, Kind] = {
    "both_rewards_fall": Kind(
        _falling,
        "nats by which the chosen answers' mean log-ratio has changed; the rejected ones' has fallen as well. A DPO "
        "loss sees only their difference, and probability goes to answers that are in no row",
        "harmless to a judge of verdicts; where the model is to write such answers: loss.rpo_alpha=1, "
        "loss.mix=sft:0.1, loss.name=dpop, a larger loss.beta or a lower train.lr",
    ),
    "far_from_reference": Kind(
        _divergence,
        "nats: mean |log-ratio| to the reference of the trained answers. It stands in for the KL divergence, which "
        "would take answers drawn from the policy. So far out the loss is flat, and what still moves is not meant",
        "a larger loss.beta, a lower train.lr, fewer epochs, or loss.name=ipo, whose margin has an end",
    ),
    "accuracy_at_chance": Kind(
        _chance,
        "reward accuracy over the last steps, all ranks' pairs, ties as halves: the policy does not tell chosen from "
        "rejected better than a coin, though most of the run is over",
        "look at rows (show=3) for swapped or equal answers; then a higher train.lr (LoRA takes ten times that of full "
        "fine-tuning), a larger lora.rank, a lower loss.beta, more steps",
    ),
    "gradient_spike": Kind(
        _spike,
        "times the median norm of the steps before: one step's rows pull far harder than all others'",
        "look at those rows: very long or broken answers, swapped labels; a lower train.clip_norm or train.lr",
    ),
    "always_clipped": Kind(
        _clipped,
        "times train.clip_norm that the gradient's norm had at least, in every one of the last steps: each step weighs "
        "the same, whatever its rows say",
        "a larger train.clip_norm or, if the loss rises and falls, a lower train.lr; AdamW does not mind the scale",
    ),
    "without_gradient": Kind(
        _without_gradient,
        "trained parameters have never had a gradient that is not zero: they stay as they were",
        "check that lora.targets names layers that are used; if it names the right ones, report this",
    ),
    "reference_drift": Kind(
        _difference,
        "nats a completion between the policy before its first update and the stored log-probs of the same weights: "
        "the reference is not quite the policy's start, and every margin is off by as much",
        "set reference.store to a new folder; if it stays, it is this device's arithmetic: report it",
    ),
}


def signs(lines: Sequence[Line], config: Config) -> dict[str, float]:
    """The alarms that show after the last of `lines`: a run's training lines, all or the first and last WINDOW."""
    found = {name: kind.sign(lines, config) for name, kind in ALARMS.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass
class Watch:
    """Which alarms a run has raised; `kept` are the lines that a resumed run's metrics.jsonl already has."""

    config: Config
    kept: Sequence[Line] = ()
    _training: list[Line] = field(init=False)
    _raised: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._training = [line for line in self.kept if "loss" in line]
        self._raised = {alarm["name"] for alarm in alarms_of(self.kept)}

    def after(self, step: int, metrics: Line) -> list[Alarm]:
        """The alarms that show for the first time after this training step."""
        self._training.append({"step": step, **metrics})
        del self._training[WINDOW:-WINDOW]
        fresh = {k: value for k, value in signs(self._training, self.config).items() if k not in self._raised}
        self._raised |= fresh.keys()
        return [_alarm(name, step, value) for name, value in fresh.items()]


def alarms_of(metrics: Sequence[Line], parameters: Sequence[str] = ()) -> list[Alarm]:
    """The alarms that a run's metrics.jsonl records, in order; `parameters` are those without a gradient."""
    found = [(name, line) for line in metrics for name in ALARMS if f"alarm/{name}" in line]
    return [_alarm(name, int(line["step"]), line[f"alarm/{name}"], parameters) for name, line in found]


def _alarm(name: str, step: int, value: float, parameters: Sequence[str] = ()) -> Alarm:
    kind = ALARMS[name]
    named = f" ({', '.join(parameters[:10])}{', ...' * (len(parameters) > 10)})" if name == "without_gradient" else ""
    return {"name": name, "step": step, "value": value, "meaning": kind.meaning + named, "advice": kind.advice}


def told(alarm: Alarm) -> str:
    """One line for the terminal."""
    return "alarm: {name} after step {step}: {value:.3g} {meaning}. Try: {advice}".format_map(alarm)
