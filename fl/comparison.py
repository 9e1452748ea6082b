"""What a sweep of variants says: each variant at the value that was chosen for it, and all of them at equal values.

For each variant (and each combination of further axes, the seed apart) the tuned setting's value is the one with the
best mean over seeds of the clients' own test metric after the last round; ties go to the smaller value. The central
test set, which the table reports, has no part in the choice. Values of which more runs completed go before others, so
that a value at which runs fail is not chosen for the seeds that survived.

At that value, over the n completed seeds, with the sample standard deviation (n - 1):

- the central test metric after the last round (not of the best round);
- the first round whose central test metric is at the target or better, the bytes (up + down) by its end and the virtual
  time of that evaluation, over the seeds that get there; how many do is said beside it;
- what `fl.report.pace` says: all at one virtual time, how steadily they learned, and what clients and server did;
- bytes up and down, and of the latter those of first contacts only (``bytes_once`` of the round events);
- the relative aggregation error ``||E|| / ||D*||`` (``aggregation_error``) of the first and the last round with one.

A gap is *not resolved* where the intervals mean +- standard deviation overlap, or where there is only one seed.

A further axis (``privacy.epsilon``) makes rows of its own: the value is tuned for each variant at each of its values,
and rows are compared with the best of those that share them, never across (`blocks`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fl.report.groups import IGNORED, Spread, rank, show
from fl.report.load import Collection, Run, number
from fl.report.pace import Pace, Stretch, common_stretch, pace

BEST, UNRESOLVED, RESOLVED = "best", "not resolved", "resolved"


class Reached(NamedTuple):
    """What a run had spent by its first evaluation at the target: rounds, bytes up + down, virtual seconds."""

    rounds: float
    bytes: float
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """A variant (with its values of further axes) at one value of the tuned setting, over its seeds.

    ``target_rounds``, ``target_bytes`` and ``target_seconds`` are over the ``target_rounds.n`` of ``n`` seeds that
    reach the target.
    ``standing`` says how it compares with the best row of its table; ``index`` is its variant's rank in the tuned
    table, which gives the best ones colours of their own.
    """

    variant: str
    settings: dict[str, Any]
    value: Any
    runs: list[Run]
    index: int
    metric: Spread
    clients: Spread
    target_rounds: Spread
    target_bytes: Spread
    target_seconds: Spread
    bytes_up: Spread
    bytes_down: Spread
    bytes_once: Spread
    first_error: Spread
    last_error: Spread
    trainable: int | None
    pace: Pace
    standing: str | None = None

    @property
    def name(self) -> str:
        return ", ".join([self.variant, *(f"{k.rpartition('.')[2]}={show(v)}" for k, v in self.settings.items())])

    @property
    def completed(self) -> list[Run]:
        return [run for run in self.runs if run.completed]


@dataclass
class Comparison:
    """The tables: ``tuned`` has a row a variant, ``equal`` one a variant for each value that two or more share.

    ``grid`` has every variant at all its values, ``left_out`` says of each run that did not complete what it was;
    ``stretch`` is the virtual time on which the tuned rows are compared (None where it stands still).
    """

    title: str
    metric: str
    key: str | None
    by: str | None
    target: float | None
    seeds: list[Any]
    test_examples: int | None
    stretch: Stretch | None = None
    grid: list[list[Row]] = field(default_factory=list)
    tuned: list[Row] = field(default_factory=list)
    equal: list[tuple[Any, list[Row]]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "perplexity"

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.grid for row in rows]


def compare(found: Collection) -> Comparison:
    """The comparison of a sweep's variants. ``found`` is the sweep's folder as `load_all` reads it."""
    tune = found.about.get("tune") or {}
    key, target = tune.get("key"), number(found.about.get("target"))
    runs = [run for run in found.runs if run.variant is not None]
    metric = next((run.metric for run in runs if run.completed), runs[0].metric if runs else "accuracy")
    seeds = sorted({show(run.seed): run.seed for run in runs}.values(), key=rank)
    made = Comparison(found.title, metric, key, tune.get("by"), target, seeds, _test_examples(runs))
    groups: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for run in runs:
        settings = _further(run, key)
        name = (str(run.variant), *(f"{k}={show(v)}" for k, v in settings.items()))
        groups.setdefault(name, {}).setdefault(show(_value(run, key)), []).append(run)
    for values in groups.values():
        rows = [_row(some, key, metric, target, made.higher_is_better) for some in values.values()]
        made.grid.append(sorted(rows, key=lambda row: rank(row.value)))
    # By the further axes, and within one choice of them in the order of the variants.
    made.grid.sort(key=lambda rows: [rank(value) for value in rows[0].settings.values()])
    chosen = [choose(rows, made.higher_is_better) for rows in made.grid]
    places = _places([row.metric.mean for row in chosen], made.higher_is_better)
    made.stretch = common_stretch([run for row in chosen for run in row.completed])
    made.grid = [
        [replace(row, index=place, pace=pace(row.completed, made.stretch)) for row in rows]
        for rows, place in zip(made.grid, places)
    ]
    tuned = [next(row for row in rows if row.value == own.value) for rows, own in zip(made.grid, chosen)]
    made.tuned = _judged(tuned, made.higher_is_better)
    if key is not None:
        for shown in dict.fromkeys(show(row.value) for row in sorted(made.rows, key=lambda row: rank(row.value))):
            alike = [row for row in made.rows if show(row.value) == shown]
            alike = [row for _, some in blocks(alike) if len(some) >= 2 for row in some]
            if alike:
                made.equal.append((alike[0].value, _judged(alike, made.higher_is_better)))
    made.left_out = _left_out(found)
    return made


def _places(means: Sequence[float | None], higher_is_better: bool) -> list[int]:
    """Each one's rank from the best on; those without a mean come last."""
    sign = -1.0 if higher_is_better else 1.0
    order = sorted(range(len(means)), key=lambda i: (means[i] is None, sign * (means[i] or 0.0)))
    return [order.index(i) for i in range(len(means))]


