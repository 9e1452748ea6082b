"""Who worked when in virtual time, as text for a terminal: a line a client, a character a span of time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fl.errors import ShoalError
from fl.report.jobs import Job, at_work, busy_s
from fl.report.load import Run, load_all
from fl.report.timeline_view import View, seconds, view

LEGEND = """\
. idle   < download   = work, arrived fresh   # work, arrived stale   > upload, arrival   x rejected or lost
versions: | one, 2 to 9 and + several;   at work: tenths of the clients, 9 for more"""
WIDEST = 200
MARKS = {"down": "<", "up": ">"}


def timeline_text(run: Run, width: int = 100, most_clients: int = 40) -> str | None:
    """Who worked when, as text of ``width`` columns, a line a client; None where virtual time stands still.

    A character is what the client did for most of its span of time. The number at the end of a line is the share of
    the shown time that the client had a job.
    """
    shown = view(run, most_clients)
    if shown is None:
        return None
    names = ["versions", *(f"client {client}" for client in shown.clients), "at work"]
    left = max(map(len, names)) + 1
    cells = max(10, width - left - 6)
    edges = np.linspace(shown.start, shown.end, cells + 1)
    made = np.histogram(shown.versions, edges)[0]
    rows = ["".join(" " if not n else "|" if n == 1 else str(n) if n < 10 else "+" for n in made.tolist())]
    rows += [_line([job for job in shown.jobs if job.client == client], edges, shown) for client in shown.clients]
    times, count = at_work(shown.every)
    under_way = count[np.searchsorted(times, edges[:-1], side="right") - 1].tolist()
    rows.append("".join(str(min(9, int(10 * n / shown.of_clients))) for n in under_way))
    ends = seconds(shown.start), seconds(shown.end)
    axis = ends[0] + ends[1].rjust(cells - len(ends[0]))
    lines = [f"Who worked when: {shown.title}", *(f"{n:<{left}}{r}" for n, r in zip(names, rows)), " " * left + axis]
    return "\n".join(line.rstrip() for line in [*lines, LEGEND])


def print_timelines(folders: Sequence[Path]) -> None:
    """Print the timeline of every run in ``folders``, as wide as the terminal.

    Raises `ShoalError` where virtual time stands still in all of them.
    """
    runs = load_all(folders).runs
    width = min(shutil.get_terminal_size((100, 24)).columns, WIDEST)
    found = [(run, text) for run in runs if (text := timeline_text(run, width)) is not None]
    if not found:
        raise ShoalError(
            f"{folders[0]} has no timeline: no client's work took virtual time. "
            "Choose a network with time for the run, network=uniform say."
        )
    for run, text in found:
        print(f"{run.folder}\n{text}\n" if len(runs) > 1 else text)


def _line(jobs: Sequence[Job], edges: np.ndarray, shown: View) -> str:
    """One client's characters and its share of time at work."""
    most, marks = np.zeros(len(edges) - 1), ["."] * (len(edges) - 1)
    idle = np.diff(edges)
    for job in jobs:
        kind = "x" if not job.accepted else "#" if job.staleness else "="
        for phase, begin, end in job.phases():
            covered = np.minimum(end, edges[1:]) - np.maximum(begin, edges[:-1])
            idle = idle - np.maximum(covered, 0)
            for place in np.flatnonzero(covered > most).tolist():
                most[place], marks[place] = covered[place], MARKS.get(phase, kind)
    marks = [mark if most[place] >= idle[place] else "." for place, mark in enumerate(marks)]
    for job in jobs:  # an arrival tells jobs apart that follow one another at once
        if job.accepted and job.end <= shown.end and job.end - job.sent > 2 * (edges[1] - edges[0]):
            marks[int(np.searchsorted(edges, job.end)) - 1] = ">"
    share = busy_s(jobs, shown.start, shown.end) / (shown.end - shown.start)
    return "".join(marks) + f" {round(100 * share):3d} %"
