"""Figures of how well a run learned: metric and loss curves for one run, and for groups of runs with their spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fl.report.curves import (
    ROUNDS,
    Axis,
    Curve,
    axes_of,
    loss_curve,
    mean_curve,
    metric_curve,
    spend_curve,
    training_loss_curve,
)
from fl.report.groups import Group
from fl.report.load import Run, number
from fl.report.numbers import write
from fl.report.style import MUTED, Canvas, Picture, canvas, clean, line_style, log_scale

MOST_LINES = 12  # more groups than this are too many lines for one figure: the best are drawn
MOST_TIPS = 150
FILES = {"round": "rounds", "virtual_s": "seconds", "wall_s": "seconds", "bytes": "bytes", "epsilon": "epsilon"}

Drawn = list[tuple[Axis, list[Picture]]]


def metric_label(run: Run) -> str:
    """The metric with its unit and what it was measured on."""
    where = "Test" if any(number(e.get(run.metric)) is not None for e in run.tests) else "Clients' mean"
    return f"{where} {run.metric}" + (" (%)" if run.metric == "accuracy" else "")


def run_curves(run: Run) -> Drawn:
    """Metric and loss of one run, once for each horizontal axis."""
    drawn = []
    for axis in axes_of([run]):
        pictures = []
        metric = metric_curve(run, axis)
        if metric is not None:
            with canvas(metric_label(run), axis.label) as c:
                _line(c, metric, {**line_style(0), "label": run.metric}, run.metric, axis)
                _limits(c, [metric], run.metric, axis)
                pictures.append(_finish(c, run.metric, axis, metric_label(run)))
        test, train = loss_curve(run, axis), training_loss_curve(run, axis)
        if test is not None or train is not None:
            with canvas("Loss", axis.label) as c:
                if test is not None:
                    _line(c, test, {**line_style(0), "label": "test"}, "loss", axis)
                if train is not None:
                    style = line_style(1) | {"marker": "", "linestyle": (0, (4, 2)), "linewidth": 1.3}
                    _line(c, train, {**style, "label": "training (the round's clients)"}, "loss", axis)
                _limits(c, [x for x in (test, train) if x is not None], "loss", axis)
                c.legend()
                pictures.append(_finish(c, "loss", axis, "Loss"))
        if pictures:
            drawn.append((axis, pictures))
    return drawn


def spend_picture(run: Run) -> Picture | None:
    """Epsilon against rounds, for a private run."""
    axis = ROUNDS
    spent = spend_curve(run, axis)
    if spent is None:
        return None
    with canvas("Privacy loss spent (epsilon)", axis.label) as c:
        _line(c, spent, line_style(3) | {"marker": ""}, "epsilon", axis)
        _limits(c, [spent], "epsilon", axis)
        c.axes.set_ylim(bottom=0)
        return c.finish("epsilon_spent", "Epsilon spent against rounds")


def compared(groups: Sequence[Group]) -> list[Group]:
    """The groups that are drawn as lines: all, or the best `MOST_LINES` by their final metric."""
    if len(groups) <= MOST_LINES:
        return list(groups)
    metric = groups[0].runs[0].metric
    sign = -1.0 if metric == "accuracy" else 1.0

    def rank(item: Group) -> float:
        mean = item.statistics(metric)[1]
        return float("inf") if mean is None else sign * mean

    best = sorted(groups, key=rank)[:MOST_LINES]
    return sorted(best, key=lambda item: item.index)


def comparison_curves(groups: Sequence[Group]) -> Drawn:
    """Metric and loss of each group: mean over its seeds, with a band from the lowest to the highest seed."""
    shown = compared(groups)
    runs = [run for item in shown for run in item.curves]
    metric = runs[0].metric
    kinds: list[tuple[str, str, Callable[[Run, Axis], Curve | None]]] = [
        (metric, metric_label(runs[0]), metric_curve),
        ("loss", "Test loss", loss_curve),
    ]
    if not any(loss_curve(run, ROUNDS) for run in runs):
        kinds[1] = ("loss", "Training loss", training_loss_curve)
    drawn = []
    for axis in axes_of(runs):
        pictures = []
        for name, label, curve_of in kinds:
            curves = [(item, mean_curve([curve_of(run, axis) for run in item.curves])) for item in shown]
            present = [(item, curve) for item, curve in curves if curve is not None]
            if not present:
                continue
            with canvas(label, axis.label) as c:
                for item, curve in present:
                    style = line_style(item.index)
                    if curve.low is not None and curve.high is not None:
                        c.axes.fill_between(
                            curve.x, curve.low, curve.high, color=style["color"], alpha=0.16, linewidth=0,
                            step="post" if axis.stepped else None,
                        )  # fmt: skip
                    title = clean(item.label, 44)
                    _line(c, curve, {**style, "label": title}, name, axis, prefix=f"{item.label}: ")
                ends = [float(curve.x[-1]) for _, curve in present]
                if axis.key == "virtual_s" and min(ends) < 0.99 * max(ends):
                    reached = f"{min(ends):.4g} s: all get here"
                    c.axes.axvline(min(ends), color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), label=reached)
                _limits(c, [curve for _, curve in present], name, axis)
                c.legend()
                pictures.append(_finish(c, name, axis, label))
        if pictures:
            drawn.append((axis, pictures))
    return drawn


def _line(c: Canvas, curve: Curve, style: dict[str, Any], key: str, axis: Axis, prefix: str = "") -> None:
    many = len(curve.x) > 40
    steps = {"drawstyle": "steps-post"} if axis.stepped else {}
    c.axes.plot(curve.x, curve.y, **style | ({"marker": ""} if many else {}) | steps)
    step = max(1, len(curve.x) // MOST_TIPS)
    for i in range(0, len(curve.x), step):
        value = float(curve.y[i])
        shown = write(key, value / 100 if key == "accuracy" else value)
        if curve.low is not None and curve.high is not None and curve.high[i] > curve.low[i]:
            low, high = (float(v[i]) / (100 if key == "accuracy" else 1) for v in (curve.low, curve.high))
            shown += f" (from {write(key, low)} to {write(key, high)}, {curve.runs} runs)"
        c.tip(float(curve.x[i]), value, f"{prefix}{axis.label} {curve.x[i]:,.6g}: {key} {shown}")


def _limits(c: Canvas, curves: Sequence[Curve], key: str, axis: Axis) -> None:
    """Axis limits; accuracy stays inside 0..100, and a perplexity that falls twentyfold gets a log scale."""
    low = min(float(np.min(k.y if k.low is None else k.low)) for k in curves)
    high = max(float(np.max(k.y if k.high is None else k.high)) for k in curves)
    end = max(float(k.x[-1]) for k in curves)
    c.axes.set_xlim(-0.015 * end if end > 0 else -0.5, end * 1.03 if end > 0 else 0.5)
    pad = 0.08 * (high - low) or max(abs(high) * 0.05, 0.05)
    if key == "perplexity" and low > 0 and high / low > 20:
        log_scale(c.axes)
    elif key == "accuracy":
        c.axes.set_ylim(max(low - pad, -2.0), min(high + pad, 102.0))
    else:
        c.axes.set_ylim(low - pad, high + pad)
    if axis.key == "round":
        from matplotlib.ticker import MaxNLocator

        c.axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _finish(c: Canvas, key: str, axis: Axis, label: str) -> Picture:
    return c.finish(f"{key}_{FILES[axis.key]}", f"{label} against {axis.label}")


def client_quantiles(groups: Sequence[Group]) -> Picture | None:
    """Clients' own final metric, sorted from worst to best, one line a group: how evenly a method serves clients."""
    shown = [(item, _sorted_clients(item)) for item in compared(groups)]
    present = [(item, values) for item, values in shown if values is not None]
    if not present:
        return None
    metric = present[0][0].runs[0].metric
    scale = 100.0 if metric == "accuracy" else 1.0
    with canvas(f"Clients' own {metric}" + (" (%)" if scale == 100 else ""), "share of clients, worst first (%)") as c:
        for item, values in present:
            style = line_style(item.index) | {"marker": ""}
            c.axes.plot(np.linspace(0, 100, len(values)), values * scale, **style, label=clean(item.label, 44))
        c.axes.set_xlim(0, 100)
        c.axes.axvline(10, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        c.legend()
        return c.finish("clients_sorted", f"Clients' own {metric}, sorted from worst to best, by setting")


def _sorted_clients(item: Group) -> np.ndarray | None:
    """Quantiles of the per-client metric (worst first), averaged over the group's runs; shape (101,)."""
    rows = []
    for run in item.curves:
        values = client_values(run)
        if values:
            ordered = np.sort([v for _, v in values])
            ordered = ordered if run.metric == "accuracy" else ordered[::-1]
            rows.append(np.interp(np.linspace(0, 1, 101), np.linspace(0, 1, len(ordered)), ordered))
    return np.mean(rows, axis=0) if rows else None


def client_values(run: Run) -> list[tuple[int, float]]:
    """(client, metric) of the last evaluation on clients' own test samples; clients without any are left out."""
    if not run.client_tests:
        return []
    listed = run.client_tests[-1].get("per_client") or []
    return [(i, value) for i, value in enumerate(number(v) for v in listed) if value is not None]
