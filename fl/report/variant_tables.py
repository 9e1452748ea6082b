"""The tables of a sweep's variants as text: their columns, the terminal's table, comparison.md and comparison.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl.comparison import BEST, UNRESOLVED, Comparison, Row, as_plain, blocks
from fl.records import plain, write_atomically
from fl.report.claims import scope
from fl.report.groups import Spread, rank, show
from fl.report.load import number
from fl.report.numbers import DASH, describe, human, spread
from fl.report.pace import pace_columns, pace_notes

if TYPE_CHECKING:
    from rich.table import Table

STANDING = {BEST: "best", UNRESOLVED: "not resolved from the best"}


@dataclass(frozen=True)
class Column:
    """One column: its head, what stands in it, whether it is a number, and whether it is about costs (not outcomes)."""

    head: str
    cell: Callable[[Row], str]
    numeric: bool = True
    cost: bool = False


def columns(made: Comparison, tuned: bool = True) -> list[Column]:
    """The columns of one table; a column of which no row knows anything is left out.

    ``tuned`` adds the chosen value, which the tables at an equal value have in their title.
    """
    rows = made.rows
    name = describe(made.metric)
    found = [Column("variant", lambda row: row.name, numeric=False)]
    if tuned and made.key:
        found.append(Column(short_key(made.key), lambda row: show(row.value) if row.completed else DASH))
    found.append(Column("n", lambda row: counted(made, row)))
    found.append(Column(f"test {name.short or made.metric}", lambda row: _spread(made.metric, row.metric)))
    if len(rows) > 1:
        found.append(Column("against the best", lambda row: STANDING.get(row.standing or "", ""), numeric=False))
    if any(row.clients.n for row in rows):
        found.append(Column(f"clients' {made.metric}", lambda row: _spread(made.metric, row.clients)))
    if made.target is not None:
        at = human(made.target, name.kind)
        found.append(Column(f"rounds to {at}", lambda row: _target(row, row.target_rounds, "rounds")))
        found.append(Column(f"bytes to {at}", lambda row: _target(row, row.target_bytes, "bytes")))
        if made.stretch is not None:
            found.append(Column(f"time to {at}", lambda row: _target(row, row.target_seconds, "seconds")))
    found.append(Column("up", lambda row: _bytes(row.bytes_up), cost=True))
    found.append(Column("down", lambda row: _bytes(row.bytes_down), cost=True))
    if any(row.bytes_once.n for row in rows):
        found.append(Column("of it once", lambda row: _bytes(row.bytes_once), cost=True))
    if any(row.first_error.n for row in rows):
        found.append(Column("error, first round", lambda row: relative(row.first_error), cost=True))
        found.append(Column("error, last round", lambda row: relative(row.last_error), cost=True))
    found.append(Column("trained", lambda row: DASH if row.trainable is None else f"{row.trainable:,}", cost=True))
    return found


def time_columns(made: Comparison) -> list[Column]:
    """The columns of the table of virtual time; none where it stands still."""
    listed = pace_columns(made.metric, made.stretch, [row.pace for row in made.tuned])
    cells = [Column(head, lambda row, cell=cell: cell(row.pace)) for head, cell in listed]  # type: ignore[misc]
    return [Column("variant", lambda row: row.name, numeric=False), *cells] if cells else []


def notes(made: Comparison) -> list[str]:
    """What has to be known to read the tables, a sentence or two each."""
    n = len(made.seeds)
    seeds = ", ".join(show(seed) for seed in made.seeds[:12])
    said = [f"Mean ± sample standard deviation over {n} seed{'s' if n != 1 else ''} ({seeds}), after the last round."]
    if made.test_examples:
        text = f"The central test set has {made.test_examples:,} examples"
        error = sampling_error(made)
        said.append(
            f"{text}: the standard error of one accuracy on it is {100 * error:.1f} points." if error else text + "."
        )
    if made.key:
        text = f"Tuned: {made.key} is chosen for each variant by the mean over the clients' own test sets, never by the"
        said.append(f"{text} central one; ties go to the smaller value.")
        if any(len(row.completed) < len(made.seeds) for row in made.rows):
            said.append("Values of which more runs completed go before the others.")
        ends = [f"{row.name} ({show(row.value)})" for row in at_the_end(made)]
        if ends:
            said.append(f"Chosen at an end of its values, so that a better one may lie beyond: {', '.join(ends)}.")
    if n > 1:
        said.append(
            "A gap to the best is not resolved where the intervals mean ± standard deviation overlap: these seeds do "
            "not tell which is better."
        )
    else:
        said.append("With one seed no gap is resolved.")
    if len(blocks(made.tuned)) > 1:
        axes = ", ".join(made.tuned[0].settings)
        said.append(f"Each choice of {axes} has a table, and a best, of its own.")
    about = scope(run for row in made.rows for run in row.runs)
    if about:
        said.append(f"Epsilon is for {about}. What tuning looks at is in no account.")
    if made.target is not None:
        said.append(
            "To the target: the first evaluated round whose central test metric is at the target or better, over the "
            "seeds that get there; bytes are up + down by the end of that round, time is virtual."
        )
    if any(row.first_error.n for row in made.rows):
        text = (
            "Error: relative aggregation error of a round, the norm of what the rule misses of the clients' mean weight"
        )
        said.append(f"{text} change, over the norm of that change.")
    return said


def markdown(made: Comparison) -> str:
    """comparison.md: the notes, the tuned table, how the values were chosen, a table for each equal value, failures."""
    parts = [f"# {_cell(made.title)}", *(f"- {_cell(note)}" for note in notes(made))]
    title = f"Each variant at its own {made.key}" if made.key else "Variants"
    parts += ["", f"## {_cell(title)}", *_markdown_tables(columns(made), made.tuned)]
    if len(grid_values(made)) > 1:
        head, lines = grid_table(made)
        parts += ["", f"## Clients' {made.metric} at each {_cell(made.key or '')}", "", "The chosen one is bold.", ""]
        parts.append(_lines(head, [False] + [True] * (len(head) - 1), [_bold(line) for line in lines]))
    if made.stretch is not None:
        said = [f"- {_cell(note)}" for note in pace_notes(made.metric, made.stretch)]
        parts += ["", "## Virtual time", "", *said, "", _markdown_table(time_columns(made), made.tuned)]
    for value, rows in made.equal:
        parts += ["", f"## All at {_cell(made.key or '')}={_cell(show(value))}"]
        parts += _markdown_tables(columns(made, tuned=False), rows)
    parts += ["", "## Runs that did not complete", ""]
    parts += [f"- {_cell(line)}" for line in left_out_lines(made)] or ["None."]
    return "\n".join(parts) + "\n"


def write_comparison(made: Comparison, folder: Path) -> Path:
    """Write comparison.json and comparison.md into ``folder``; returns the latter's path."""
    text = json.dumps(plain(as_plain(made)), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "comparison.json", text + "\n")
    write_atomically(folder / "comparison.md", markdown(made))
    return folder / "comparison.md"


