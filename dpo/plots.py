"""Charts by matplotlib, as SVG: crisp at any width, light or dark as the reader's screen is, told apart without colour.

No dimension letters. A chart is 400 units wide, so that its text is as large on a phone as in a column of a desktop
page; heights and places are in the same units, from the top left. Read next: dpo/report.py.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from dpo.escape import escaped, visible
from dpo.results import Metrics, Results

WIDTH, LEFT, RIGHT, TOP, HEIGHT, LINE = 400, 46, 380, 30, 200, 17
MOST_LETTERS = 44  # of a line of text: as many as fit
LOOK = Path(__file__).with_name("plots.mplstyle")
STYLE = "\n" + Path(__file__).with_name("plots.css").read_text(encoding="utf-8")
GRID, *TONES = "#dfe3e8", "#0060a8", "#c24e00", "#00785a", "#a8487e", "#5f6670"  # plots.css has them, light and dark
VARIABLES = {GRID: "--grid"} | {colour: f"--tone{tone}" for tone, colour in enumerate(TONES)}
DASHES = ((6, 4), (2, 3), (9, 3, 2, 3), (1, 4), (12, 3))  # of dashed lines, by tone
SHAPES = "os^Dv"  # of points, by tone


@dataclass(frozen=True)
class Mark:
    """One named thing on a chart; `tone` is its colour, shape and dash; a NaN breaks a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 0
    kind: Literal["line", "faint", "dashed", "points", "joined"] = "line"
    interval: Sequence[Sequence[float]] = ()  # of each y: a whisker, of a dashed line a band

    @property
    def look(self) -> dict[str, Any]:
        """As matplotlib's settings; the sixth tone has the first's colour and another shape."""
        colour = self.tone % len(TONES)
        width = {"line": 2.0, "faint": 1.0}.get(self.kind, 1.4)
        look = {"color": TONES[colour], "linewidth": width, "alpha": 0.4 if self.kind == "faint" else 1.0}
        if self.kind == "dashed":
            look["linestyle"] = (0, tuple(length / width for length in DASHES[colour]))
        if self.kind in ("points", "joined"):
            shape = SHAPES[(self.tone + self.tone // len(SHAPES)) % len(SHAPES)]
            look |= {"marker": shape, "markersize": 7, "markeredgewidth": 0}
            look["linestyle"] = "none" if self.kind == "points" else "solid"
        return look


@dataclass(frozen=True)
class Axis:
    """`ends`: what it reaches, where given; `percent`: shares, written as per cent; `log`: all is above 0.

    `ticks`: the few values that there are, where these are what should be written.
    """

    label: str
    ends: tuple[float, float] | None = None
    percent: bool = False
    log: bool = False
    ticks: Sequence[float] = ()


def _lines(text: str) -> list[str]:
    return textwrap.wrap(visible(text), MOST_LETTERS) or [""]


def _drawing(title: str, height: float, legend: Sequence[Mark]) -> tuple[Figure, float]:
    """A title, room of this height (the second value is where it begins), and a legend with a line for each mark."""
    head, names = _lines(title), [_lines(mark.name) for mark in legend]
    top = TOP + LINE * (len(head) - 1)
    whole = top + height + LINE * sum(map(len, names))
    figure = Figure(figsize=(WIDTH / 72, whole / 72), dpi=72)  # a point is a unit
    figure.text(4 / WIDTH, 1 - 4 / whole, "\n".join(head), weight="bold", verticalalignment="top")
    keys, under = [Line2D([], [], **mark.look) for mark in legend], (LEFT / WIDTH, 1 - (top + height) / whole)
    figure.legend(keys, ["\n".join(name) for name in names], loc="upper left", bbox_to_anchor=under)
    return figure, top


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    whole = 72 * figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / whole, width / WIDTH, height / whole))


