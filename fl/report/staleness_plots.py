"""Figures of an asynchronous run: how stale updates were, whose, and how many versions lived at once."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from fl.report.client_plots import client_name
from fl.report.jobs import asynchronous, by_speed, jobs_of
from fl.report.load import Run, number
from fl.report.style import MUTED, SERIES, WIDE, WIDTH, Picture, canvas

MOST_BARS = 40
FEW_CLIENTS = 30
MOST_POINTS = 400


def staleness_pictures(run: Run) -> list[Picture]:
    """What there is to say about stale updates; nothing for a run whose updates are all fresh."""
    if not asynchronous(run):
        return []
    found = (staleness_histogram(run), staleness_by_client(run), live_versions(run))
    return [picture for picture in found if picture is not None]


def staleness_histogram(run: Run) -> Picture | None:
    """How many accepted updates had which staleness, in bars of equal width."""
    values = [value for some in _by_client(run).values() for value in some]
    if not values:
        return None
    most = max(values)
    width = -(-(most + 1) // MOST_BARS)
    counts = np.bincount(np.array(values) // width)
    with canvas("Accepted updates by staleness", "staleness (versions)") as c:
        starts = np.arange(len(counts)) * width
        c.axes.bar(starts + (width - 1) / 2, counts, 0.86 * width, color=SERIES[0])
        mean = float(np.mean(values))
        c.axes.axvline(mean, color=SERIES[1], linewidth=1.2, linestyle=(0, (5, 2)), label=f"mean {mean:.1f}")
        for start, count in zip(starts.tolist(), counts.tolist()):
            span = f"{start}" if width == 1 else f"{start} to {start + width - 1}"
            c.box_tip(start - 0.5, start + width - 0.5, 0, count, f"staleness {span}: {count:,} updates")
        c.axes.grid(axis="x", visible=False)
        c.axes.locator_params(axis="both", integer=True)
        c.legend()
        return c.finish("staleness", "Number of accepted updates by staleness")


def staleness_by_client(run: Run) -> Picture | None:
    """Each client's mean staleness, with the range from its lowest to its highest; the fastest client first."""
    theirs = _by_client(run)
    order = [client for client in by_speed(jobs_of(run)) if client in theirs]
    order += sorted(theirs.keys() - set(order))
    if not order:
        return None
    many = len(order) > FEW_CLIENTS
    label = f"{len(order)} clients, the fastest first" if many else "client, the fastest first"
    with canvas("Staleness by client (versions)", label, width=WIDE if len(order) > 3 * FEW_CLIENTS else WIDTH) as c:
        x = np.arange(len(order))
        low, mean, high = (np.array([f(theirs[client]) for client in order]) for f in (min, np.mean, max))
        c.axes.vlines(x, low, high, color=SERIES[0], alpha=0.35, linewidth=5.0 if not many else 2.0, label="range")
        c.axes.plot(x, mean, linestyle="", marker="o", markersize=3.0 if many else 5.0, color=SERIES[0], label="mean")
        top = max(float(high.max()), 1.0)
        for place, client in enumerate(order[:400]):
            told = f"{client_name(run, client)}: mean {mean[place]:.1f}, from {low[place]} to {high[place]}"
            c.box_tip(place - 0.5, place + 0.5, 0, top, f"{told}, {len(theirs[client])} updates")
        c.axes.set_ylim(-0.04 * top, 1.08 * top)
        c.axes.locator_params(axis="y", integer=True)
        c.axes.set_xlim(-0.7, len(order) - 0.3)
        c.axes.grid(axis="x", visible=False)
        if many:
            c.axes.set_xticks([])
        else:
            c.axes.set_xticks(x, [str(client) for client in order], fontsize=8.5 if len(order) <= 12 else 6.5)
        c.legend()
        return c.finish("staleness_clients", "Staleness of each client's accepted updates, the fastest client first")


def live_versions(run: Run) -> Picture | None:
    """How many versions outstanding work started from, at each server step, against virtual time."""
    points = [(number(e.get("virtual_s")), number(e.get("live_versions"))) for e in run.rounds]
    known = [(at, live) for at, live in points if at is not None and live is not None]
    if len(known) < 2:
        return None
    known = known[:: 1 + len(known) // MOST_POINTS]
    with canvas("Live versions", "virtual time (s)") as c:
        at, live = np.array(known).T
        c.axes.plot(at, live, color=SERIES[2], linewidth=1.2, drawstyle="steps-post")
        c.axes.axhline(live.mean(), color=MUTED, linewidth=1.0, linestyle=(0, (5, 2)), label=f"mean {live.mean():.1f}")
        c.axes.set_ylim(0, max(float(live.max()), 1.0) * 1.08)
        c.axes.set_xlim(0, float(at[-1]) * 1.01)
        c.axes.locator_params(axis="y", integer=True)
        c.legend()
        return c.finish("live_versions", "Versions that outstanding work started from, against virtual time")


def _by_client(run: Run) -> dict[int, list[int]]:
    theirs: dict[int, list[int]] = defaultdict(list)
    for event in run.clients:
        client, stale = event.get("client"), number(event.get("staleness"))
        if event.get("accepted") and isinstance(client, int) and stale is not None:
            theirs[client].append(int(stale))
    return theirs
