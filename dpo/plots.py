"""Charts as SVG of our own: crisp at any width, light or dark as the reader's screen is, told apart without colour.

No dimension letters. A chart is 400 wide, so that its text is as large on a phone as in a column of a desktop page.
Read next: dpo/report.py.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo.escape import escaped, visible
from dpo.results import Metrics, Results

WIDTH, LEFT, RIGHT, TOP, HEIGHT, LINE = 400, 46, 380, 30, 200, 17
MOST_LETTERS = 44  # of a line of the legend: as many as fit
MOST_POINTS = 700  # of a line: more than its pixels
STYLE = "\n" + Path(__file__).with_name("plots.css").read_text(encoding="utf-8")
DASHES = ("6 4", "2 3", "9 3 2 3", "1 4", "12 3")  # of dashed lines, by tone
SHAPES = (  # of points, by tone
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6L4.6 3.6H-4.6z",
    "M0-5L5 0 0 5-5 0z",
    "M-4.6-3.6H4.6L0 4.6z",
)


@dataclass(frozen=True)
class Mark:
    """One named thing on a chart; `tone` is its colour, shape and dash; a NaN breaks a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 0
    kind: Literal["line", "faint", "dashed", "points", "joined"] = "line"
    interval: Sequence[Sequence[float]] = ()  # of each y: a whisker, of a dashed line a band


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


Scale = tuple[float, float, list[float]]  # low, high, ticks, in what is drawn


def _scale(axis: Axis, values: Sequence[float]) -> Scale:
    finite = [math.log10(value) if axis.log else value for value in values if math.isfinite(value)]
    low, high = axis.ends or (min(finite, default=0.0), max(finite, default=1.0))
    if axis.ticks:
        room = (high - low or 1.0) / 12
        return low - room, high + room, [math.log10(tick) if axis.log else tick for tick in axis.ticks]
    if axis.log:
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
        return low, high, [float(tick) for tick in range(low, high + 1)]
    spread = high - low or abs(high) or 1.0
    rough = spread / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= 0.999 * rough)
    if axis.ends is None:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(max(high, low + 1e-9 * spread) / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return low, high, [tick * step for tick in range(first, last + 1)]


def _label(axis: Axis, tick: float) -> str:
    value = 10**tick if axis.log else tick
    return f"{100 * value:g}%" if axis.percent else f"{round(value, 12):,g}"


def _narrow(line: str) -> str:
    """What makes a long line of text as narrow as the chart."""
    return ' textLength="380" lengthAdjust="spacingAndGlyphs"' if len(visible(line)) > 54 else ""


def _svg(title: str, description: str, body: Sequence[str], height: float) -> str:
    narrow = _narrow(title)
    title, description = escaped(title), escaped(description)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img">'
        f'<title>{title}</title><desc>{description}</desc><text class="name" x="4" y="16"{narrow}>{title}</text>\n'
        + "\n".join(body)
        + "\n</svg>"
    )


