"""The privacy-utility frontier: what a metric costs in epsilon, one line for each choice of the other settings.

A point is a setting's mean over its completed seeds at the epsilon that was spent, with one sample standard deviation
each way; the area of its marker is the traffic of a run. Runs without a finite epsilon stand apart, as the reference.
Epsilons of different units (an example, a client) are never on one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fl.report.claims import scope, unit
from fl.report.groups import Group, show
from fl.report.load import number
from fl.report.numbers import describe, human, spread, write
from fl.report.page import Markup, card, figure, table, tag
from fl.report.style import INK, MUTED, SERIES, WIDE, Canvas, Picture, canvas, clean, line_style
from fl.report.tables import counted

NONE = "no guarantee"
AREA, SMALLEST = 150.0, 28.0  # points squared: of the marker of the most bytes, and what no marker is drawn below
APART = 0.022  # lines are moved apart along the log axis by this share each, so that their bars can be told apart


@dataclass
class Line:
    """One choice of the settings that are no part of privacy: its points by falling privacy, and its reference."""

    name: str
    points: list[tuple[float, Group]] = field(default_factory=list)  # (epsilon spent, its setting)
    reference: Group | None = None

    @property
    def all(self) -> list[Group]:
        return [item for _, item in self.points] + ([self.reference] if self.reference else [])


def frontier(groups: Sequence[Group], key: str) -> list[Line]:
    """The lines; none where no setting has two epsilons or more. ``key`` names the metric."""
    units = {unit(item.runs[0]) for item in groups} - {""}
    lines: dict[str, Line] = {}
    for item in groups:
        if item.statistics(key)[1] is None:
            continue
        rest = {k: v for k, v in item.values.items() if k.partition(".")[0] != "privacy"}
        words = [show(v) if k == "variant" else f"{k.rpartition('.')[2]}={show(v)}" for k, v in rest.items()]
        spent = item.statistics("epsilon")[1]
        about = unit(item.runs[0])
        if len(units) > 1 and about:
            words.append(f"for {about}")
        name = ", ".join(words) or item.runs[0].experiment
        line = lines.setdefault(name, Line(name))
        if spent is None:
            line.reference = line.reference or item
        elif spent > 0:
            line.points.append((spent, item))
    for line in lines.values():
        line.points.sort(key=lambda point: point[0])
    drawn = [line for line in lines.values() if line.all]
    return drawn if any(len({column(item) for _, item in line.points}) > 1 for line in drawn) else []


def frontier_card(groups: Sequence[Group], key: str) -> tuple[Markup | None, Picture | None]:
    """The card with figure and table, and the figure; None where there is no frontier."""
    lines = frontier(groups, key)
    if not lines:
        return None, None
    picture = frontier_picture(lines, key)
    runs = [run for line in lines for item in line.all for run in item.completed]
    about = scope(runs)
    note = f"Epsilon is for {about}. " if about else "The runs left no statement of what their epsilon is about. "
    note += "Heads are the budgets, the figure stands at what was spent. Mean ± sample standard deviation over seeds."
    caption = (
        "Small dots are single runs, a bar is one standard deviation each way; lines are moved apart a little along "
        "the axis. A marker's area is the traffic of a run (up + down)."
    )
    return card("Privacy and utility", figure(picture, caption), frontier_table(lines, key), note=note), picture


def frontier_table(lines: Sequence[Line], key: str) -> Markup:
    """A row a line, a column an epsilon: the metric's mean and deviation; then the traffic of a run."""
    heads = sorted({column(item) for line in lines for _, item in line.points})
    reference = any(line.reference for line in lines)
    rows = []
    for index, line in enumerate(lines):
        at = {column(item): item for _, item in line.points}
        found = [*(at.get(head) for head in heads), *([line.reference] if reference else [])]
        cells = ["" if item is None else _cell(item, key) for item in found]
        sent = [human(_mean([item.statistics(k)[1] for item in line.all]), "bytes") for k in ("bytes_up", "bytes_down")]
        swatch = tag("span", class_="swatch", style=f"background:var(--c{index % len(SERIES)})")
        rows.append([[swatch, line.name], *cells, *sent])
    what = describe(key).short or describe(key).label
    head = [what, *[f"epsilon {value:g}" for value in heads], *([NONE] if reference else []), "up", "down"]
    return table(head, rows, class_="variants")


