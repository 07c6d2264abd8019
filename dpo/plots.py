"""A run's plots: loss, reward margins and accuracy over the optimizer steps, training line and validation points.

No dimension letters. Read next: dpo/report.py.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dpo.results import Metrics, Results, widest_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, TRAIN_FAINT, VALIDATION, OTHER, GREY = "#1f5a99", "#a9c4e0", "#c8452f", "#c77d1e", "#8a8f98"


def _series(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _training_line(axes: "Axes", metrics: Metrics, name: str) -> None:
    """Every step faintly, and in front of it the mean over about a twentieth of the steps."""
    steps, values = _series(metrics, name)
    width = len(steps) // 20
    axes.plot(steps, values, color=TRAIN_FAINT if width > 1 else TRAIN, lw=1, label="" if width > 1 else "training")
    if width > 1:
        centre, mean = (np.convolve(of, np.ones(width) / width, mode="valid") for of in (steps, values))
        axes.plot(centre, mean, color=TRAIN, lw=1.8, label=f"training, and its mean over {width} steps")


def _points(axes: "Axes", metrics: Metrics, name: str, label: str, color: str) -> None:
    steps, values = _series(metrics, name)
    if steps:
        axes.plot(steps, values, "o-", color=color, lw=1, ms=5, label=label)


def _plot_loss(axes: "Axes", metrics: Metrics, results: Results) -> None:
    _training_line(axes, metrics, "loss")
    _points(axes, metrics, "eval/loss", "validation", VALIDATION)
    axes.axhline(results["step0_loss"], color=GREY, lw=1, ls=":", label="before the first update")


def _plot_margins(axes: "Axes", metrics: Metrics, results: Results) -> None:
    axes.axhline(0, color=GREY, lw=1, ls=":")
    _training_line(axes, metrics, "rewards/margins")
    _points(axes, metrics, "eval/rewards/margins", "validation", VALIDATION)


def _plot_accuracy(axes: "Axes", metrics: Metrics, results: Results) -> None:
    _points(axes, metrics, "eval/averaged_accuracy", "validation, order-averaged", TRAIN)
    _points(axes, metrics, "eval/accuracy", "validation, consistent", OTHER)
    base = results["judge"]["base"]
    for name, value, (low, high), color in (
        ("order-averaged", base["averaged_accuracy"], widest_interval(base), TRAIN),
        ("consistent", base["accuracy"], base["accuracy_interval"], OTHER),
    ):
        axes.axhspan(low, high, color=color, alpha=0.13, lw=0)
        axes.axhline(value, color=color, lw=1.2, ls="--", label=f"base on the test rows, {name}")
    axes.set_xlim(0, metrics[-1]["step"] * 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")


PLOTS: dict[str, tuple[str, Callable[["Axes", Metrics, Results], None]]] = {
    "accuracy": ("Accuracy on the validation rows", _plot_accuracy),
    "margins": ("Reward margin, chosen less rejected (nats)", _plot_margins),
    "loss": ("Loss", _plot_loss),
}


def draw(name: str, metrics: Metrics, results: Results) -> bytes:
    """One of PLOTS as a PNG."""
    from matplotlib.figure import Figure  # 30 MiB and half a second that training need not carry

    title, plot = PLOTS[name]
    figure = Figure(figsize=(6, 3.8), dpi=175, layout="constrained")
    axes = figure.add_subplot()
    plot(axes, metrics, results)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