def _point(x: float, y: float, tone: int) -> str:
    colour = tone % len(SHAPES)
    shape = SHAPES[(tone + tone // len(SHAPES)) % len(SHAPES)]  # the sixth has the first's colour and another shape
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="var(--tone{colour})"/>'


def _stroke(mark: Mark) -> str:
    colour = mark.tone % len(DASHES)
    more = {"dashed": f' stroke-dasharray="{DASHES[colour]}"', "faint": ' opacity=".4"'}.get(mark.kind, "")
    width = {"line": 2.0, "faint": 1.0}.get(mark.kind, 1.4)
    return f'fill="none" stroke="var(--tone{colour})" stroke-width="{width:g}"{more}'


def _legend(marks: Sequence[Mark], y: float) -> tuple[list[str], float]:
    """A line for each mark, more for a long name; and where the next one would stand."""
    lines = []
    for mark in marks:
        if mark.kind != "points":
            lines.append(f'<path d="M{LEFT} {y - 4:g}h22" {_stroke(mark)}/>')
        if mark.kind in ("points", "joined"):
            lines.append(_point(LEFT + 11, y - 4, mark.tone))
        for part in textwrap.wrap(visible(mark.name), MOST_LETTERS) or [""]:
            lines.append(f'<text x="{LEFT + 30}" y="{y:g}">{escaped(part)}</text>')
            y += LINE
    return lines, y


def chart(title: str, x: Axis, y: Axis, marks: Sequence[Mark]) -> str:
    """Marks over two axes; its description holds where each line begins and ends, the page's tables hold the rest."""
    reach_y = [value for mark in marks for value in (*mark.y, *(end for ends in mark.interval for end in ends))]
    least_x, most_x, ticks_x = _scale(x, [value for mark in marks for value in mark.x])
    least_y, most_y, ticks_y = _scale(y, reach_y)

    def place_x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * ((math.log10(value) if x.log else value) - least_x) / (most_x - least_x)

    def place_y(value: float) -> float:
        return TOP + HEIGHT - HEIGHT * (value - least_y) / (most_y - least_y)

    body = []
    for tick in ticks_y:
        at = place_y(tick)
        body.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_label(y, tick)}</text>')
    for tick in ticks_x:
        at = place_x(10**tick if x.log else tick)
        body.append(f'<text x="{at:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{_label(x, tick)}</text>')
    label = escaped(x.label)
    body.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{TOP + HEIGHT + 35}" text-anchor="middle">{label}</text>')
    told = []
    for mark in marks:
        thin = max(1, len(mark.x) // MOST_POINTS)
        points = [*zip(mark.x, mark.y, strict=True)][::thin]
        aside = 5 * (mark.tone - (len(marks) - 1) / 2) if mark.kind == "joined" and mark.interval else 0.0
        drawn = [(place_x(at) + aside, place_y(value)) if math.isfinite(value) else None for at, value in points]
        if mark.kind == "dashed" and mark.interval:
            top, bottom = place_y(mark.interval[0][1]), place_y(mark.interval[0][0])
            colour = f'fill="var(--tone{mark.tone % len(DASHES)})" opacity=".13"'
            body.append(f'<rect x="{LEFT}" y="{top:.1f}" width="{RIGHT - LEFT}" height="{bottom - top:.1f}" {colour}/>')
        if mark.kind != "points":
            pen = ["M" if at == 0 or drawn[at - 1] is None else "L" for at in range(len(drawn))]
            path = "".join(f"{how}{to[0]:.1f} {to[1]:.1f}" for how, to in zip(pen, drawn, strict=True) if to)
            body.append(f'<path d="{path}" {_stroke(mark)}/>')
        if mark.kind in ("points", "joined"):
            whiskers = zip(drawn, mark.interval, strict=True) if mark.interval else ()
            body += [
                f'<path d="M{to[0]:.1f} {place_y(ends[0]):.1f}V{place_y(ends[1]):.1f}" {_stroke(mark)}/>'
                for to, ends in whiskers
                if to
            ]
            body += [_point(*to, mark.tone) for to in drawn if to]
        finite = [value for _, value in points if math.isfinite(value)]
        told += [f"{mark.name}: from {finite[0]:.3g} to {finite[-1]:.3g}"] if finite else []
    legend, end = _legend(marks, TOP + HEIGHT + 56)
    body += legend
    return _svg(title, f"{y.label} over {x.label}. {'; '.join(told)}.", body, end - 8)


def bars(title: str, groups: Mapping[str, Sequence[tuple[float, Sequence[float]] | None]], names: Sequence[str]) -> str:
    """Shares in [0, 1] with their intervals, a bar for each of `names` that a group has; dashed: one half."""
    left, right, y = 8, WIDTH - 58, 30.0

    def place(share: float) -> float:
        return left + (right - left) * share

    body, told = [], []
    for group, shares in groups.items():
        body.append(f'<text x="{left}" y="{y + 11:g}"{_narrow(group)}>{escaped(group)}</text>')
        y += 17
        for tone, of in enumerate(shares):
            if of is None:
                continue
            share, (low, high) = of
            colour = f"var(--tone{tone % len(SHAPES)})"
            body.append(
                f'<rect x="{left}" y="{y:g}" width="{place(share) - left:.1f}" height="11" fill="{colour}" '
                f'opacity=".35"/><path d="M{place(low):.1f} {y + 5.5:g}H{place(high):.1f}" stroke="{colour}" '
                f'stroke-width="1.6"/>{_point(place(share), y + 5.5, tone)}'
                f'<text x="{WIDTH - 4}" y="{y + 10:g}" text-anchor="end">{100 * share:.1f}%</text>'
            )
            told.append(f"{group}, {names[tone]}: {100 * share:.1f} %")
            y += 15
        y += 7
    half = f'<path class="grid" d="M{place(0.5):g} 26V{y:g}" stroke-dasharray="4 3"/>'
    legend, end = _legend([Mark(name, (), (), tone, "joined") for tone, name in enumerate(names)], y + 14)
    note = f'<text x="{left}" y="{end:g}">Means with their 95 % intervals; dashed: one half</text>'
    return _svg(title, "; ".join(told), [half, *body, *legend, note], end + 8)


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