def _svg(figure: Figure, title: str, description: str) -> str:
    """The drawing to stand in a page: named, its colours variables of plots.css, no id that another drawing has."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    for one in figure.findobj():  # nothing is drawn outside, and a clip would be a reference to elsewhere
        one.set_clip_on(False)
    with rc_context({"svg.hashsalt": escaped(title)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that its font lacks: the reader's browser has it
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    body = re.sub('<g id="[^"]*">', "<g>", file.getvalue().partition("</defs>\n")[2])  # behind a style for all the page
    body = re.sub('font-family: [^;"]*;? ?', "", body)
    body = re.sub(": (#[0-9a-f]{6})", lambda found: f": var({VARIABLES[found[1]]})", body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="plot" '
        f'viewBox="0 0 {WIDTH} {72 * figure.get_figheight():g}" role="img"><title>{escaped(title)}</title>'
        f"<desc>{escaped(description)}</desc>\n{body.strip()}"
    )


def _scale(axes: Axes, which: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> None:
    """Set up one of the two axes for these values."""
    on = getattr(axes, f"{which}axis")
    ends = axis.ends
    locator: Locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    if axis.log:  # whole decades
        axes.set(**{f"{which}scale": "log"})
        decades = [math.log10(value) for value in values] or [0.0]
        low, high = math.floor(min(decades)), math.ceil(max(decades))
        ends, locator = (10.0**low, 10.0 ** max(high, low + 1)), LogLocator()
    if axis.ticks:
        ends, locator = None, FixedLocator(list(axis.ticks))
    if ends:
        axes.set(**{f"{which}lim": ends})
    on.set_major_locator(locator)
    on.set_minor_locator(NullLocator())
    many, unit = (100, "%") if axis.percent else (1, "")
    on.set_major_formatter(FuncFormatter(lambda tick, _: f"{round(many * tick, 12):,g}{unit}"))


@rc_context(fname=LOOK)
def chart(title: str, x: Axis, y: Axis, marks: Sequence[Mark]) -> str:
    """Marks over two axes; its description holds where each line begins and ends, the page's tables hold the rest."""
    figure, top = _drawing(title, HEIGHT + 46, marks)
    axes = _axes(figure, LEFT, top, RIGHT - LEFT, HEIGHT)
    axes.set_xlabel(visible(x.label))
    for mark in marks:
        drawn: list[Artist] = [*axes.plot(mark.x, mark.y, **mark.look)]
        if mark.kind == "dashed" and mark.interval:
            axes.axhspan(*mark.interval[0], color=mark.look["color"], alpha=0.13, linewidth=0)
        elif mark.interval:
            look = {key: mark.look[key] for key in ("color", "linewidth")}
            drawn.append(axes.vlines(mark.x, *zip(*mark.interval, strict=True), **look))
        if mark.kind == "joined" and mark.interval:  # so that whiskers do not hide each other
            aside = ScaledTranslation(5 / 72 * (mark.tone - (len(marks) - 1) / 2), 0, figure.dpi_scale_trans)
            for one in drawn:
                one.set_transform(axes.transData + aside)
    _scale(axes, "x", x, [at for mark in marks for at in mark.x])
    _scale(axes, "y", y, [value for mark in marks for value in mark.y])
    told = []
    for mark in marks:
        finite = [value for value in mark.y if math.isfinite(value)]
        told += [f"{mark.name}: from {finite[0]:.3g} to {finite[-1]:.3g}"] if finite else []
    return _svg(figure, title, f"{y.label} over {x.label}. {'; '.join(told)}.")


