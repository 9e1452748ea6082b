"""The figure of who worked when, in virtual time."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl.report.client_plots import client_name
from fl.report.load import Run, number
from fl.report.numbers import human
from fl.report.style import BAD, CARD, MUTED, SERIES, WIDE, Picture, canvas

MOST_JOBS = 900


def timeline_picture(run: Run) -> Picture | None:
    """Who worked when, in virtual time: a bar from the version a client started from to its update's arrival.

    None where virtual time stands still. The first jobs are shown where there are very many.
    """
    made: dict[Any, list[float]] = {0: [0.0]}  # a round without an accepted update makes its version anew
    for event in run.rounds:
        at = number(event.get("virtual_s"))
        if at is not None:
            made.setdefault(event.get("version"), []).append(at)
    jobs = []
    for event in run.clients:
        end, client = number(event.get("virtual_s")), event.get("client")
        if end is None or not isinstance(client, int):
            continue
        begin = max((t for t in made.get(event.get("version"), []) if t < end), default=None)
        if begin is not None:
            jobs.append((begin, end, client, event))
    if not jobs:
        return None
    cut = jobs[:MOST_JOBS]
    clients = sorted({client for _, _, client, _ in cut})
    row = {client: place for place, client in enumerate(clients)}
    height = float(np.clip(70 + 11.0 * len(clients), 140, 420))
    thick = float(np.clip((height - 70) / len(clients) * 0.62, 0.8, 7.0))
    label = "Who worked when (client)" + (
        "" if len(cut) == len(jobs) else f", the first {len(cut):,} of {len(jobs):,} jobs"
    )
    with canvas(label, "virtual time (s)", width=WIDE, height=height) as c:
        kinds = {
            "accepted": (SERIES[0], [j for j in cut if j[3].get("accepted") and not j[3].get("staleness")]),
            "accepted, stale": (SERIES[4], [j for j in cut if j[3].get("accepted") and j[3].get("staleness")]),
            "rejected": (BAD, [j for j in cut if not j[3].get("accepted")]),
        }
        for name, (color, some) in kinds.items():
            if some:
                y = [row[client] for _, _, client, _ in some]
                starts, ends = [j[0] for j in some], [j[1] for j in some]
                c.axes.hlines(y, starts, ends, color=color, linewidth=thick, label=name, alpha=0.85)
                # A thin cut at each start keeps jobs apart that follow one another at once.
                c.axes.plot(starts, y, linestyle="", marker="|", markersize=thick, color=CARD, markeredgewidth=1.0)
        horizon = max(end for _, end, _, _ in cut)
        marks = sorted({t for times in made.values() for t in times if 0 < t <= horizon * 1.001})
        if len(marks) <= 60:
            for mark in marks:
                c.axes.axvline(mark, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=0.5)
        for begin, end, client, event in cut[:400]:
            what = "accepted" if event.get("accepted") else f"rejected: {event.get('reason')}"
            text = f"{client_name(run, client)}, round {event.get('round')}: {human(end - begin, 'seconds')}, {what}"
            c.box_tip(begin, end, row[client] - 0.4, row[client] + 0.4, text)
        step = max(1, len(clients) // 24)
        c.axes.set_yticks(range(0, len(clients), step), [str(k) for k in clients[::step]], fontsize=7.5)
        c.axes.set_ylim(len(clients) - 0.4, -0.6)
        c.axes.set_xlim(0, horizon * 1.01)
        c.axes.grid(visible=False)
        if sum(bool(some) for _, some in kinds.values()) > 1:
            c.legend()
        return c.finish("timeline", "Which client worked when, in virtual time")
