"""Figures of a sweep's variants: a panel each against all the others, and how inexact each one's aggregation is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fl.comparison import Row, aggregation_errors
from fl.report.curves import Axis, Curve, axes_of, mean_curve, metric_curve
from fl.report.groups import Group
from fl.report.load import Run
from fl.report.plots import metric_label
from fl.report.style import INK, MUTED, SERIES, WIDE, Picture, canvas, clean, line_style, log_scale

FLOOR = 1e-12  # errors below are rounding, and zero has no place on a log axis: they are drawn here
MOST_PANELS = 40
FEW = 4  # fewer variants than this are told apart in the curves themselves


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The rows as groups for the cards and figures that every comparison has."""
    return [Group({"variant": row.name}, row.runs, row.index, row.name) for row in rows if row.runs]


def panels_picture(rows: Sequence[Row], columns: int = 4) -> Picture | None:
    """The test metric, a panel a variant: its mean and its band, and the others' means in grey.

    With many variants one figure of all lines can't be read; here each is seen against all. The horizontal axis is
    the one that `fl.report.curves.axes_of` puts first: rounds, or virtual time where the schedules differ.
    """
    axis = next(iter(axes_of([run for row in rows for run in row.completed])))
    curves = [(row, _metric(row, axis)) for row in rows]
    present = [(row, curve) for row, curve in curves if curve is not None][:MOST_PANELS]
    if len(present) < FEW:
        return None
    lines = -(-len(present) // columns)
    height, cell, gap, top, left = 62.0 + 104.0 * lines, 104.0, 26.0, 44.0, 40.0
    low = min(float(np.min(c.y if c.low is None else c.low)) for _, c in present)
    high = max(float(np.max(c.y if c.high is None else c.high)) for _, c in present)
    pad = 0.06 * (high - low) or 0.5
    label = metric_label(present[0][0].runs[0])
    steps: dict[str, Any] = {"drawstyle": "steps-post"} if axis.stepped else {}
    with canvas(f"{label}, each variant against the others", "", width=WIDE, height=height) as c:
        c.axes.set_axis_off()
        across = (WIDE - left - 12.0 + 16.0) / columns
        for place, (row, curve) in enumerate(present):
            x0 = left + (place % columns) * across
            y0 = height - top - (place // columns) * cell - (cell - gap)
            axes = c.figure.add_axes((x0 / WIDE, y0 / height, (across - 16.0) / WIDE, (cell - gap - 14.0) / height))
            for other, theirs in present:
                if other is not row:
                    axes.plot(theirs.x, theirs.y, color=MUTED, linewidth=0.6, alpha=0.35, **steps)
            color = SERIES[row.index % len(SERIES)]
            if curve.low is not None and curve.high is not None:
                band: dict[str, Any] = {"step": "post"} if axis.stepped else {}
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.25, linewidth=0, **band)
            axes.plot(curve.x, curve.y, color=color, linewidth=2.0, **steps)
            axes.set_title(clean(row.name, 28), fontsize=8.5, color=INK, loc="left", pad=3.0)
            axes.set_ylim(low - pad, high + pad)
            axes.tick_params(labelsize=7.5, labelleft=place % columns == 0)
            axes.tick_params(labelbottom=place + columns >= len(present))
            axes.locator_params(nbins=4)
        c.figure.text(0.5, 6.0 / height, axis.label, ha="center", fontsize=9.0, color=MUTED)
        return c.finish("variants", f"{label} against {axis.label}, one panel a variant")


def error_picture(rows: Sequence[Row]) -> Picture | None:
    """The relative aggregation error ||E|| / ||D*|| a round, on a log axis: the mean over seeds, a line a variant."""
    curves = [(row, mean_curve([_errors(run) for run in row.completed])) for row in rows]
    present = [(row, curve) for row, curve in curves if curve is not None]
    if not present:
        return None
    with canvas("Relative aggregation error", "round", width=WIDE, height=260.0, left=58.0) as c:
        floored = False
        for row, curve in present:
            y = np.maximum(curve.y, FLOOR)
            floored = floored or bool((curve.y < FLOOR).any())
            many = {"marker": ""} if len(curve.x) > 40 else {}
            c.axes.plot(curve.x, y, **line_style(row.index) | many, label=clean(row.name, 30))
            step = max(1, len(curve.x) // 30)
            for at in range(0, len(curve.x), step):
                text = f"{row.name}: round {curve.x[at]:g}: {curve.y[at]:.3g}"
                c.tip(float(curve.x[at]), float(y[at]), text)
        log_scale(c.axes)
        if floored:
            c.axes.axhline(FLOOR, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        from matplotlib.ticker import MaxNLocator

        c.axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        c.legend()
        return c.finish("aggregation_error", "Relative aggregation error against rounds, on a log axis")


def floored(rows: Sequence[Row]) -> bool:
    """Whether some error lies below what the log axis shows."""
    return any(error < FLOOR for row in rows for run in row.completed for _, error in aggregation_errors(run))


def _metric(row: Row, axis: Axis) -> Curve | None:
    return mean_curve([metric_curve(run, axis) for run in row.completed])


def _errors(run: Run) -> Curve | None:
    points = aggregation_errors(run)
    if not points:
        return None
    return Curve(np.array([x for x, _ in points]), np.array([y for _, y in points]))
