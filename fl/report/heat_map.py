"""Rules against attacks: a heat map for sweeps over ``attack``, its table, and each rule's worst attack.

Rows are the rules compared (a sweep's variants, or its values of another setting), columns the attacks, panels the
choices of all further settings, such as heterogeneity (``partition.alpha``) and adapter. A cell is the mean over seeds
of the final test metric, the small number below it that of the worst seed. The last column is the worst of a row's
attacks (the column without attack aside): the smallest mean, and the worst seed of any of them; empty where no run
of a rule completed under an attack that others met.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.report.groups import Group, show
from fl.report.numbers import DASH, describe
from fl.report.page import Markup, card, figure, table, tag
from fl.report.style import INK, MUTED, WIDE, Canvas, Picture, canvas, clean

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

COLUMNS, NONE, WORST = "attack", "none", "worst attack"
ROWS = ("variant", "aggregator/combine", "aggregator.combine", "aggregator")  # the first of these that was varied
COLORS = "cividis"  # perceptually uniform, and the same to people with colour deficiencies
DARK, LIGHT = "#000000", "#fafafa"  # text in cells keeps its colour on a dark page, as the cells do theirs
THRESHOLD = 0.175  # luminance above which dark text has the better contrast
ROW, HEAD = 24.0, 74.0  # points: a row, and a panel's title with the names of its columns
BAR = 46.0  # width of the colour bar with its numbers
MOST_WIDE = 60.0  # of a column

Cells = Mapping[tuple[str, str, str], Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """The mean over seeds, and the worst seed."""

    mean: float
    worst: float


def attack_card(groups: Sequence[Group], key: str) -> tuple[Markup | None, Picture | None]:
    """The card of a sweep over attacks with figure and tables, and the figure; None where ``groups`` are no such sweep.

    ``groups`` have in ``values`` what was varied (``variant`` among it where there are variants); ``key`` names the
    final number.
    """
    cells = attack_cells(groups, key)
    if not cells:
        return None, None
    higher = describe(key).kind == "percent"
    picture = heat_map(cells, describe(key).label, percent=higher, higher_is_better=higher)
    seeds = sorted({len(values) for values in cells.values() if values})
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "no"
    name = describe(key).label.lower()
    note = f"Mean of the final {name} over {over} completed runs of a cell, and below it the worst seed."
    if WORST in _columns(cells, higher):
        note += f" {WORST.capitalize()}: the worst of a rule's attacks. The best of each column is bold."
    tables = [
        tag("details", tag("summary", "As a table"), *_tables(cells, percent=higher, higher_is_better=higher)),
    ]
    return card("Rules and attacks", figure(picture), *tables, note=note), picture


def attack_cells(groups: Sequence[Group], key: str) -> dict[tuple[str, str, str], list[float]]:
    """(panel, rule, attack) -> the final number ``key`` of each completed seed; empty for another kind of sweep.

    It is one if two attacks or more were compared, over two rules or more.
    """
    varied = groups[0].values if groups else {}
    rules = next((name for name in ROWS if name in varied), None)
    if rules is None or COLUMNS not in varied:
        return {}
    further = [name for name in varied if name not in (rules, COLUMNS)]
    cells: dict[tuple[str, str, str], list[float]] = {}
    for item in groups:
        panel = ", ".join(f"{name.rpartition('.')[2]} {show(item.values.get(name))}" for name in further)
        place = panel, show(item.values.get(rules)), show(item.values.get(COLUMNS))
        found = [run.numbers[key] for run in item.completed if key in run.numbers]
        cells.setdefault(place, []).extend(found)
    several = all(len({place[i] for place in cells}) > 1 for i in (1, 2))
    return cells if several and any(cells.values()) else {}


def heat_map(
    cells: Cells, label: str, *, percent: bool = False, higher_is_better: bool = True, name: str = "attacks"
) -> Picture:
    """The picture of ``cells``: (panel, row, column) -> a number for each seed (empty: nothing is known).

    All panels share one colour scale. ``percent`` writes 0.5 as 50.0. Rows and columns stand in the order in which
    they come, with no attack first.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    panels, rows = _distinct(cells, 0), _distinct(cells, 1)
    columns, scale = _columns(cells, higher_is_better), 100.0 if percent else 1.0
    found = {panel: _panel(cells, panel, higher_is_better) for panel in panels}
    means = [cell.mean * scale for panel in found.values() for cell in panel.values()]
    least, most = min(means, default=0.0), max(means, default=1.0)
    decades = not percent and least > 0 and most > 20 * least  # perplexities: their logarithms have the colours
    at_color = math.log10 if decades else float
    norm = Normalize(at_color(least), max(at_color(most), at_color(least) + 1e-9))
    colors = colormaps[COLORS if higher_is_better else f"{COLORS}_r"]

    def shade(value: float) -> Any:
        return colors(norm(at_color(value)))

    left = min(14.0 + 4.9 * max(len(clean(row, 24)) for row in rows), 130.0)
    across = 2 if len(panels) > 1 and len(columns) <= 10 else 1
    lines = -(-len(panels) // across)
    wide = min((WIDE - left - BAR - 14.0 * (across - 1)) / across, MOST_WIDE * len(columns))
    head = HEAD if any(panels) else HEAD - 18.0
    high = ROW * len(rows)
    height = 26.0 + lines * (high + head + 8.0)
    unit = " (%)" if percent else ""
    with canvas(f"{label}{unit}: mean over seeds, small: the worst seed", "", width=WIDE, height=height) as c:
        c.axes.set_axis_off()
        for place, panel in enumerate(panels):
            x = left + (place % across) * (wide + 14.0)
            y = height - 26.0 - head - high - (place // across) * (high + head + 8.0)
            axes = c.figure.add_axes((x / WIDE, y / height, wide / WIDE, high / height))
            axes.grid(visible=False)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.set_xlim(0, len(columns) + 0.15 * (WORST in columns))
            axes.set_ylim(len(rows), 0)
            best = _best(found[panel], rows, columns, higher_is_better)
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    at = j + 0.15 * (column == WORST)
                    cell = found[panel].get((row, column))
                    _draw(axes, at, i, cell, scale, shade, bold=(row, column) in best)
            shift = [j + 0.5 + 0.15 * (column == WORST) for j, column in enumerate(columns)]
            short = [clean(column, 16) for column in columns]
            axes.set_xticks(shift, short, rotation=38, ha="left", rotation_mode="anchor", fontsize=8.0, color=INK)
            axes.xaxis.tick_top()
            named = [clean(row, 24) for row in rows] if place % across == 0 else []
            axes.set_yticks([i + 0.5 for i in range(len(rows))] if named else [], named, fontsize=8.0, color=INK)
            axes.tick_params(length=0)
            top = (y + high + head - 14.0) / height
            c.figure.text(x / WIDE, top, clean(panel, 60), fontsize=9.0, fontweight="bold", color=INK)
        box = (left + across * (wide + 14.0) - 4.0, height - 26.0 - head - min(high, 220.0), 9.0, min(high, 220.0))
        _bar(c, colors, norm, box, decades)
        return c.finish(name, f"{label}{unit} of each rule under each attack")


def _draw(axes: Any, x: float, y: float, cell: Cell | None, scale: float, shade: Any, bold: bool) -> None:
    """One cell: its colour, the mean and the worst seed; an empty one has a dash."""
    from matplotlib.patches import Rectangle

    if cell is None:
        axes.text(x + 0.5, y + 0.5, DASH, ha="center", va="center", color=MUTED, fontsize=8.0)
        return
    color = shade(cell.mean * scale)
    axes.add_patch(Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, facecolor=color, linewidth=0))
    text = DARK if luminance(color) > THRESHOLD else LIGHT
    weight = "bold" if bold else "normal"
    shown, worst = number_text(cell.mean * scale), number_text(cell.worst * scale)
    axes.text(x + 0.5, y + 0.36, shown, ha="center", va="center", color=text, fontsize=8.5, fontweight=weight)
    axes.text(x + 0.5, y + 0.76, worst, ha="center", va="center", color=text, fontsize=6.3)


def _bar(c: Canvas, colors: Colormap, norm: Normalize, box: tuple[float, float, float, float], decades: bool) -> None:
    """The colour bar, at the right of the first panels; ``box`` is its left, bottom, width and height in points."""
    from matplotlib.ticker import FuncFormatter

    left, bottom, wide, high = box
    axes = c.figure.add_axes((left / c.width, bottom / c.height, wide / c.width, high / c.height))
    edges = np.linspace(norm.vmin or 0.0, norm.vmax or 1.0, 65)
    values = np.diff(edges)[:, None] / 2 + edges[:-1, None]
    axes.pcolormesh([0, 1], edges, values, cmap=colors, norm=norm, edgecolor="face")
    axes.yaxis.tick_right()
    if decades:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(10.0**value)))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.tick_params(labelsize=7.5, length=2.0)