def frontier_picture(lines: Sequence[Line], key: str) -> Picture:
    """The metric against epsilon on a log axis, a line a choice; runs without a guarantee stand at the right end."""
    scale = 100.0 if describe(key).kind == "percent" else 1.0
    label = describe(key).label + (" (%)" if scale == 100.0 else "")
    runs = [run for line in lines for item in line.all for run in item.completed]
    units = {unit(run) for run in runs} - {""}
    about = f" for {units.pop()}" if len(units) == 1 else ""
    ticks = sorted({column(item) for line in lines for _, item in line.points})
    most = max((_traffic(item) for line in lines for item in line.all), default=0.0)
    end = ticks[-1] * max(1.6, (ticks[-1] / ticks[0]) ** 0.18)
    with canvas(label, f"epsilon spent{about}", width=WIDE, height=300.0) as c:
        before = [number(e.get(key)) for run in runs for e in run.tests if e.get("round") == 0]
        start = _mean(before)
        if start is not None:
            c.axes.axhline(start * scale, color=MUTED, linewidth=1.0, linestyle=(0, (1.5, 2)), label="before training")
        for index, line in enumerate(lines):
            style = line_style(index)
            aside = math.exp(APART * (index - (len(lines) - 1) / 2) * math.log(end / ticks[0]))
            traffic = human(_mean([_traffic(item) for item in line.all]), "bytes")
            x = [epsilon * aside for epsilon, _ in line.points]
            y = [(item.statistics(key)[1] or 0.0) * scale for _, item in line.points]
            c.axes.plot(x, y, **style | {"marker": ""}, label=f"{clean(line.name, 40)} ({traffic} a run)")
            for at, (epsilon, item) in zip(x, line.points):
                _point(c, item, key, scale, at, style, most, f"{line.name}, epsilon {epsilon:.3g}")
            if line.reference is not None:
                _point(c, line.reference, key, scale, end * aside, style, most, f"{line.name}, {NONE}")
        c.axes.set_xscale("log")
        shown = [(value, f"{value:g}") for value in ticks]
        if any(line.reference for line in lines):
            shown.append((end, NONE))
        c.axes.set_xticks([value for value, _ in shown], [text for _, text in shown], color=INK)
        c.axes.minorticks_off()
        c.axes.margins(x=0.05, y=0.1)
        c.legend()
        return c.finish("frontier", f"{label} against epsilon, a line for each choice of the other settings")


def column(item: Group) -> float:
    """The epsilon of a table's column: the budget where there is one, else what was spent, to three digits."""
    target = number(item.runs[0].settings.get("privacy.epsilon"))
    return float(f"{item.statistics('epsilon')[1] or 0.0:.3g}") if target is None else target


def _cell(item: Group, key: str) -> str:
    shown = spread(key, *item.statistics(key)[1:])
    return shown if len(item.completed) == len(item.runs) else f"{shown} ({counted(item)})"


def _point(c: Canvas, item: Group, key: str, scale: float, x: float, style: dict, most: float, name: str) -> None:
    _, mean, std = item.statistics(key)
    assert mean is not None
    values = [run.numbers[key] * scale for run in item.completed if key in run.numbers]
    color, y = style["color"], mean * scale
    if std:
        c.axes.plot([x, x], [y - std * scale, y + std * scale], color=color, linewidth=1.4, zorder=4)
    if len(values) > 1:
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 2.6, "markeredgewidth": 0, "zorder": 5}
        c.axes.plot([x] * len(values), values, color=color, **dots)
    traffic = _traffic(item)
    area = max(SMALLEST, AREA * traffic / most) if most else SMALLEST
    c.axes.scatter([x], [y], s=area, color=color, alpha=0.45, linewidths=0, zorder=3)
    c.tip(x, y, f"{name}: {spread(key, mean, std)}, {write('bytes_up', traffic)}")


def _traffic(item: Group) -> float:
    return sum(item.statistics(key)[1] or 0.0 for key in ("bytes_up", "bytes_down"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None
