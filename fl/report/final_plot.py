"""The figure of how a final number depends on what was varied: a line over a numeric setting, else a row a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl.report.groups import Group, show
from fl.report.load import number
from fl.report.numbers import describe, spread
from fl.report.style import INK, MUTED, SERIES, Canvas, Picture, canvas, clean, line_style


def final_picture(groups: Sequence[Group], key: str) -> Picture | None:
    """A final number against what was varied: a line over a numeric setting, else one row a group.

    Faint dots are single runs; the large dot is their mean and the bar one sample standard deviation each way.
    """
    groups = [item for item in groups if item.statistics(key)[1] is not None]
    if len(groups) < 2:
        return None
    scale = 100.0 if describe(key).kind == "percent" else 1.0
    label = describe(key).label + (" (%)" if scale == 100.0 else "")
    across = _numeric_setting(groups)
    if across is not None:
        return _over_setting(groups, key, across, label, scale)
    shown = groups[:40]
    names = [clean(item.label, 40) for item in shown]
    left = min(40.0 + 5.0 * max(len(n) for n in names), 210.0)
    with canvas("", label, left=left, height=62.0 + 19.0 * len(shown)) as c:
        for row, item in enumerate(shown):
            color = SERIES[item.index % len(SERIES)]
            _, mean, std = item.statistics(key)
            values = [run.numbers[key] * scale for run in item.completed if key in run.numbers]
            assert mean is not None
            _spread_dot(c, values, mean * scale, std, scale, row, color, horizontal=True)
            c.tip(mean * scale, row, f"{item.label}: {spread(key, mean, std)}")
        c.axes.set_yticks(range(len(shown)), names, color=INK)
        c.axes.set_ylim(len(shown) - 0.4, -0.6)
        c.axes.grid(axis="y", visible=False)
        return c.finish(f"final_{key}", f"{label} of each setting")


def _over_setting(groups: list[Group], key: str, across: str, label: str, scale: float) -> Picture:
    lines: dict[str, list[Group]] = {}
    for item in groups:
        rest = ", ".join(f"{k.rpartition('.')[2]}={show(v)}" for k, v in item.values.items() if k != across)
        lines.setdefault(rest, []).append(item)
    with canvas(label, clean(across, 60)) as c:
        for index, (rest, members) in enumerate(lines.items()):
            style = line_style(index)
            x = [float(item.values[across]) for item in members]
            means = [(item.statistics(key)[1] or 0.0) * scale for item in members]
            alone = {} if rest else {"color": MUTED, "linewidth": 1.0}
            c.axes.plot(x, means, **style | {"marker": ""} | alone, label=clean(rest, 44) if rest else None)
            for at, mean, item in zip(x, means, members):
                _, exact, std = item.statistics(key)
                values = [run.numbers[key] * scale for run in item.completed if key in run.numbers]
                color = style["color"] if rest else line_style(item.index)["color"]
                _spread_dot(c, values, mean, std, scale, at, color, horizontal=False)
        every = sorted({float(item.values[across]) for item in groups})
        if every[0] > 0 and every[-1] / every[0] >= 8:
            c.axes.set_xscale("log")
            c.axes.margins(x=0.08)
        c.axes.set_xticks(every, [f"{v:g}" for v in every])
        c.axes.minorticks_off()
        if "" not in lines:
            c.legend()
        for item in groups:
            _, exact, std = item.statistics(key)
            c.tip(float(item.values[across]), (exact or 0.0) * scale, f"{item.label}: {spread(key, exact, std)}")
        return c.finish(f"final_{key}", f"{label} against {across}")


def _numeric_setting(groups: Sequence[Group]) -> str | None:
    """The setting to put on the horizontal axis: numbers only, at least three of them, few lines left."""
    best, most = None, 2
    for key in groups[0].values:
        values = [item.values[key] for item in groups]
        if all(number(v) is not None for v in values) and len(set(values)) > most:
            rest = {tuple(show(v) for k, v in item.values.items() if k != key) for item in groups}
            if len(rest) <= 7:
                best, most = key, len(set(values))
    return best


def _spread_dot(
    c: Canvas,
    values: list[float],
    mean: float,
    std: float | None,
    scale: float,
    at: float,
    color: str,
    horizontal: bool,
) -> None:
    def points(along: list[float], **style: Any) -> None:
        place = [at] * len(along)
        c.axes.plot(*((along, place) if horizontal else (place, along)), **style)

    if std:
        points([mean - std * scale, mean + std * scale], color=color, linewidth=3.5, alpha=0.35)
    points(values, linestyle="", marker="o", markersize=3.2, color=color, alpha=0.5, markeredgewidth=0)
    points([mean], linestyle="", marker="o", markersize=6.5, color=color, markeredgecolor="#ffffff")
