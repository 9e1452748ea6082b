"""What a timeline shows of a run: which clients, which stretch of virtual time, and how stale is how dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from fl.report.jobs import Job, asynchronous, by_speed, end_of, jobs_of, version_times
from fl.report.load import Run
from fl.report.numbers import human

MOST_CLIENTS = 36
MOST_JOBS = 24  # of the busiest client, in a stretch


@dataclass(frozen=True)
class View:
    """Jobs of ``clients`` (fastest first) between ``start`` and ``end``; ``every`` is all jobs of the run."""

    clients: list[int]
    jobs: list[Job]
    versions: list[float]
    start: float
    end: float
    whole_s: float
    of_clients: int
    every: list[Job]

    @property
    def title(self) -> str:
        """What is shown of how much: a part of a run says so."""
        n = len(self.clients)
        if n < self.of_clients:
            shown = f"{n} of {self.of_clients} clients, fastest to slowest"
        else:
            shown = f"{n} clients, the fastest on top" if n > 1 else "1 client"
        if self.end - self.start < self.whole_s:
            return f"{shown}; {seconds(self.start)} to {seconds(self.end)} of {seconds(self.whole_s)}"
        return shown


def view(run: Run, most_clients: int = MOST_CLIENTS, most_jobs: int = MOST_JOBS) -> View | None:
    """What to show of ``run``; None where virtual time stands still.

    Of more than ``most_clients`` some are picked, evenly by speed. A run is cut to a stretch in which the busiest of
    them has about ``most_jobs`` jobs, but not below one and a half of the slowest one's; it begins with a version, in
    the middle of the run, when not all start at the same time any more. Of an asynchronous run that is the middle of
    the time before most clients' last arrival: what they did afterwards left no record, and would look idle.
    """
    every = jobs_of(run)
    if not every:
        return None
    clients = by_speed(every)
    picked = clients
    if len(clients) > most_clients:
        picked = [clients[round(place)] for place in np.linspace(0, len(clients) - 1, most_clients).tolist()]
    counts = Counter(job.client for job in every)
    busiest, whole, versions = max(counts[client] for client in picked), end_of(run, every), version_times(run)
    start, length = 0.0, whole
    if busiest > most_jobs:
        slowest = median(job.end - job.sent for job in every if job.client == picked[-1])
        known = _recorded(every) if asynchronous(run) else whole
        length = min(known, max(whole * most_jobs / busiest, 1.5 * slowest))
        start = max((t for t in versions if t <= (known - length) / 2), default=0.0)
    end, chosen = start + length, set(picked)
    jobs = [job for job in every if job.client in chosen and job.end > start and job.sent < end]
    made = [t for t in versions if start <= t <= end]
    return View(picked, jobs, made, start, end, whole, len(clients), every)


def _recorded(jobs: Iterable[Job]) -> float:
    """The time before nine tenths of the clients' last arrivals."""
    last: dict[int, float] = {}
    for job in jobs:
        last[job.client] = max(job.end, last.get(job.client, 0.0))
    return sorted(last.values())[len(last) // 10]


def shades(jobs: Iterable[Job]) -> list[tuple[int, int]]:
    """(lowest, highest) staleness of up to three shades, each of about as many of the stale accepted ``jobs``."""
    stale = sorted(job.staleness for job in jobs if job.accepted and job.staleness > 0)
    if not stale:
        return []
    cuts = sorted({stale[len(stale) // 3], stale[2 * len(stale) // 3], stale[-1]})
    return list(zip([stale[0], *[cut + 1 for cut in cuts[:-1]]], cuts))


def outcome(job: Job) -> str:
    """What became of a job: ``accepted``, and if it was stale by how much, or why not."""
    if job.lost:
        return "lost"
    stale = f", {job.staleness} version{'s' if job.staleness != 1 else ''} stale" if job.staleness else ""
    return ("accepted" if job.accepted else f"rejected ({job.reason})") + stale


def seconds(value: float) -> str:
    return human(value, "seconds")
