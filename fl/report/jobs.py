"""A run's client jobs in virtual time: when each was asked for, began, was done and arrived, and what became of it.

A job lasts from ``sent_s`` (the request leaves the server) to ``virtual_s`` (its answer arrives, or it is lost); the
client downloads until ``began_s``, works until ``done_s`` and uploads from then on. Events without these fields (rounds
of a run that did not write them) begin with the version that they started from, and their phases are not known.
Work that is under way when a run ends leaves no event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from fl.report.load import Event, Run, number

LOST = ("error", "missing")  # reasons of rejection for which no update arrived


@dataclass(frozen=True)
class Job:
    """One client's work, in virtual seconds; ``began`` and ``done`` are None where they are not known."""

    client: int
    sent: float
    began: float | None
    done: float | None
    end: float
    staleness: int
    accepted: bool
    reason: str | None
    round: Any

    @property
    def lost(self) -> bool:
        return self.reason in LOST

    def phases(self) -> list[tuple[str, float, float]]:
        """(``down`` | ``work`` | ``up``, from, until), empty phases left out; all of it is work where none is known."""
        began = self.sent if self.began is None else self.began
        done = self.end if self.done is None else self.done
        cuts = [self.sent, min(max(began, self.sent), self.end), min(max(done, began), self.end), self.end]
        return [(n, a, b) for n, a, b in zip(("down", "work", "up"), cuts, cuts[1:]) if b > a]


def jobs_of(run: Run) -> list[Job]:
    """The jobs of ``run`` that took virtual time, in the order of its events."""
    made = _versions(run)
    found = []
    for event in run.clients:
        end, client = number(event.get("virtual_s")), event.get("client")
        if end is None or not isinstance(client, int):
            continue
        sent = number(event.get("sent_s"))
        if sent is None:
            sent = max((t for t in made.get(event.get("version"), []) if t < end), default=None)
        if sent is None or sent >= end:
            continue
        phases = [number(event.get(name)) for name in ("began_s", "done_s")]
        stale = int(number(event.get("staleness")) or 0)
        reason = event.get("reason")
        found.append(
            Job(client, sent, phases[0], phases[1], end, stale, bool(event.get("accepted")),
                None if reason is None else str(reason), event.get("round"))
        )  # fmt: skip
    return found


def _versions(run: Run) -> dict[Any, list[float]]:
    """When each version was made; a round without an accepted update makes its version anew."""
    made: dict[Any, list[float]] = {0: [0.0]}
    for event in run.rounds:
        at = number(event.get("virtual_s"))
        if at is not None:
            made.setdefault(event.get("version"), []).append(at)
    return made


def version_times(run: Run) -> list[float]:
    """The virtual times at which the server made a new version, in order; steps without one are left out."""
    found: list[float] = []
    last: Any = 0
    for event in run.rounds:
        at = number(event.get("virtual_s"))
        if at is not None and event.get("version") != last:
            found.append(at)
        last = event.get("version")
    return found


def asynchronous(run: Run) -> bool:
    """Whether work outlived the version that it started from: some update was stale, or versions lived side by side."""
    stale: Iterable[Event] = (e for e in run.clients if (number(e.get("staleness")) or 0) > 0)
    lively: Iterable[Event] = (e for e in run.rounds if (number(e.get("live_versions")) or 0) > 1)
    return next(iter(stale), None) is not None or next(iter(lively), None) is not None


def end_of(run: Run, jobs: Sequence[Job]) -> float:
    """The virtual time at which the run ended, or its last job where that was later."""
    return max([number(run.final.get("virtual_s")) or 0.0, *[job.end for job in jobs]])


def by_speed(jobs: Iterable[Job]) -> list[int]:
    """The clients that have jobs, fastest first: by the median length of their jobs."""
    lengths: dict[int, list[float]] = defaultdict(list)
    for job in jobs:
        lengths[job.client].append(job.end - job.sent)
    return sorted(lengths, key=lambda client: (median(lengths[client]), client))


def at_work(jobs: Sequence[Job]) -> tuple[np.ndarray, np.ndarray]:
    """(times, how many jobs are under way from each time on); a step function that ends at 0."""
    if not jobs:
        return np.zeros(1), np.zeros(1)
    times = np.array([job.sent for job in jobs] + [job.end for job in jobs])
    changes = np.repeat([1.0, -1.0], len(jobs))
    at, place = np.unique(times, return_inverse=True)
    return at, np.cumsum(np.bincount(place, weights=changes, minlength=len(at)))


def busy_s(jobs: Iterable[Job], start: float, end: float) -> float:
    """How much of ``start`` to ``end`` one client's jobs cover; where two overlap, it counts once."""
    total, reached = 0.0, start
    for job in sorted(jobs, key=lambda job: job.sent):
        since, until = max(job.sent, reached), min(job.end, end)
        if until > since:
            total, reached = total + until - since, until
    return total


def idle_share(run: Run) -> float | None:
    """The share of time that clients had no job, over the clients that ever worked; None without jobs.

        idle = 1 - sum_i busy_i / sum_i length_i

    A client's time goes from 0 to the end of the run; in an asynchronous run, which ends with work under way that
    left no event, to the end of the client's last job.
    """
    jobs = jobs_of(run)
    end, outstanding = number(run.final.get("virtual_s")), asynchronous(run)
    if not jobs or not end:
        return None
    theirs: dict[int, list[Job]] = defaultdict(list)
    for job in jobs:
        theirs[job.client].append(job)
    length = busy = 0.0
    for some in theirs.values():
        until = min(max(job.end for job in some), end) if outstanding else end
        length, busy = length + until, busy + busy_s(some, 0.0, until)
    return max(0.0, 1.0 - busy / length) if length else None
