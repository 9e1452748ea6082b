"""Tables of final numbers: one run's, a comparison's (mean ± standard deviation over seeds), and ``summary.csv``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl.report.claims import bound
from fl.report.groups import Group, group, show
from fl.report.load import Run, number
from fl.report.numbers import describe, in_order, spread, write

if TYPE_CHECKING:
    from rich.table import Table


def final_rows(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each final number of a run; the remark gives the value before training."""
    start = next((e for e in run.tests if e.get("round") == 0), {})
    rows = []
    for key in in_order(run.numbers):
        before = number(start.get(key)) if key in ("accuracy", "perplexity", "macro_f1", "loss") else None
        remark = f"{write(key, before)} before training" if before is not None else ""
        if key == "rejected_updates" and run.rejected:
            remark = ", ".join(f"{reason} {count:,}" for reason, count in run.rejected.items())
        if key == "epsilon":
            remark = bound(run)
        rows.append((describe(key).label, write(key, run.numbers[key]), remark))
    return rows


def final_table(run: Run) -> Table:
    """One run's final numbers as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{run.experiment}, seed {run.seed}: {run.status}"), title_justify="left")
    table.add_column("final")
    table.add_column("value", justify="right")
    table.add_column("", style="dim")
    for label, value, remark in final_rows(run):
        table.add_row(label, value, escape(remark))
    return table


def headline_keys(groups: Sequence[Group]) -> list[str]:
    """The final numbers worth a column: the catalogue's headlines that some run has (no column of zero rejections)."""
    runs = [run for item in groups for run in item.runs]
    present = {key for run in runs for key in run.numbers}
    keys = [key for key in in_order(present) if describe(key).headline]
    if not any(run.numbers.get("rejected_updates") for run in runs):
        keys = [key for key in keys if key != "rejected_updates"]
    if not any(run.numbers.get("virtual_s") for run in runs):
        keys = [key for key in keys if key != "virtual_s"]
    return keys


def counted(item: Group) -> str:
    """How many runs a row stands on: ``3``, or ``2 of 3`` when one did not complete."""
    done, all_runs = len(item.completed), len(item.runs)
    return str(done) if done == all_runs else f"{done} of {all_runs}"


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row a group of runs that differ only in their seed, as a rich table: settings, n, mean ± sd.

    On a narrow terminal the last columns are left out; `write_summary_csv` has them all.
    """
    from rich.markup import escape

    from fl.report.fitting_table import FittingTable

    groups = group(runs)
    table = FittingTable(title="mean ± standard deviation over seeds", title_justify="left")
    settings = list(groups[0].values) or ["experiment"]
    for key in settings:
        table.add_column(escape(key), overflow="fold")
    table.add_column("n", justify="right")
    keys = headline_keys(groups)
    for key in keys:
        table.add_column(describe(key).short or describe(key).label, justify="right", no_wrap=True)
    table.kept_columns = len(settings) + 2
    for item in groups:
        values = [show(v) for v in item.values.values()] or [item.label]
        cells = [spread(key, *item.statistics(key)[1:]) for key in keys]
        table.add_row(*(escape(v) for v in values), counted(item), *cells)
    return table


def write_summary_csv(runs: Sequence[Run], path: Path | str) -> Path:
    """Write one line a group: varied settings, n, runs, failed, seeds, and each final number's mean and deviation.

    Numbers are written in full (seconds, bytes, fractions), empty where there is none. The file is replaced whole.
    """
    path = Path(path)
    groups = group(runs)
    keys = in_order({key for run in runs for key in run.numbers})
    settings = list(groups[0].values)
    head = [*settings, "n", "runs", "failed", "seeds"]
    head += [f"{key}_{part}" for key in keys for part in ("mean", "std")]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for item in groups:
            line: list[Any] = [show(v) for v in item.values.values()]
            failed = sum(run.status == "failed" for run in item.runs)
            line += [len(item.completed), len(item.runs), failed, _join(run.seed for run in item.runs)]
            for key in keys:
                line += ["" if v is None else v for v in item.statistics(key)[1:]]
            writer.writerow(line)
    os.replace(partial, path)
    return path


def _join(values: Iterable[Any]) -> str:
    return " ".join("" if v is None else str(v) for v in values)