def choose(rows: Sequence[Row], higher_is_better: bool = True) -> Row:
    """The row of the tuned value: best mean of the clients' own metric, ties to the smaller value.

    Rows are one variant's. Where no run has that metric, it is the value with most completed runs.
    """
    ordered = sorted(rows, key=lambda row: rank(row.value))
    known = [row for row in ordered if row.clients.mean is not None]
    if not known:
        return max(ordered, key=lambda row: len(row.completed))
    most = max(row.clients.n for row in known)
    sign = 1.0 if higher_is_better else -1.0
    return max((r for r in known if r.clients.n == most), key=lambda row: sign * (row.clients.mean or 0.0))


def blocks(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows that may be compared with each other: one block, with its name, for each choice of the further axes.

    Without further axes there is one, unnamed.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(f"{key}={show(value)}" for key, value in row.settings.items())
        found.setdefault(name, []).append(row)
    return list(found.items())


def _judged(rows: Sequence[Row], higher_is_better: bool) -> list[Row]:
    return [row for _, some in blocks(rows) for row in judged(some, higher_is_better)]


def judged(rows: Sequence[Row], higher_is_better: bool = True) -> list[Row]:
    """The rows of one table with their ``standing``: best, or whether the gap to the best is resolved."""
    sign = 1.0 if higher_is_better else -1.0
    known = [row for row in rows if row.metric.mean is not None]
    if not known:
        return [replace(row, standing=None) for row in rows]
    best = max(known, key=lambda row: sign * (row.metric.mean or 0.0))

    def standing(row: Row) -> str | None:
        mean, std, top = row.metric.mean, row.metric.std, best.metric
        if mean is None or top.mean is None:
            return None
        if row is best:
            return BEST
        if std is None or top.std is None:
            return UNRESOLVED
        return UNRESOLVED if sign * (top.mean - mean) <= std + top.std else RESOLVED

    return [replace(row, standing=standing(row)) for row in rows]


def reached(run: Run, target: float, higher_is_better: bool = True) -> Reached | None:
    """What the run had spent by its first central evaluation at the target or better; None if none is."""
    for event in run.tests:
        value = number(event.get(run.metric))
        if value is None or (value < target if higher_is_better else value > target):
            continue
        at = bisect_right([e["round"] for e in run.rounds], event["round"]) - 1
        spent = run.rounds[at] if at >= 0 else {}
        sent = sum(number(spent.get(name)) or 0.0 for name in ("bytes_up_total", "bytes_down_total"))
        return Reached(float(event["round"]), float(sent), number(event.get("virtual_s")))
    return None


def aggregation_errors(run: Run) -> list[tuple[float, float]]:
    """(round, relative aggregation error) of the rounds that have one."""
    pairs = ((float(e["round"]), number(e.get("aggregation_error"))) for e in run.rounds)
    return [(round, error) for round, error in pairs if error is not None]


def as_plain(made: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON, numbers in full."""

    def spread(of: Spread) -> dict[str, Any] | None:
        return {"n": of.n, "mean": of.mean, "std": of.std} if of.n else None

    def row(of: Row) -> dict[str, Any]:
        target = {
            "reached": of.target_rounds.n,
            "of": len(of.completed),
            "rounds": spread(of.target_rounds),
            "bytes": spread(of.target_bytes),
            "virtual_s": spread(of.target_seconds),
        }
        return {
            "variant": of.variant,
            "settings": of.settings,
            "value": of.value,
            "n": len(of.completed),
            "runs": [run.folder.name for run in of.runs],
            made.metric: spread(of.metric),
            "against_best": of.standing,
            "clients_mean": spread(of.clients),
            "target": target if made.target is not None else None,
            "bytes_up": spread(of.bytes_up),
            "bytes_down": spread(of.bytes_down),
            "bytes_once": spread(of.bytes_once),
            "aggregation_error": {"first_round": spread(of.first_error), "last_round": spread(of.last_error)},
            "trainable_parameters": of.trainable,
            "time": {
                "server_steps": spread(of.pace.steps),
                "virtual_s": spread(of.pace.end_s),
                f"{made.metric}_at_common_s": spread(of.pace.level),
                "fluctuation": spread(of.pace.fluctuation),
                "staleness": spread(of.pace.staleness),
                "client_jobs_per_virtual_s": spread(of.pace.jobs_per_s),
                "idle_share": spread(of.pace.idle),
            },
        }

    stretch = made.stretch
    common = stretch and {
        "common_s": stretch.end_s,
        "fluctuation_over_s": None if stretch.spacing is None else stretch.spacing / 1e6,
        "fluctuation_changes": stretch.changes,
    }

    return {
        "experiment": made.title,
        "metric": made.metric,
        "higher_is_better": made.higher_is_better,
        "tune": {"key": made.key, "by": made.by} if made.key else None,
        "target": made.target,
        "seeds": made.seeds,
        "test_examples": made.test_examples,
        "time": common,
        "tuned": [row(r) for r in made.tuned],
        "equal": [{"value": value, "rows": [row(r) for r in rows]} for value, rows in made.equal],
        "grid": [row(r) for r in made.rows],
        "left_out": made.left_out,
    }


def _row(runs: list[Run], key: str | None, metric: str, target: float | None, higher_is_better: bool) -> Row:
    done = [run for run in runs if run.completed]
    first = runs[0]

    def spread(name: str) -> Spread:
        return Spread.of([run.numbers.get(name) for run in done])

    hits = [reached(run, target, higher_is_better) for run in done] if target is not None else []
    errors = [found for found in map(aggregation_errors, done) if found]
    trainable = next((t for t in (number(run.info.get("trainable_parameters")) for run in runs) if t is not None), None)
    return Row(
        variant=str(first.variant),
        settings=_further(first, key),
        value=_value(first, key),
        runs=sorted(runs, key=lambda run: rank(run.seed)),
        index=0,
        metric=spread(metric),
        clients=spread(f"client_{metric}_mean"),
        target_rounds=Spread.of([hit.rounds for hit in hits if hit is not None]),
        target_bytes=Spread.of([hit.bytes for hit in hits if hit is not None]),
        target_seconds=Spread.of([hit.seconds for hit in hits if hit is not None]),
        bytes_up=spread("bytes_up"),
        bytes_down=spread("bytes_down"),
        bytes_once=Spread.of([_once(run) for run in done]),
        first_error=Spread.of([found[0][1] for found in errors]),
        last_error=Spread.of([found[-1][1] for found in errors]),
        trainable=None if trainable is None else int(trainable),
        pace=pace([], None),
    )


def _value(run: Run, key: str | None) -> Any:
    """The run's value of the tuned setting, also where its variant sets none and the preset's own holds."""
    return None if key is None else run.axes.get(key, run.settings.get(key))


def _further(run: Run, key: str | None) -> dict[str, Any]:
    """What else a sweep varied: neither variant, tuned setting nor seed."""
    return {k: v for k, v in run.axes.items() if k not in ("variant", key, *IGNORED)}


def _once(run: Run) -> float | None:
    known = [v for v in (number(e.get("bytes_once")) for e in run.rounds) if v is not None]
    return float(sum(known)) if known else None


def _test_examples(runs: Sequence[Run]) -> int | None:
    found = {n for run in runs for n in (number(e.get("examples")) for e in run.tests[-1:]) if n is not None}
    return int(min(found)) if found else None


def _left_out(found: Collection) -> list[dict[str, Any]]:
    bad: list[dict[str, Any]] = [
        {
            "run": run.folder.name,
            "variant": run.variant,
            "overrides": {k: v for k, v in run.axes.items() if k != "variant"},
            "status": run.status,
            "error": run.info.get("error"),
        }
        for run in found.runs
        if not run.completed
    ]
    for name, why in found.missing:
        bad.append({"run": name, "variant": None, "overrides": {}, "status": "missing", "error": why})
    return bad
