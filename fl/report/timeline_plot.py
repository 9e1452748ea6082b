"""The figure of who worked when in virtual time.

A row is a client. A thick bar is work, its thin ends are the download before and the upload after it, gaps are idle
time. Colours tell what became of the work when it arrived: fresh, stale (the stronger the more), rejected or lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.report.client_plots import client_name
from fl.report.jobs import at_work
from fl.report.load import Run
from fl.report.style import BAD, INK, MUTED, SERIES, WIDE, Canvas, Picture, canvas
from fl.report.timeline_view import View, outcome, seconds, shades, view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TIPS = 500
MOST_LINES = 20  # versions that get a line through all rows
MOST_DOTS = 400
BINS = 48
LEFT, PANEL, GAP = 52.0, 44.0, 22.0  # points
STRENGTH = {0: (), 1: (0.85,), 2: (0.45, 1.0), 3: (0.35, 0.65, 1.0)}


def timeline_picture(run: Run) -> Picture | None:
    """Who worked when, the server's versions above, and below how many were at work and how stale what arrived was.

    None where virtual time stands still.
    """
    shown = view(run)
    if shown is None:
        return None
    row_height = float(np.clip(300 / len(shown.clients), 8.5, 15.0))
    panels = 2 if any(job.staleness for job in shown.jobs) else 1
    below = panels * (PANEL + GAP) + 34.0
    height = 26.0 + row_height * (len(shown.clients) + 1.2) + below
    with canvas(f"Who worked when: {shown.title}", "", width=WIDE, height=height, left=LEFT, bottom=below) as c:
        row = {client: place for place, client in enumerate(shown.clients)}
        c.axes.set_xlim(shown.start, shown.end)
        c.axes.set_ylim(len(shown.clients) - 0.5, -1.7)
        c.axes.grid(visible=False)
        _draw_jobs(c, shown, row, row_height)
        _draw_versions(c.axes, shown.versions)
        names = ["versions", *[str(client) for client in shown.clients]]
        c.axes.set_yticks([-1.15, *range(len(shown.clients))], names, fontsize=8.0 if row_height > 11 else 7.0)
        c.axes.tick_params(labelbottom=False, bottom=False)
        c.axes.spines["bottom"].set_visible(False)
        for job in shown.jobs[:MOST_TIPS]:
            told = f"{client_name(run, job.client)}, {seconds(job.sent)} to {seconds(job.end)}: {outcome(job)}"
            sides = max(job.sent, shown.start), min(job.end, shown.end)
            c.box_tip(*sides, row[job.client] - 0.4, row[job.client] + 0.4, told)
        c.legend()
        _draw_panels(c, shown, panels)
        return c.finish("timeline", f"Which client worked when, in virtual time: {shown.title}")


def _draw_versions(axes: Axes, times: Sequence[float]) -> None:
    if len(times) <= MOST_LINES:
        for time in times:
            axes.axvline(time, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=0.5)
    width = 1.2 if len(times) <= MOST_LINES else 0.8 if len(times) <= 250 else 0.3
    x, y = _broken([(time, time) for time in times], [(-1.6, -0.75)] * len(times))
    axes.plot(x, y, color=INK, linewidth=width, solid_capstyle="butt", clip_on=False)


def _draw_jobs(c: Canvas, shown: View, row: dict[int, int], row_height: float) -> None:
    levels = shades(shown.jobs)
    kinds = [("accepted, fresh", SERIES[0], 1.0, [job for job in shown.jobs if job.accepted and not job.staleness])]
    for (low, high), strength in zip(levels, STRENGTH[len(levels)]):
        some = [job for job in shown.jobs if job.accepted and low <= job.staleness <= high]
        kinds.append((f"stale by {low}" + (f" to {high}" if high > low else ""), SERIES[4], strength, some))
    kinds.append(("rejected or lost", BAD, 1.0, [job for job in shown.jobs if not job.accepted]))
    # A cut of a point keeps jobs apart that follow one another at once.
    point_s = (shown.end - shown.start) / (c.width - LEFT - 12.0)
    apart = False
    for name, color, strength, some in kinds:
        for works in (False, True):
            bars, rows = [], []
            for job in some:
                for phase, begin, end in job.phases():
                    if (phase == "work") is works:
                        cut = point_s if end == job.end and end - begin > 3 * point_s else 0.0
                        bars.append((begin, end - cut))
                        rows.append((float(row[job.client]),) * 2)
            if bars:
                x, y = _broken(bars, rows)
                thick, label = (row_height * 0.68, name) if works else (row_height * 0.2, None)
                style: dict[str, Any] = {"color": color, "alpha": strength, "linewidth": thick, "label": label}
                c.axes.plot(x, y, **style, solid_capstyle="butt")
                apart = apart or not works
    lost = [job for job in shown.jobs if job.lost and job.end <= shown.end]
    if lost:
        cross: dict[str, Any] = {"linestyle": "", "marker": "x", "markeredgewidth": 1.2, "color": BAD, "label": "lost"}
        c.axes.plot([job.end for job in lost], [row[job.client] for job in lost], **cross, markersize=row_height * 0.42)
    if apart:
        c.axes.plot([], [], color=MUTED, linewidth=row_height * 0.2, label="thin: download, upload")


def _broken(x: Sequence[tuple[float, float]], y: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Segments as one line with breaks: a page with hundreds of them stays small."""
    nan = float("nan")
    return [v for a, b in x for v in (a, b, nan)], [v for a, b in y for v in (a, b, nan)]


