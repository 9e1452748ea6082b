"""The report of several runs: a table of mean ± standard deviation over seeds, and their curves side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl.report.cards import footer, privacy_card, settings_card, status, tile
from fl.report.claims import scope, statement_table
from fl.report.client_plots import partition_picture
from fl.report.final_plot import final_picture
from fl.report.frontier import frontier_card
from fl.report.groups import Group, group, show
from fl.report.heat_map import attack_card
from fl.report.load import Collection, Run
from fl.report.numbers import DASH, describe, human, in_order, spread, write
from fl.report.pace import common_stretch, pace, pace_columns, pace_notes
from fl.report.page import Markup, card, figure, join, page, table, tabs, tag
from fl.report.plots import MOST_LINES, client_quantiles, compared, comparison_curves
from fl.report.style import SERIES, Picture
from fl.report.tables import counted, headline_keys

MOST_PARTITIONS = 6
MOST_ROWS = 40


def comparison_page(found: Collection, out: Path) -> tuple[str, list[Picture]]:
    """The HTML page that compares ``found.runs`` (links are relative to ``out``), and its figures."""
    groups = group(found.runs)
    metric = found.runs[0].metric
    key = next((k for k in (metric, "loss") if any(g.statistics(k)[0] for g in groups)), None)
    utility, frontier = frontier_card(groups, key) if key else (None, None)
    attacks, heat = attack_card(groups, key) if key else (None, None)
    final = final_picture(groups, key) if key and frontier is None and heat is None else None
    curves = comparison_curves(groups)
    clients = client_quantiles(groups)
    partitions = partitions_of(groups)
    body = [
        _header(found, groups),
        _banners(found, groups),
        _tiles(found.runs, groups, key),
        attacks,
        utility,
        _table_card(groups, key),
        curves_card(groups, curves),
        _time_card(groups, metric),
        outcome_cards(key, final, clients, partitions),
        runs_card(found, metric, out),
        everything_card(groups),
        privacy_by_setting(groups),
        settings_card(found.runs[0], common_settings(found.runs), title="What the runs share"),
        footer(found.runs[0], (found.sweep or out.parent).resolve()),
    ]
    pictures = [picture for _, some in curves for picture in some]
    pictures += [p for p in (heat, frontier, final, clients, *partitions) if p is not None]
    return page(f"{found.title}: {len(found.runs)} runs compared", *body), pictures


_DOTS = "Small dots are single runs, the large one is their mean, the bar one standard deviation each way."
_CLIENTS = (
    "Each client's own test samples after the last round; mean over seeds. Left of the dashed line: worst decile."
)


def outcome_cards(
    key: str | None,
    final: Picture | None,
    clients: Picture | None,
    partitions: Sequence[Picture],
    what: str = "setting",
) -> Markup:
    """Cards of what came out; those with one figure stand side by side."""
    small: list[Markup] = []
    large: list[Markup] = []
    if final is not None and key:
        small.append(card(f"{describe(key).label} by {what}", figure(final), note=_DOTS))
    if clients is not None:
        small.append(card("How evenly clients are served", figure(clients), note=_CLIENTS))
    if len(partitions) == 1:
        one = card("Who holds what", figure(partitions[0]), note=f"The same for all {what}s; the first run's seed.")
        (large if partitions[0].wide else small).append(one)
    elif partitions:
        shown = tag("div", *[figure(p) for p in partitions], class_="figures")
        large.append(card("Who holds what", shown, note="The first seed of each setting."))
    return join([tag("div", *small, class_="columns") if small else None, *large])


def _header(found: Collection, groups: Sequence[Group]) -> Markup:
    varied = [tag("li", key, " ", tag("b", _values(groups, key))) for key in groups[0].values]
    seeds = list(dict.fromkeys(show(run.seed) for run in found.runs))
    shared = [
        tag("li", key, " ", tag("b", value))
        for key in ("model", "data", "adapter")
        if key not in groups[0].values
        and len(values := {show(r.info.get(key)) for r in found.runs}) == 1
        and (value := values.pop()) != "null"
    ]
    return tag(
        "header",
        tag("p", "Shoal sweep" if found.sweep else "Shoal comparison", class_="kicker"),
        tag("h1", found.title),
        tag("ul", *shared, *varied, tag("li", "seeds ", tag("b", ", ".join(seeds[:12]))), class_="facts"),
        class_="top",
    )


def _values(groups: Sequence[Group], key: str) -> str:
    values = list(dict.fromkeys(show(item.values[key]) for item in groups))
    return ", ".join(values[:8]) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _banners(found: Collection, groups: Sequence[Group]) -> Markup:
    bad = [run for run in found.runs if not run.completed]
    notes = []
    if bad:
        names = ", ".join(f"{run.folder.name} ({run.status})" for run in bad[:8]) + (" ..." if len(bad) > 8 else "")
        notes.append(f"{len(bad)} of {len(found.runs)} runs did not complete and are left out of the means: {names}.")
    for name, why in found.missing:
        notes.append(f"Run {name} of the sweep is missing: {why}.")
    if len(groups) > MOST_LINES:
        notes.append(f"Curves show the {MOST_LINES} best of {len(groups)} settings; the table shows all.")
    return join([tag("p", note, class_="banner") for note in notes])


def _tiles(runs: Sequence[Run], groups: Sequence[Group], key: str | None) -> Markup:
    tiles = []
    best = best_group(groups, key) if key else None
    if key and best is not None:
        _, mean, std = best.statistics(key)
        label = f"Best {describe(key).label.lower()}"
        tiles.append(tile(label, spread(key, mean, std), best.label if len(groups) > 1 else "", main=True))
    done = sum(run.completed for run in runs)
    tiles.append(tile("Runs completed", f"{done} of {len(runs)}", f"{len(groups)} settings" if len(groups) > 1 else ""))
    traffic = [run.numbers.get("bytes_up", 0) + run.numbers.get("bytes_down", 0) for run in runs]
    if any(traffic):
        tiles.append(tile("Traffic of a run", human(sum(traffic) / len(traffic), "bytes"), "mean, up + down"))
    walls = [run.numbers["wall_s"] for run in runs if "wall_s" in run.numbers]
    if walls:
        tiles.append(tile("Wall time of a run", human(sum(walls) / len(walls), "seconds"), "mean"))
    return tag("dl", *tiles, class_="tiles")


def best_group(groups: Sequence[Group], key: str) -> Group | None:
    known = [(item.statistics(key)[1], item) for item in groups]
    ranked = [(mean, item) for mean, item in known if mean is not None]
    if not ranked:
        return None
    choose = max if describe(key).kind == "percent" else min
    return choose(ranked, key=lambda pair: pair[0])[1]


def _table_card(groups: Sequence[Group], key: str | None) -> Markup:
    note = "Mean ± sample standard deviation over seeds; n is the number of completed runs."
    about = scope(run for item in groups for run in item.runs)
    note += f" Epsilon is for {about}." if about else ""
    return card("Comparison", _table(groups, headline_keys(groups), short=True, best=key), note=note)


def _table(groups: Sequence[Group], keys: Sequence[str], short: bool, best: str | None = None) -> Markup:
    settings = list(groups[0].values)
    head = [*(settings or ["experiment"]), "n"]
    head += [(describe(k).short if short else "") or describe(k).label for k in keys]
    top = best_group(groups, best) if best and len(groups) > 1 else None
    rows = []
    for item in groups:
        first, *rest = [show(v) for v in item.values.values()] or [item.label]
        cells: list[Any] = []
        for key in keys:
            text = spread(key, *item.statistics(key)[1:])
            cells.append(tag("b", text) if item is top and key == best else text)
        rows.append([[_swatch(item), first], *rest, counted(item), *cells])
    return table(head, rows, right_from=max(1, len(settings)))


def _swatch(item: Group) -> Markup:
    return tag("span", class_="swatch", style=f"background:var(--c{item.index % len(SERIES)})")


def _time_card(groups: Sequence[Group], metric: str) -> Markup | None:
    stretch = common_stretch([run for item in groups for run in item.completed])
    if stretch is None:
        return None
    rows = [pace(item.completed, stretch) for item in groups]
    shown = pace_columns(metric, stretch, rows)
    lines = [
        [[_swatch(item), item.label], counted(item), *[cell(row) for _, cell in shown]]
        for item, row in zip(groups, rows)
    ]
    listed = tag("ul", *[tag("li", note) for note in pace_notes(metric, stretch)], class_="note")
    return card("Virtual time", table(["", "n", *[head for head, _ in shown]], lines), listed)


def curves_card(groups: Sequence[Group], curves: Any, *more: Markup) -> Markup | None:
    """Curves of the groups, one tab a horizontal axis, and what else belongs below them."""
    if not curves:
        return None
    views = [(axis.key, axis.tab, tag("div", *[figure(p) for p in some], class_="figures")) for axis, some in curves]
    several = any(len(item.curves) > 1 for item in compared(groups))
    note = "Lines are means over seeds, bands reach from the lowest to the highest seed." if several else ""
    return card("Training", tabs("Horizontal axis", views), *more, note=note)


def partitions_of(groups: Sequence[Group]) -> list[Picture]:
    """One partition a group, where groups are few and their partitions differ; one where they are all alike."""
    first = [item.runs[0] for item in groups if item.runs[0].partition.get("sizes")]
    if not first:
        return []
    if all(run.partition == first[0].partition for run in first):
        picture = partition_picture(first[0])
        return [picture] if picture else []
    shown = [item for item in groups if item.runs[0].partition.get("sizes")][:MOST_PARTITIONS]
    pictures = [
        partition_picture(item.runs[0], f"partition_{item.index}", f"Training samples per client, {item.label}")
        for item in shown
    ]
    return [p for p in pictures if p is not None]


def runs_card(found: Collection, metric: str, out: Path) -> Markup:
    """Every run with its numbers, and a link to its own report where it has one; folded where runs are many."""
    groups = group(found.runs)
    rows = []
    for item in groups:
        for run in item.runs:
            own = run.folder / "report.html"
            name: Any = run.folder.name
            if own.is_file() and own.resolve() != out.resolve():
                link = os.path.relpath(own.resolve(), out.resolve().parent)
                name = tag("a", name, href=Path(link).as_posix())
            values = [show(v) for v in item.values.values()]
            numbers = [write(k, run.numbers.get(k)) for k in (metric, "loss", "wall_s")]
            rows.append([name, *values, show(run.seed), status(run), *numbers])
    head = ["run", *groups[0].values, "seed", "status", metric, "loss", "wall time"]
    listed = table(head, rows, right_from=len(groups[0].values) + 3)
    if len(rows) > MOST_ROWS:
        listed = tag("details", tag("summary", f"All {len(rows)} runs"), listed)
    return card("Runs", listed)


def everything_card(groups: Sequence[Group]) -> Markup:
    """Every final number of every group, folded."""
    keys = in_order({key for item in groups for run in item.runs for key in run.numbers})
    head = ["mean ± standard deviation", *[item.label for item in groups]]
    rows = [[describe(key).label, *[spread(key, *item.statistics(key)[1:]) for item in groups]] for key in keys]
    return card("All final numbers", tag("details", tag("summary", "Every number of every setting"), table(head, rows)))


def privacy_by_setting(groups: Sequence[Group]) -> Markup:
    """What is promised: one statement where all runs make the same, else each setting's own."""
    if len({str(run.info.get("privacy")) for item in groups for run in item.runs}) == 1:
        return privacy_card(groups[0].runs[0])
    parts = []
    for item in groups:
        text = str(item.runs[0].info.get("privacy") or DASH)
        parts.append(tag("details", tag("summary", item.label), statement_table(item.runs[0]) or tag("p", text)))
    note = "What the first run of each setting promises."
    return card("Privacy", *parts, note=note, class_="card privacy")


def common_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that all runs share."""
    first = runs[0].settings
    shared = {}
    for key, value in first.items():
        if all(key in run.settings and run.settings[key] == value for run in runs):
            shared[key] = value
    return shared