@rc_context(fname=LOOK)
def bars(title: str, groups: Mapping[str, Sequence[tuple[float, Sequence[float]] | None]], names: Sequence[str]) -> str:
    """Shares in [0, 1] with their intervals, a bar for each of `names` that a group has; dashed: one half."""
    heads, shown, end, told = [], [], 0.0, []
    for group, shares in groups.items():
        heads.append((end, "\n".join(_lines(group))))
        end += LINE * len(_lines(group))
        for tone, of in enumerate(shares):
            if of is not None:
                shown.append((end + 5.5, tone, of[0], list(of[1])))
                told.append(f"{group}, {names[tone]}: {100 * of[0]:.1f} %")
                end += 15
        end += 7
    marks = [Mark(name, (), (), tone, "joined") for tone, name in enumerate(names)]
    figure, top = _drawing(title, end + LINE + 8, marks)
    left, width = 8, WIDTH - 66
    axes = _axes(figure, left, top, width, end)
    axes.set(xlim=(0, 1), ylim=(end, 0), xmargin=0)
    axes.set_axis_off()
    axes.axvline(0.5, color=GRID, linewidth=1, linestyle=(0, (4, 3)))
    for at, name in heads:
        axes.text(0, at, name, verticalalignment="top")
    for at, tone, share, ends in shown:
        look = marks[tone].look
        axes.barh(at, share, 11, color=look["color"], alpha=0.35)
        axes.plot(ends, [at, at], color=look["color"], linewidth=1.6)
        axes.plot([share], [at], **look)
        end_of_line = (WIDTH - 4 - left) / width
        axes.text(end_of_line, at, f"{100 * share:.1f}%", horizontalalignment="right", verticalalignment="center")
    axes.text(0, end + 2, "Means with their 95 % intervals; dashed: one half", verticalalignment="top")
    return _svg(figure, title, "; ".join(told))


def file_text(svg: str) -> str:
    """A chart as a file of its own."""
    return svg.replace(">", f"><style>{STYLE}</style>", 1)


# --- a training's charts --------------------------------------------------------------------------------------------


def _series(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _training(metrics: Metrics, name: str) -> list[Mark]:
    """Every step faintly, and in front of it the mean over about a twentieth of the steps."""
    steps, values = _series(metrics, name)
    width = len(steps) // 20
    if width < 2:
        return [Mark("training", steps, values)]
    mean = [sum(values[at : at + width]) / width for at in range(len(values) - width + 1)]
    centre = [steps[at] + (width - 1) / 2 for at in range(len(mean))]
    return [
        Mark("training, every step", steps, values, kind="faint"),
        Mark(f"training, mean over {width} steps", centre, mean),
    ]


def _validation(metrics: Metrics, name: str, label: str = "validation", tone: int = 1) -> list[Mark]:
    steps, values = _series(metrics, name)
    return [Mark(label, steps, values, tone, "joined")] if steps else []


def training_plots(metrics: Metrics, results: Results) -> dict[str, tuple[str, str]]:
    """Accuracy on validation rows, reward margin and loss over the optimizer steps: (title, SVG) by name."""
    steps = Axis("optimizer step", (0, metrics[-1]["step"]))
    whole, base = (0.0, metrics[-1]["step"]), results["judge"]["base"]
    averaged, consistent = [base["averaged_accuracy"]] * 2, [base["accuracy"]] * 2
    accuracy = [
        *_validation(metrics, "eval/averaged_accuracy", "validation, order-averaged", 0),
        *_validation(metrics, "eval/accuracy", "validation, consistent", 1),
        Mark("base on the test rows, order-averaged", whole, averaged, 0, "dashed", [base["averaged_interval"]]),
        Mark("base on the test rows, consistent", whole, consistent, 1, "dashed", [base["accuracy_interval"]]),
    ]
    margins = [*_training(metrics, "rewards/margins"), *_validation(metrics, "eval/rewards/margins")]
    begun = Mark("before the first update", whole, [results["step0_loss"]] * 2, 2, "dashed")
    losses = [*_training(metrics, "loss"), *_validation(metrics, "eval/loss"), begun]
    plots = {
        "accuracy": ("Accuracy on the validation rows", Axis("accuracy", (0, 1), percent=True), accuracy),
        "margins": ("Reward margin, chosen less rejected (nats)", Axis("margin"), margins),
        "loss": ("Loss", Axis("loss"), losses),
    }
    return {name: (title, chart(title, steps, axis, marks)) for name, (title, axis, marks) in plots.items()}
