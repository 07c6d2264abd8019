"""Alarms: what is going wrong in a run, told once when it shows, with what it means and what to try.

Each is a function of lines of metrics.jsonl, so that a resumed run is told what an uninterrupted one is.
No dimension letters. Read next: dpo/loop.py, which asks after every step.
"""

import math
import statistics
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
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


class Kind(NamedTuple):
    """`sign` is its value where it shows in a run's first and last WINDOW training lines; texts: dpo/alarms.toml."""

    sign: Callable[[Sequence[Line], Config], float | None]
    least: int  # lines that it takes
    rewards: bool  # it reads rewards, of which a loss without a reference has none
    meaning: str
    advice: str


def _mean(lines: Sequence[Line], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _falling(lines: Sequence[Line], config: Config) -> float | None:
    chosen, rejected = (
        (_mean(lines[-WINDOW:], name) - _mean(lines[:WINDOW], name)) / config.loss.beta
        for name in ("rewards/chosen", "rewards/rejected")
    )
    return chosen if max(chosen, rejected) < -FALL_NATS else None


def _divergence(lines: Sequence[Line], config: Config) -> float | None:
    moved = [(abs(line["rewards/chosen"]) + abs(line["rewards/rejected"])) / 2 for line in lines[-WINDOW:]]
    return statistics.fmean(moved) / config.loss.beta if statistics.fmean(moved) > SATURATED else None


def _chance(lines: Sequence[Line], config: Config) -> float | None:
    done = max(lines[-1]["epoch"] / config.train.epochs, lines[-1]["step"] / (config.train.max_steps or math.inf))
    if done < LATE:
        return None
    shares = [line["rewards/accuracies"] for line in lines[-WINDOW:]]
    share = statistics.fmean(shares)
    return share if share + 2 * statistics.stdev(shares) / WINDOW**0.5 < CHANCE else None


def _spike(lines: Sequence[Line], config: Config) -> float | None:
    *norms, last = (line["grad_norm"] for line in lines[-WINDOW - 1 :])
    usual = statistics.median(norms)
    return last / usual if usual and last > SPIKE * usual else None


def _clipped(lines: Sequence[Line], config: Config) -> float | None:
    if not config.train.clip_norm:
        return None
    least = min(line["grad_norm"] for line in lines[-WINDOW:]) / config.train.clip_norm
    return least if least > CLIPPED else None


def _without_gradient(lines: Sequence[Line], config: Config) -> float | None:
    count = lines[-1].get("without_gradient", 0.0)
    return count if count and lines[-1]["step"] >= GRADIENT_STEPS else None


def _difference(lines: Sequence[Line], config: Config) -> float | None:
    difference = lines[-1].get("reference_difference", 0.0)
    return None if difference <= DIFFERENCE else difference


_TEXTS = tomllib.loads(Path(__file__).with_name("alarms.toml").read_text(encoding="utf-8"))
_SIGNS = {
    "both_rewards_fall": (_falling, 2 * WINDOW, True),
    "far_from_reference": (_divergence, WINDOW, True),
    "accuracy_at_chance": (_chance, 2 * WINDOW, True),
    "gradient_spike": (_spike, WINDOW + 1, False),
    "always_clipped": (_clipped, WINDOW, False),
    "without_gradient": (_without_gradient, 1, False),
    "reference_drift": (_difference, 1, False),
}
ALARMS = {name: Kind(*sign, **_TEXTS[name]) for name, sign in _SIGNS.items()}


class Watch:
    """Which alarms a run has raised; `kept` are the lines that a resumed run's metrics.jsonl already has."""

    def __init__(self, config: Config, kept: Sequence[Line] = ()) -> None:
        self.config = config
        self.lines = [line for line in kept if "loss" in line]  # of training: all, or the first and last WINDOW
        self.raised = {alarm["name"] for alarm in alarms_of(kept)}

    def after(self, step: int, metrics: Line) -> list[Alarm]:
        """The alarms that show for the first time after this training step."""
        self.lines.append({"step": step, **metrics})
        del self.lines[WINDOW:-WINDOW]
        rewards = reads(self.config.loss, "reference")
        fresh = []
        for name, kind in ALARMS.items():
            if name not in self.raised and len(self.lines) >= kind.least and (rewards or not kind.rewards):
                value = kind.sign(self.lines, self.config)
                fresh += [] if value is None else [_alarm(name, step, value)]
        self.raised |= {alarm["name"] for alarm in fresh}
        return fresh


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