def terminal_table(made: Comparison) -> Table:
    """The tuned table as a rich table; on a narrow terminal the last columns are left out."""
    from rich.markup import escape

    from fl.report.fitting_table import FittingTable

    table = FittingTable(title="mean ± standard deviation over seeds", title_justify="left")
    shown = columns(made)
    for column in shown:
        justify: Any = "right" if column.numeric else "left"
        table.add_column(escape(column.head), justify=justify, no_wrap=True)
    table.kept_columns = min(4, len(shown))
    for row in made.tuned:
        table.add_row(*(escape(column.cell(row)) for column in shown))
    return table


def grid_values(made: Comparison) -> list[Any]:
    """Every value of the tuned setting, in order."""
    values = {show(row.value): row.value for row in made.rows}
    return sorted(values.values(), key=rank) if made.key else []


def grid_table(made: Comparison) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Head and lines of what the values were chosen by: a cell is its text and whether it is the chosen one."""
    values = grid_values(made)
    lines = []
    for rows, chosen in zip(made.grid, made.tuned):
        by_value = {show(row.value): row for row in rows}
        cells = [(chosen.name, False)]
        for value in values:
            row = by_value.get(show(value))
            text = "" if row is None else _spread(made.metric, row.clients) + _few(made, row)
            cells.append((text, row is not None and bool(row.completed) and show(value) == show(chosen.value)))
        lines.append(cells)
    return ["variant", *map(show, values)], lines


def left_out_lines(made: Comparison) -> list[str]:
    """A line on each run that did not complete: which, how it ended and why."""
    lines = []
    for run in made.left_out:
        which = [run["variant"] or "", *(f"{k}={show(v)}" for k, v in run["overrides"].items())]
        shown = ", ".join(word for word in which if word)
        why = f": {' '.join(str(run['error']).split())}" if run["error"] else ""
        lines.append(f"run {run['run']}" + (f" ({shown})" if shown else "") + f" {run['status']}{why}")
    return lines


def at_the_end(made: Comparison) -> list[Row]:
    """Tuned rows whose value is the first or the last of three or more that were tried."""
    found = []
    for rows, chosen in zip(made.grid, made.tuned):
        values = [show(row.value) for row in rows]
        numeric = all(number(row.value) is not None for row in rows)
        if numeric and len(values) > 2 and chosen.completed and show(chosen.value) in (values[0], values[-1]):
            found.append(chosen)
    return found


def sampling_error(made: Comparison) -> float | None:
    """sqrt(p (1 - p) / m): the standard error of one accuracy p, the best row's, on m test examples."""
    best = min((row for row in made.tuned if row.standing == BEST), key=lambda row: row.index, default=None)
    if best is None or best.metric.mean is None or made.metric != "accuracy" or not made.test_examples:
        return None
    p = best.metric.mean
    return math.sqrt(max(p * (1 - p), 0.0) / made.test_examples)


