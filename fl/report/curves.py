"""A run's numbers as curves: what was measured, against rounds, seconds, bytes or epsilon.

An evaluation is placed at its own round and time, at the bytes that had crossed the wire (up + down) by then, and at
the epsilon that had been spent. Several seeds become one mean curve with a band from the lowest to the highest, over
the stretch of the axis that all of them cover. In between each run has the value of its last point, since a state holds
until the next one is made; so a run of ten long rounds and one of four hundred short steps are read at the same times.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fl.report.claims import unit
from fl.report.load import Event, Run, number


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: its key, the name on its tab and the label with the unit."""

    key: str
    tab: str
    label: str

    @property
    def stepped(self) -> bool:
        """Whether lines are drawn as steps; rounds are counted, and nothing lies between them."""
        return self.key != "round"


ROUNDS = Axis("round", "Rounds", "round")
SECONDS = Axis("virtual_s", "Seconds", "virtual time (s)")
MOST_POINTS = 300


@dataclass
class Curve:
    """Points (x, y), and for several runs the lowest and highest y at each x."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    runs: int = 1


def axes_of(runs: Sequence[Run]) -> list[Axis]:
    """The horizontal axes that say something for ``runs``, the one to show first at the front.

    That is virtual time where the runs have unlike schedules, else rounds. Virtual time stands still on an instant
    network; wall time then takes its place, and the label says so.
    """
    moves = any((number(e.get("virtual_s")) or 0) > 0 for run in runs for e in [*run.rounds, *run.tests])
    found = [ROUNDS]
    if moves:
        found.insert(0 if unlike_schedules(runs) else 1, SECONDS)
    else:
        found.append(Axis("wall_s", "Seconds", "wall time (s)"))
    if any(number(e.get("bytes_up_total")) for run in runs for e in run.rounds):
        found.append(Axis("bytes", "Bytes", "traffic, up + down (MB)"))
    if any(number(e.get("epsilon")) for run in runs for e in run.rounds):
        units = {unit(run) for run in runs} - {""}
        about = f" for {units.pop()}" if len(units) == 1 else ""
        found.append(Axis("epsilon", "Epsilon", f"epsilon spent{about}"))
    return found


def unlike_schedules(runs: Sequence[Run]) -> bool:
    """Whether the runs differ in their schedule, the number of its steps apart: their rounds are then not the same."""
    keys = ("schedule.rounds", "schedule.until_s")
    found = [
        {k: v for k, v in run.settings.items() if k.startswith("schedule.") and k not in keys}
        for run in runs
        if run.settings
    ]
    return any(schedule != found[0] for schedule in found)


def metric_curve(run: Run, axis: Axis) -> Curve | None:
    """Test accuracy (in %) or perplexity; the mean over clients' own test samples where there is no central set."""
    scale = 100.0 if run.metric == "accuracy" else 1.0
    points = [(e, number(e.get(run.metric))) for e in run.tests]
    if not any(y is not None for _, y in points):
        points = [(e, number(e.get("mean"))) for e in run.client_tests]
    return _curve(run, axis, [(e, y * scale) for e, y in points if y is not None])


def loss_curve(run: Run, axis: Axis) -> Curve | None:
    """Loss on the central test set, or the clients' mean where there is none."""
    points = [(e, number(e.get("loss"))) for e in run.tests]
    if not any(y is not None for _, y in points):
        points = [(e, number(e.get("loss_mean"))) for e in run.client_tests]
    return _curve(run, axis, [(e, y) for e, y in points if y is not None])


def training_loss_curve(run: Run, axis: Axis) -> Curve | None:
    """Mean training loss of each round's clients."""
    points = [(e, number(e.get("loss"))) for e in run.rounds]
    return _curve(run, axis, [(e, y) for e, y in points if y is not None])


def spend_curve(run: Run, axis: Axis) -> Curve | None:
    """Epsilon spent by the end of each round."""
    points = [(e, number(e.get("epsilon"))) for e in run.rounds]
    return _curve(run, axis, [(e, y) for e, y in points if y is not None])


def mean_curve(curves: Sequence[Curve | None]) -> Curve | None:
    """Mean over runs at equal x, with lowest and highest; the one curve itself where there is only one.

    Runs are step functions of x. Where they have more than `MOST_POINTS` points together, x is that many even steps.
    """
    found = [c for c in curves if c is not None and len(c.x)]
    if len(found) < 2:
        return found[0] if found else None
    start, end = max(float(c.x[0]) for c in found), min(float(c.x[-1]) for c in found)
    grid = np.unique(np.concatenate([c.x for c in found]))
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return found[0]
    if len(grid) > MOST_POINTS:
        grid = np.linspace(start, end, MOST_POINTS)
    stacked = np.stack([c.y[np.searchsorted(c.x, grid, side="right") - 1] for c in found])  # (runs, points)
    return Curve(grid, stacked.mean(0), stacked.min(0), stacked.max(0), len(found))


def _curve(run: Run, axis: Axis, points: Sequence[tuple[Event, float]]) -> Curve | None:
    placed = [(x, y) for x, y in ((_place(run, axis, e), y) for e, y in points) if x is not None]
    if not placed:
        return None
    # On an axis where several points fall together (epsilon before any noise, say) the last one counts.
    by_x = dict(sorted(placed, key=lambda point: point[0]))
    return Curve(np.array(list(by_x), dtype=float), np.array(list(by_x.values()), dtype=float))


def _place(run: Run, axis: Axis, event: Event) -> float | None:
    if axis.key in ("round", "virtual_s", "wall_s"):
        return number(event.get(axis.key))
    at = bisect_right([e["round"] for e in run.rounds], event["round"]) - 1
    if at < 0:
        return 0.0
    spent = run.rounds[at]
    if axis.key == "epsilon":
        return number(spent.get("epsilon"))
    up, down = number(spent.get("bytes_up_total")), number(spent.get("bytes_down_total"))
    return None if up is None and down is None else ((up or 0) + (down or 0)) / 1e6
