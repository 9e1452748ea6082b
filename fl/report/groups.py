"""Runs grouped by what was varied, the seed apart: one group is one row of a comparison, one line of a plot.

Mean and sample standard deviation (n - 1) are taken over a group's completed runs; a run that failed or was
interrupted stopped at another point and would not be comparable, so it is only counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fl.report.load import Run, plain

IGNORED = ("seed", "name")  # the seed is what is averaged over; a name only labels
DEFAULT = "(default)"


@dataclass
class Group:
    """Runs that share the varied settings ``values`` (key -> value); ``name`` is what to call them, if not by these."""

    values: dict[str, Any]
    runs: list[Run]
    index: int = 0
    name: str = ""

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        if not self.values:
            return self.runs[0].experiment
        if len(self.values) == 1:
            key, value = next(iter(self.values.items()))
            return f"{key.rpartition('.')[2]}={show(value)}"
        return ", ".join(f"{key.rpartition('.')[2]}={show(value)}" for key, value in self.values.items())

    @property
    def completed(self) -> list[Run]:
        return [run for run in self.runs if run.completed]

    @property
    def curves(self) -> list[Run]:
        """The runs to draw: the completed ones, or all there are if none ended well."""
        return self.completed or self.runs

    def statistics(self, key: str) -> tuple[int, float | None, float | None]:
        """(n, mean, sample standard deviation) of a final number; the deviation is None below two runs."""
        values = [run.numbers[key] for run in self.completed if key in run.numbers]
        return statistics(values)


def statistics(values: Sequence[float]) -> tuple[int, float | None, float | None]:
    """(n, mean, sample standard deviation with n - 1); None where there are too few values."""
    n = len(values)
    if n == 0:
        return 0, None, None
    mean = math.fsum(values) / n
    if n == 1:
        return 1, mean, None
    return n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a number over ``n`` seeds; None where there are too few."""

    n: int = 0
    mean: float | None = None
    std: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        return cls(*statistics([v for v in values if v is not None]))


def show(value: Any) -> str:
    """A setting's value as one short text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)


def varying(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that differ between ``runs``, without the seed: key -> each run's value.

    In a sweep these are its axes. Otherwise they are the overrides that differ, if these tell the runs apart as finely
    as their full settings do (``model=a`` says more than the ten settings that follow from it); else the settings.
    """
    if all(run.axes for run in runs):
        return _differing([run.axes for run in runs], runs)
    settings = _differing([run.settings for run in runs], runs)
    overrides = _differing([run.overrides for run in runs], runs)
    if overrides and _classes(overrides, len(runs)) == _classes(settings, len(runs)):
        return overrides
    if not settings:
        experiments = [run.experiment for run in runs]
        return {"experiment": experiments} if len(set(experiments)) > 1 else {}
    return settings


def _differing(tables: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, list[Any]]:
    keys = list(dict.fromkeys(key for table in tables for key in table))
    found = {}
    for key in keys:
        if key in IGNORED or key.startswith("hydra"):
            continue
        values = [plain(t[key]) if key in t else run.settings.get(key, DEFAULT) for t, run in zip(tables, runs)]
        if len({show(v) for v in values}) > 1:
            found[key] = values
    return found


def _classes(table: dict[str, list[Any]], n: int) -> list[int]:
    """Which runs are alike: each run's class is the first run with the same values."""
    rows = [tuple(show(values[i]) for values in table.values()) for i in range(n)]
    return [rows.index(row) for row in rows]


def group(runs: Sequence[Run]) -> list[Group]:
    """The groups of ``runs`` in the order of their values (numbers by size, then text)."""
    table = varying(runs)
    found: dict[tuple[str, ...], Group] = {}
    for i, run in enumerate(runs):
        values = {key: column[i] for key, column in table.items()}
        key = tuple(show(v) for v in values.values())
        found.setdefault(key, Group(values, [])).runs.append(run)
    ordered = sorted(found.values(), key=lambda g: [rank(v) for v in g.values.values()])
    for index, item in enumerate(ordered):
        item.index = index
        item.runs.sort(key=lambda run: rank(run.seed))
    return ordered


def rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, show(value))
