"""What runs promise about privacy, read from the statement in run.json: never an epsilon without what it is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fl.report.load import Run, number
from fl.report.numbers import human
from fl.report.page import Markup, table, tag

PARTS = (  # the fields of `privacy.base.Statement` that are text, in the order of its sentences
    ("Sampling", "sampling"),
    ("Clipping", "clipping"),
    ("Noise", "noise"),
    ("Participation", "participation"),
    ("Accountant", "accountant"),
    ("Holds against", "against"),
)


def stated(run: Run) -> dict[str, Any]:
    """run.json's privacy statement; empty where the run left none."""
    found = run.info.get("privacy_statement")
    return found if isinstance(found, dict) else {}


def unit(run: Run) -> str:
    """What the run's epsilon is about: ``one example of one client``; empty where nothing is promised."""
    about = stated(run).get("unit")
    return f"one {about}" if about else ""


def bound(run: Run) -> str:
    """The run's unit and delta: ``for one example of one client, delta 0.0036``; empty where nothing is promised."""
    delta = number(stated(run).get("delta"))
    return (f"for {unit(run)}" + (f", delta {delta:.2g}" if delta is not None else "")) if unit(run) else ""


def scope(runs: Iterable[Run]) -> str:
    """Whom and what the epsilons of ``runs`` are about, in a line; empty where none says.

    ``one example of one client (neighbours by adding or removing it), delta 0.0036, RDP accountant``; runs that differ
    in more than delta are told one after the other.
    """
    deltas: dict[str, list[float]] = {}
    for run in runs:
        made = stated(run)
        if not made.get("unit"):
            continue
        kind = f"one {made['unit']} (neighbours by {made.get('relation')})"
        accountant = f"{made['accountant']} accountant" if made.get("accountant") else "no accountant"
        deltas.setdefault(f"{kind}|{accountant}", []).extend(d for d in [number(made.get("delta"))] if d is not None)
    told = []
    for kind, values in deltas.items():
        about, _, accountant = kind.partition("|")
        told.append(", ".join([about, *([f"delta {_range(values)}"] if values else []), accountant]))
    return "; or ".join(told)


def statement_table(run: Run) -> Markup | None:
    """The statement as a table, each client's row folded below it; None where the run left no statement."""
    made = stated(run)
    if not made.get("mechanism"):
        return None
    rows: list[tuple[str, Any]] = [("Mechanism", made["mechanism"])]
    if made.get("unit"):
        rows.append(("Spent", _spent(made)))
        rows.append(("Protected", f"{unit(run)}; neighbours by {made.get('relation')}"))
    rows += [(name, made[key]) for name, key in PARTS if made.get(key)]
    for name, key in (("Not covered", "uncovered"), ("Counted otherwise", "also")):
        if made.get(key):
            rows.append((name, tag("ul", *[tag("li", item) for item in made[key]])))
    listed = tag("dl", *[[tag("dt", name), tag("dd", value)] for name, value in rows], class_="facts-list")
    return tag("div", listed, _holders(made.get("holders") or []))


def _spent(made: dict[str, Any]) -> str:
    epsilon, delta, target = (number(made.get(key)) for key in ("epsilon", "delta", "target"))
    if epsilon is None or delta is None:
        return "no finite epsilon"
    of = "" if target is None else f", of a budget of epsilon {target:g}"
    return f"epsilon {epsilon:.4g} at delta {delta:.3g}{of}"


def _holders(rows: Sequence[dict[str, Any]]) -> Markup | None:
    if not rows:
        return None
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_cell(row.get(key)) for key in head] for row in rows]
    count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    return tag("details", tag("summary", "What each holder has spent", tag("span", f" {count}")), table(head, lines))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return human(value, "count")


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"