def _draw_panels(c: Canvas, shown: View, panels: int) -> None:
    """The small panels below the rows, with the same axis of time."""
    box = c.axes.get_position()
    drawn = []
    for place in range(panels):
        y0 = box.y0 - (place + 1) * (PANEL + GAP) / c.height
        axes = c.figure.add_axes((box.x0, y0, box.width, PANEL / c.height))
        axes.tick_params(labelsize=7.5, labelbottom=place == panels - 1)
        axes.locator_params(axis="y", nbins=3, integer=True)
        drawn.append(axes)
    _draw_at_work(drawn[0], shown)
    if panels > 1:
        _draw_staleness(drawn[1], shown)
    for axes in drawn:
        axes.set_xlim(shown.start, shown.end)
    drawn[-1].set_xlabel("virtual time (s)")


def _draw_at_work(axes: Axes, shown: View) -> None:
    times, count = at_work(shown.every)
    if len(times) > 2 * MOST_DOTS:
        grid = np.linspace(shown.start, shown.end, 2 * MOST_DOTS)
        times, count = grid, count[np.searchsorted(times, grid, side="right") - 1]
    axes.plot(times, count, color=SERIES[2], linewidth=1.2, drawstyle="steps-post")
    axes.fill_between(times, 0, count, step="post", color=SERIES[2], alpha=0.18, linewidth=0)
    axes.set_ylim(0, shown.of_clients * 1.08)
    _title(axes, f"clients at work, of {shown.of_clients}")


def _draw_staleness(axes: Axes, shown: View) -> None:
    """The staleness of accepted updates at their arrival; its mean for each version, or over even spans of time."""
    arrived = [job for job in shown.every if job.accepted and shown.start < job.end <= shown.end]
    at, stale = np.array([job.end for job in arrived]), np.array([float(job.staleness) for job in arrived])
    edges = np.unique([shown.start, *shown.versions, shown.end])
    if len(edges) > BINS + 1:
        edges = np.linspace(shown.start, shown.end, BINS + 1)
    place = np.clip(np.searchsorted(edges, at, side="left") - 1, 0, len(edges) - 2)
    n, total = (np.bincount(place, weights=w, minlength=len(edges) - 1) for w in (None, stale))
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    few = slice(None, None, 1 + len(at) // MOST_DOTS)
    axes.plot(at[few], stale[few], linestyle="", marker="o", markersize=1.8, color=SERIES[4], alpha=0.7)
    axes.plot(edges, [*mean, mean[-1]], color=SERIES[1], linewidth=1.4, drawstyle="steps-post")
    axes.set_ylim(0, max(float(stale.max(initial=0)), 1.0) * 1.1)
    _title(axes, "staleness of what arrives, and its mean (versions)")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8.0, color=INK, loc="left", pad=3.0)