def luminance(color: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def number_text(value: float) -> str:
    """Four characters or so: 97.3, 100, 3.42, 1e+05."""
    if abs(value) >= 1e4:
        return f"{value:.0e}"
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{places}f}"


def _tables(cells: Cells, *, percent: bool, higher_is_better: bool) -> list[Markup]:
    """The same numbers, a table a panel: mean, and in brackets the worst seed."""
    rows, columns, scale = _distinct(cells, 1), _columns(cells, higher_is_better), 100.0 if percent else 1.0
    parts: list[Markup] = []
    for panel in _distinct(cells, 0):
        found = _panel(cells, panel, higher_is_better)
        best = _best(found, rows, columns, higher_is_better)
        lines: list[list[Any]] = []
        for row in rows:
            line: list[Any] = [row]
            for column in columns:
                cell = found.get((row, column))
                text = DASH if cell is None else f"{number_text(cell.mean * scale)} "
                worst = None if cell is None else tag("small", f"({number_text(cell.worst * scale)})")
                line.append([tag("b", text) if (row, column) in best else text, worst])
            lines.append(line)
        parts += [tag("h3", panel)] if panel else []
        parts.append(table(["rule", *columns], lines))
    return parts


def _panel(cells: Cells, panel: str, higher_is_better: bool) -> dict[tuple[str, str], Cell]:
    """(row, column) -> its `Cell` where a seed is known; with the column of the worst attack."""
    worst = min if higher_is_better else max
    found: dict[tuple[str, str], Cell] = {}
    for (where, row, column), values in cells.items():
        if where == panel and values:
            found[row, column] = Cell(sum(values) / len(values), worst(values))
    attacks = list(dict.fromkeys(column for _, column in found if column != NONE))
    for row in _distinct(cells, 1):
        met = [found[row, column] for column in attacks if (row, column) in found]
        if len(met) == len(attacks) > 1:  # a rule whose runs fail under an attack does not get a better worst for it
            found[row, WORST] = Cell(worst(cell.mean for cell in met), worst(cell.worst for cell in met))
    return found


def _columns(cells: Cells, higher_is_better: bool) -> list[str]:
    """The attacks, none of them first, and the worst last."""
    columns = sorted(_distinct(cells, 2), key=lambda column: column != NONE)
    several = sum(column != NONE for column in columns) > 1
    return [*columns, *([WORST] if several else [])]


def _best(
    found: Mapping[tuple[str, str], Cell], rows: Sequence[str], columns: Sequence[str], higher_is_better: bool
) -> set[tuple[str, str]]:
    """The place of the best mean in each column, all of them where several are equal."""
    best = set()
    choose = max if higher_is_better else min
    for column in columns:
        means = {row: found[row, column].mean for row in rows if (row, column) in found}
        best |= {(row, column) for row, mean in means.items() if mean == choose(means.values())}
    return best


def _distinct(cells: Iterable[tuple[str, str, str]], index: int) -> list[str]:
    return list(dict.fromkeys(place[index] for place in cells))
