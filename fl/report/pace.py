"""How fast a run went in virtual time and how steadily it learned, so that unlike schedules can be compared.

Runs whose server steps differ in number and length have only time in common. Their test metric is read as a step
function of virtual time, since a state holds until the next version: m(t) is the last evaluation at or before t.
Of all compared runs, let T be the earliest last evaluation and h the longest gap between evaluations in (T/2, T].

    level        m(T)
    fluctuation  sample standard deviation (n - 1) of the changes m(T - kh) - m(T - (k + 1)h), while T - (k + 1)h >= T/2

So every run is read at the same times, and each change has at least one new evaluation of each run behind it: a run
that is evaluated often does not look steadier for it. A steady rise has no fluctuation. Fewer than three changes give
none. Times are compared in whole microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fl.report.curves import SECONDS, metric_curve
from fl.report.groups import Spread, statistics
from fl.report.jobs import asynchronous, idle_share
from fl.report.load import Run, number
from fl.report.numbers import human, spread

FEWEST_CHANGES = 3


@dataclass(frozen=True)
class Stretch:
    """What runs are compared on: virtual time up to ``end``, read every ``spacing`` (None: evaluations are too few)."""

    end: int  # microseconds
    spacing: int | None

    @property
    def end_s(self) -> float:
        return self.end / 1e6

    @property
    def changes(self) -> int:
        """How many changes the fluctuation is taken over."""
        return 0 if self.spacing is None else (self.end - self.end // 2) // self.spacing


@dataclass(frozen=True)
class Pace:
    """Time, work and steadiness of runs that differ in their seed only."""

    steps: Spread
    end_s: Spread
    level: Spread
    fluctuation: Spread
    staleness: Spread
    jobs_per_s: Spread
    idle: Spread


def common_stretch(runs: Sequence[Run]) -> Stretch | None:
    """The stretch of virtual time that all evaluated ``runs`` cover; None where time stands still."""
    times = [readings[0] for readings in map(_readings, runs) if readings is not None]
    end = min((int(at[-1]) for at in times), default=0)
    if end <= 0:
        return None
    gaps = [int(b - a) for at in times for a, b in pairwise(at) if b > end // 2 and a < end]
    made = Stretch(end, max(gaps, default=0) or None)
    return made if made.changes >= FEWEST_CHANGES else Stretch(end, None)


def level(run: Run, stretch: Stretch) -> float | None:
    """The test metric at the end of ``stretch``, in its own unit (accuracy: a fraction)."""
    readings = _readings(run)
    return None if readings is None else _read(readings, [stretch.end])[0]


def fluctuation(run: Run, stretch: Stretch) -> float | None:
    """The standard deviation of the test metric's changes over ``stretch.spacing``; None where there are too few."""
    readings = _readings(run)
    if readings is None or stretch.spacing is None:
        return None
    values = _read(readings, [stretch.end - k * stretch.spacing for k in range(stretch.changes + 1)])
    known = [v for v in values if v is not None]
    return statistics([a - b for a, b in pairwise(known)])[2] if len(known) == len(values) else None


def mean_staleness(run: Run) -> float | None:
    """The mean staleness of the accepted updates, in versions; None where none was accepted."""
    stale = [number(e.get("staleness")) or 0.0 for e in run.clients if e.get("accepted")]
    return float(np.mean(stale)) if stale else None


def jobs_per_s(run: Run) -> float | None:
    """Client jobs that ended by the run's end, whatever became of them, per virtual second; None without time."""
    end = number(run.final.get("virtual_s"))
    if not end or not run.clients:
        return None
    return sum((number(e.get("virtual_s")) or 0.0) <= end for e in run.clients) / end


def pace_numbers(run: Run) -> dict[str, float]:
    """What the run's own tables say of its pace; of a run without stale updates nothing about staleness."""
    stale = mean_staleness(run) if asynchronous(run) else None
    found = {"staleness_mean": stale, "jobs_per_virtual_s": jobs_per_s(run), "idle_share": idle_share(run)}
    return {key: value for key, value in found.items() if value is not None}


def pace(runs: Sequence[Run], stretch: Stretch | None) -> Pace:
    """The pace of ``runs``, compared with others over ``stretch``."""

    def of(value: Callable[[Run], float | None]) -> Spread:
        return Spread.of([value(run) for run in runs])

    return Pace(
        steps=of(lambda run: run.numbers.get("rounds")),
        end_s=of(lambda run: run.numbers.get("virtual_s")),
        level=of(lambda run: level(run, stretch) if stretch else None),
        fluctuation=of(lambda run: fluctuation(run, stretch) if stretch else None),
        staleness=of(mean_staleness),
        jobs_per_s=of(lambda run: run.numbers.get("jobs_per_virtual_s")),
        idle=of(lambda run: run.numbers.get("idle_share")),
    )


def pace_columns(metric: str, stretch: Stretch | None, rows: Sequence[Pace]) -> list[tuple[str, Callable[[Pace], str]]]:
    """(head, cell) of the table of paces, without columns that say nothing; none where virtual time stands still."""
    if stretch is None:
        return []
    shown: list[tuple[str, Callable[[Pace], str]]] = [
        ("server steps", lambda row: _exact("rounds", row.steps)),
        ("virtual time", lambda row: _exact("virtual_s", row.end_s)),
        (f"{metric} at {human(stretch.end_s, 'seconds')}", lambda row: _exact(metric, row.level)),
    ]
    if stretch.spacing is not None:
        over = human(stretch.spacing / 1e6, "seconds")
        shown.append(
            (f"fluctuation over {over}", lambda row: spread(metric, row.fluctuation.mean, row.fluctuation.std))
        )
    if any(row.staleness.mean for row in rows):
        shown.append(("mean staleness", lambda row: _exact("staleness_mean", row.staleness)))
    if any(row.jobs_per_s.n for row in rows):
        shown.append(("client jobs", lambda row: _exact("jobs_per_virtual_s", row.jobs_per_s)))
    if any(row.idle.n for row in rows):
        shown.append(("clients idle", lambda row: _exact("idle_share", row.idle)))
    return shown


def pace_notes(metric: str, stretch: Stretch) -> list[str]:
    """What has to be known to read the table of paces."""
    said = [
        f"At {human(stretch.end_s, 'seconds')}, the latest virtual time that all runs reach, each run has the {metric} "
        "of its last evaluation by then."
    ]
    if stretch.spacing is not None:
        said.append(
            f"Fluctuation: standard deviation of the change of the test {metric} over "
            f"{human(stretch.spacing / 1e6, 'seconds')}, {stretch.changes} changes in the second half of that time. "
            "The step is the longest time between two evaluations of any run there."
        )
    return said


def _exact(key: str, of: Spread) -> str:
    """A deviation of rounding only is left out: what all seeds share need not say so in every cell."""
    alike = of.mean is not None and of.std is not None and of.std <= 1e-12 * abs(of.mean)
    return spread(key, of.mean, None if alike else of.std)


def _readings(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """(microseconds, test metric) of the evaluations; None where there are none."""
    curve = metric_curve(run, SECONDS)
    if curve is None:
        return None
    return np.round(curve.x * 1e6).astype(np.int64), curve.y / (100.0 if run.metric == "accuracy" else 1.0)


def _read(readings: tuple[np.ndarray, np.ndarray], times: Sequence[int]) -> list[float | None]:
    at, values = readings
    places = np.searchsorted(at, np.asarray(times), side="right") - 1
    return [float(values[place]) if place >= 0 else None for place in places.tolist()]