def counted(made: Comparison, row: Row) -> str:
    """``3``, or ``2 of 3`` where a seed is lacking."""
    n, all_seeds = len(row.completed), max(len(made.seeds), len(row.runs))
    return str(n) if n == all_seeds else f"{n} of {all_seeds}"


def short_key(key: str) -> str:
    return key.rpartition(".")[2]


def relative(of: Spread) -> str:
    """A relative error: ``0.132 ± 0.004``, or ``5.1e-08`` where it is rounding."""
    if of.mean is None:
        return DASH
    if of.mean == 0:
        return "0"
    if of.mean < 1e-3:
        return f"{of.mean:.1e}"
    return f"{of.mean:.3f}" if (of.std or 0.0) < 5e-4 else f"{of.mean:.3f} ± {of.std:.3f}"


def _spread(key: str, of: Spread) -> str:
    return spread(key, of.mean, of.std)


def _few(made: Comparison, row: Row) -> str:
    return "" if len(row.completed) >= len(made.seeds) else f" ({counted(made, row)})"


def _target(row: Row, of: Spread, kind: str) -> str:
    n = len(row.completed)
    if not n:
        return DASH
    if not of.n:
        return f"not reached (0 of {n})"
    text = _bytes(of) if kind == "bytes" else _rounds(of) if kind == "rounds" else spread("virtual_s", of.mean, of.std)
    return text if of.n == n else f"{text} ({of.n} of {n})"


def _bytes(of: Spread) -> str:
    """Bytes are mostly the same for all seeds; ``± 0`` in every cell would hide where they are not."""
    return spread("bytes_up", of.mean, of.std or None)


def _rounds(of: Spread) -> str:
    return f"{of.mean:.1f}" if of.std is None else f"{of.mean:.1f} ± {of.std:.1f}"


def _markdown_tables(shown: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A table for each choice of further axes, under its name."""
    parts = []
    for name, some in blocks(rows):
        parts += ["", *([f"### {_cell(name)}", ""] if name else []), _markdown_table(shown, some)]
    return parts


def _markdown_table(shown: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[column.cell(row) for column in shown] for row in rows]
    return _lines([column.head for column in shown], [column.numeric for column in shown], lines)


def _lines(head: Sequence[str], numeric: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in [head, rule, *rows])


def _bold(line: Sequence[tuple[str, bool]]) -> list[str]:
    return [f"**{text}**" if chosen else text for text, chosen in line]


def _cell(text: str) -> str:
    """Text that can't end a cell or a line of Markdown, and no HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace("|", "\\|")
