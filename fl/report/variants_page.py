"""The report of a sweep's variants: each at the value chosen for it, all at equal values, and how it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl.comparison import BEST, UNRESOLVED, Comparison, Row, blocks, compare
from fl.report.cards import footer, settings_card, tile
from fl.report.client_plots import partition_picture
from fl.report.comparison_page import (
    common_settings,
    curves_card,
    everything_card,
    outcome_cards,
    privacy_by_setting,
    runs_card,
)
from fl.report.final_plot import final_picture
from fl.report.frontier import frontier_card
from fl.report.groups import Group, show
from fl.report.heat_map import attack_card
from fl.report.load import Collection, Run
from fl.report.numbers import describe, human, spread
from fl.report.pace import pace_notes
from fl.report.page import Markup, card, figure, join, page, table, tag
from fl.report.plots import client_quantiles, comparison_curves
from fl.report.style import SERIES, Picture
from fl.report.variant_plots import FLOOR, error_picture, floored, groups_of, panels_picture
from fl.report.variant_tables import (
    Column,
    columns,
    grid_table,
    grid_values,
    left_out_lines,
    notes,
    time_columns,
)

MOST_NAMED = 8


def variants_page(found: Collection, out: Path) -> tuple[str, list[Picture]]:
    """The HTML page that compares the variants of ``found`` (links are relative to ``out``), and its figures."""
    made = compare(found)
    groups = groups_of(made.tuned)
    best = sorted(groups, key=lambda group: group.index)[: len(SERIES)]
    key = made.metric if any(row.metric.n for row in made.tuned) else None
    points = [Group({"variant": row.variant, **row.settings}, row.runs) for row in made.tuned if row.runs]
    utility, frontier = frontier_card(points, key) if key else (None, None)
    attacks, heat = attack_card(points, key) if key else (None, None)
    final = final_picture(groups, key) if key and heat is None else None
    curves = comparison_curves(best)
    panels = panels_picture(made.tuned) if heat is None else None
    clients = client_quantiles(best)
    held = _partition([run for group in groups for run in group.runs])
    errors = error_picture(made.tuned)
    body = [
        _header(found, made),
        _banners(found, made),
        _tiles(found, made),
        attacks,
        utility,
        _tuned_card(made, folded=heat is not None),
        outcome_cards(key, final, clients, [held] if held else [], "variant"),
        curves_card(best, curves, *([figure(panels)] if panels else [])),
        _time_card(made),
        _error_card(errors, made.tuned),
        _choice_card(made),
        _equal_card(made),
        runs_card(found, made.metric, out),
        everything_card(groups),
        privacy_by_setting(groups),
        settings_card(found.runs[0], common_settings(found.runs), title="What the runs share"),
        footer(found.runs[0], (found.sweep or out.parent).resolve()),
    ]
    pictures = [picture for _, some in curves for picture in some]
    pictures += [p for p in (heat, frontier, final, panels, clients, held, errors) if p is not None]
    return page(f"{found.title}: {len(made.tuned)} variants compared", *body), pictures


def _header(found: Collection, made: Comparison) -> Markup:
    facts: list[tuple[str, Any]] = [("variants", len(made.tuned))]
    for key in ("model", "data"):
        values = {show(run.info.get(key)) for run in found.runs}
        if len(values) == 1 and values != {"null"}:
            facts.insert(len(facts) - 1, (key, values.pop()))
    if made.key:
        facts.append((made.key, ", ".join(show(v) for v in grid_values(made)[:MOST_NAMED])))
    facts.append(("seeds", ", ".join(show(seed) for seed in made.seeds[:12])))
    items = [tag("li", name, " ", tag("b", show(value))) for name, value in facts]
    kicker = tag("p", "Shoal sweep of variants", class_="kicker")
    return tag("header", kicker, tag("h1", found.title), tag("ul", *items, class_="facts"), class_="top")


def _banners(found: Collection, made: Comparison) -> Markup:
    said = []
    lines = left_out_lines(made)
    if lines:
        shown = "; ".join(lines[:MOST_NAMED]) + (f"; and {len(lines) - MOST_NAMED} more" if lines[MOST_NAMED:] else "")
        whole = len(found.runs) + len(found.missing)
        said.append(f"{len(lines)} of {whole} runs did not complete and are left out of the means: {shown}.")
    if len(made.tuned) > len(SERIES):
        said.append(f"Curves show the {len(SERIES)} best of {len(made.tuned)} variants; tables and panels show all.")
    return join([tag("p", note, class_="banner") for note in said])


def _tiles(found: Collection, made: Comparison) -> Markup:
    tiles = []
    best = min((row for row in made.tuned if row.standing == BEST), key=lambda row: row.index, default=None)
    if best is not None:
        name = describe(made.metric).label.lower()
        tiles.append(tile(f"Best {name}", spread(made.metric, best.metric.mean, best.metric.std), best.name, main=True))
        beside = [row for row in made.tuned if row.settings == best.settings and row is not best]
        close = sum(row.standing == UNRESOLVED for row in beside)
        tiles.append(tile("Not resolved from it", f"{close} of {len(beside)}", f"{len(made.seeds)} seeds"))
    done = sum(run.completed for run in found.runs)
    tiles.append(tile("Runs completed", f"{done} of {len(found.runs) + len(found.missing)}"))
    walls = [run.numbers["wall_s"] for run in found.runs if "wall_s" in run.numbers]
    if walls:
        tiles.append(tile("Wall time of a run", human(sum(walls) / len(walls), "seconds"), "mean"))
    return tag("dl", *tiles, class_="tiles")


def _tuned_card(made: Comparison, folded: bool = False) -> Markup:
    title = f"Each variant at its own {made.key}" if made.key else "Comparison"
    listed = tag("ul", *[tag("li", note) for note in notes(made)], class_="note")
    shown = [*_tables(columns(made), made.tuned), listed]
    return card(title, tag("details", tag("summary", "All tables"), *shown) if folded else join(shown))


def _time_card(made: Comparison) -> Markup | None:
    shown = time_columns(made)
    if not shown or made.stretch is None:
        return None
    listed = tag("ul", *[tag("li", note) for note in pace_notes(made.metric, made.stretch)], class_="note")
    return card("Virtual time", _table(shown, made.tuned), listed)


def _tables(shown: Sequence[Column], rows: Sequence[Row]) -> list[Markup]:
    """Outcomes, a table for each choice of further axes, and costs: together they would be wider than the page."""
    costs = [shown[0], *(column for column in shown if column.cost)]
    outcomes = [column for column in shown if not column.cost]
    tables = []
    for name, some in blocks(rows):
        tables += [tag("h3", name) if name else None, _table(outcomes, some)]
    return [*(part for part in tables if part is not None), tag("h3", "What it costs"), _table(costs, rows)]


def _table(shown: Sequence[Column], rows: Sequence[Row]) -> Markup:
    lines = []
    for row in rows:
        color = f"c{row.index}" if row.index < len(SERIES) else "line"  # those that the curves show have colours
        swatch = tag("span", class_="swatch", style=f"background:var(--{color})")
        cells: list[Any] = [column.cell(row) for column in shown]
        marked = [tag("b", cell) if row.standing == BEST else cell for cell in cells]
        lines.append([[swatch, marked[0]], *marked[1:]])
    return table([column.head for column in shown], lines, class_="variants")


def _error_card(picture: Picture | None, rows: Sequence[Row]) -> Markup | None:
    if picture is None:
        return None
    note = "||E|| / ||D*|| of each round, mean over seeds: E is what the rule misses of D*, the clients' mean change."
    if floored(rows):
        note += f" Below {FLOOR:g} it is drawn on the dashed line."
    return card("How exact the aggregation is", figure(picture), note=note)


def _choice_card(made: Comparison) -> Markup | None:
    if len(grid_values(made)) < 2:
        return None
    head, lines = grid_table(made)
    rows = [[tag("b", text) if chosen else text for text, chosen in line] for line in lines]
    note = f"Clients' own test {made.metric} after the last round, mean over clients; the chosen value is bold."
    return card(f"How {made.key} was chosen", table(head, rows, class_="variants"), note=note)


def _equal_card(made: Comparison) -> Markup | None:
    if not made.equal:
        return None
    parts = []
    for value, rows in made.equal:
        name = tag("summary", f"{made.key}={show(value)}", tag("span", f" {len(rows)} variants"))
        parts.append(tag("details", name, *_tables(columns(made, tuned=False), rows)))
    return card(f"All at an equal {made.key}", *parts, note="Each value that two or more variants share.")


def _partition(runs: Sequence[Run]) -> Picture | None:
    """Who holds what, where it is the same for every variant's first seed."""
    held = [run for run in runs if run.partition.get("sizes") and run.seed == runs[0].seed]
    if not held or any(run.partition != held[0].partition for run in held):
        return None
    return partition_picture(held[0])
