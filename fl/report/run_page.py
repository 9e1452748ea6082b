"""The report of one run: headline numbers, curves, clients, partition, refusals, settings, versions, privacy."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fl.report.audit_card import audit_card
from fl.report.cards import footer, privacy_card, settings_card, short, status, tile
from fl.report.claims import bound
from fl.report.client_plots import client_history, client_picture, partition_picture
from fl.report.jobs import asynchronous
from fl.report.load import Run, number
from fl.report.numbers import compact, describe, human, write
from fl.report.pace import common_stretch, fluctuation
from fl.report.page import Markup, card, figure, join, page, table, tabs, tag
from fl.report.peers import peers_card, peers_pictures
from fl.report.plots import run_curves, spend_picture
from fl.report.staleness_plots import staleness_pictures
from fl.report.style import Picture
from fl.report.tables import final_rows
from fl.report.timeline_plot import timeline_picture
from fl.report.topology_plot import topology_card, topology_picture

REASONS = {  # the reasons of fl.validation, in words
    "unexpected": "nobody had asked for it",
    "duplicate": "this work had been answered before",
    "late": "it arrived after the round was over",
    "stale": "it started from a version that was too old by then",
    "budget": "the client's privacy budget was spent",
    "error": "the client failed",
    "schema": "it did not have the records that were asked for",
    "version": "it was made from another version, or for another round",
    "layout": "its tensors were another model's or adapter's",
    "shape": "it did not have the right number of values",
    "not_finite": "a value was NaN or infinite",
    "too_large": "its norm was over the limit",
    "weight": "it claimed more examples than there can be",
    "proof": "its masked or shared form could not be used",
    "missing": "it never arrived",
}


def run_page(run: Run) -> tuple[str, list[Picture]]:
    """The HTML page of ``run`` and the figures that stand in it."""
    curves = run_curves(run)
    spent = spend_picture(run)
    clients = [p for p in (client_picture(run), client_history(run)) if p is not None]
    held = partition_picture(run)
    timeline, stale = timeline_picture(run), staleness_pictures(run)
    body = [
        _header(run),
        _banners(run),
        _tiles(run),
        _curves_card(run, curves),
        _final_card(run),
        _rejected_card(run),
        privacy_card(run, spent),
        audit_card(run),
        _clients_card(run, clients),
        _partition_card(run, held),
        topology_card(run),
        peers_card(run),
        card("Timeline", figure(timeline), note=_TIMELINE) if timeline is not None else None,
        _staleness_card(stale),
        settings_card(run),
        footer(run, run.folder),
    ]
    pictures = [picture for _, some in curves for picture in some]
    around = (topology_picture(run), *peers_pictures(run))
    pictures += [p for p in (spent, *clients, held, *around, timeline, *stale) if p is not None]
    return page(f"{run.experiment}, seed {run.seed}: {run.status}", *body), pictures


_TIMELINE = (
    "A row is a client. A bar is one job, from the request to the arrival of its update; its colour says what became "
    "of it. A stale update started from a version that had been replaced when it arrived. A gap is idle time. Ticks "
    "above are new versions of the shared adapter. Work that was under way when the run ended left no record."
)


def _header(run: Run) -> Markup:
    info = run.info
    facts: list[tuple[str, Any]] = [
        ("model", info.get("model")),
        ("data", info.get("data")),
        ("clients", info.get("num_clients")),
        ("adapter", info.get("adapter")),
        ("seed", run.seed),
    ]
    trained, total = number(info.get("trainable_parameters")), number(info.get("total_parameters"))
    if trained is not None:
        of = f" of {compact(total)}" if total else ""
        facts.append(("trained parameters", f"{compact(trained)}{of}"))
    items = [tag("li", name, " ", tag("b", value)) for name, value in facts if value is not None]
    return tag(
        "header",
        tag("p", "Shoal run", when(run), class_="kicker"),
        tag("h1", run.experiment, status(run)),
        tag("ul", *items, class_="facts"),
        class_="top",
    )


def when(run: Run) -> str:
    """`` of 14 March 2026, 09:26`` or nothing."""
    try:
        started = datetime.fromisoformat(str(run.info.get("started")))
    except ValueError:
        return ""
    return f" of {started.day} {started:%B %Y, %H:%M}" + (f" {started:%Z}" if started.tzinfo else "")


def _banners(run: Run) -> Markup:
    found = []
    done, planned = number(run.final.get("rounds")), number(run.settings.get("schedule.rounds"))
    reached = f"{done:,.0f} of {planned:,.0f} rounds were done" if done is not None and planned else ""
    if run.status == "failed":
        why = str(run.info.get("error") or "The run failed.")
        found.append(tag("p", why, f" ({reached})" if reached else "", class_="banner failed"))
    elif not run.completed:
        text = f"This run has not ended ({run.status}): {reached or 'the numbers are those so far'}. "
        found.append(
            tag(
                "p",
                text,
                "If it is not at work any more, go on with ",
                tag("code", f"shoal run --resume {run.folder}"),
                class_="banner",
            )
        )
    if run.skipped_lines:
        lines = "1 line" if run.skipped_lines == 1 else f"{run.skipped_lines:,} lines"
        found.append(tag("p", f"Left out, because unreadable: {lines} of metrics.jsonl.", class_="banner"))
    return join(found)


def _tiles(run: Run) -> Markup:
    numbers, start = run.numbers, next((e for e in run.tests if e.get("round") == 0), {})
    before = number(start.get(run.metric))
    tiles = []
    main = run.metric if run.metric in numbers else f"client_{run.metric}_mean"
    if main in numbers:
        remark = f"{write(run.metric, before)} before training" if before is not None and main == run.metric else ""
        tiles.append(tile(describe(main).label, write(main, numbers[main]), remark, main=True))
    if "loss" in numbers:
        first = number(start.get("loss"))
        remark = f"{write('loss', first)} before training" if first is not None else ""
        tiles.append(tile("Test loss", write("loss", numbers["loss"]), remark))
    if "epsilon" in numbers:
        tiles.append(tile("Privacy loss", f"ε = {write('epsilon', numbers['epsilon'])}", bound(run)))
    if "rounds" in numbers:
        steps = f"{numbers['client_steps']:,.0f} client steps" if "client_steps" in numbers else ""
        tiles.append(tile("Server steps" if asynchronous(run) else "Rounds", write("rounds", numbers["rounds"]), steps))
    up, down = numbers.get("bytes_up"), numbers.get("bytes_down")
    if up is not None or down is not None:
        split = f"{human(up, 'bytes')} up, {human(down, 'bytes')} down"
        tiles.append(tile("Traffic", human((up or 0) + (down or 0), "bytes"), split))
    if "wall_s" in numbers:
        virtual = f"{write('virtual_s', numbers['virtual_s'])} virtual" if numbers.get("virtual_s") else ""
        tiles.append(tile("Wall time", write("wall_s", numbers["wall_s"]), virtual))
    if "client_steps_per_s" in numbers:
        tokens = f"{numbers['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in numbers else ""
        tiles.append(tile("Client steps / s", f"{numbers['client_steps_per_s']:,.3g}", tokens))
    return tag("dl", *tiles, class_="tiles") if tiles else Markup("")


def _curves_card(run: Run, curves: Any) -> Markup:
    if not curves:
        return card("Training", note="Nothing has been evaluated yet.")
    views = []
    for axis, pictures in curves:
        shown = [figure(p) for p in pictures]
        note = None
        if axis.key == "wall_s":
            note = tag("p", "Virtual time stands still on an instant network; this is wall time.", class_="note")
        views.append((axis.key, axis.tab, join([note, tag("div", *shown, class_="figures")])))
    return card("Training", tabs("Horizontal axis", views), note=_steadiness(run))


def _steadiness(run: Run) -> str:
    stretch = common_stretch([run])
    found = fluctuation(run, stretch) if stretch is not None else None
    if stretch is None or stretch.spacing is None or found is None:
        return ""
    return (
        f"Fluctuation: over {human(stretch.spacing / 1e6, 'seconds')} of virtual time the test {run.metric} changes "
        f"with a standard deviation of {write(run.metric, found)} ({stretch.changes} changes in the second half)."
    )


def _staleness_card(pictures: list[Picture]) -> Markup | None:
    if not pictures:
        return None
    note = (
        "Staleness: how many versions the server made between the one that an update started from and its arrival. "
        "Live versions: those that work under way started from."
    )
    return card("Staleness", tag("div", *[figure(p) for p in pictures], class_="figures"), note=note)


def _final_card(run: Run) -> Markup:
    rows = [(label, value, tag("small", remark)) for label, value, remark in final_rows(run)]
    if not rows:
        return card("Final numbers", note="There are none yet.")
    half = (len(rows) + 1) // 2
    halves = [table((), part, class_="final") for part in (rows[:half], rows[half:]) if part]
    return card("Final numbers", tag("div", *halves, class_="columns"))


def _rejected_card(run: Run) -> Markup:
    heard = len(run.clients)
    accepted = sum(1 for event in run.clients if event.get("accepted"))
    of = f"{accepted:,} of {heard:,} updates were accepted." if heard else ""
    if not run.rejected:
        return card("Rejected updates", note=of or "None.")
    most = max(run.rejected.values())
    rows = []
    for reason, count in run.rejected.items():
        bar = tag("span", class_="bar", style=f"width:{100 * count / most:.0f}%")
        why = REASONS.get(reason)
        rows.append(([tag("code", reason), tag("br"), tag("small", why)] if why else tag("code", reason), count, bar))
    return card("Rejected updates", table(("reason", "updates", ""), rows, class_="reasons"), note=of)


def _clients_card(run: Run, pictures: list[Picture]) -> Markup | None:
    if not pictures:
        return None
    last = run.client_tests[-1]
    parts = [
        f"{name} {write(run.metric, number(last.get(key)))}"
        for name, key in (("mean", "mean"), ("worst decile", "worst_decile"), ("standard deviation", "std"))
    ]
    note = f"On each client's own held-out samples after round {last.get('round')}: {', '.join(parts)}."
    without = sum(number(v) is None for v in last.get("per_client") or [])
    if without:
        note += f" {'1 client has' if without == 1 else f'{without:,} clients have'} none."
    return card("Clients", tag("div", *[figure(p) for p in pictures], class_="figures"), note=note)


def _partition_card(run: Run, picture: Picture | None) -> Markup | None:
    if picture is None:
        return None
    sizes = sorted(int(v) for v in run.partition["sizes"])
    n = len(sizes)
    facts = [
        ("clients", f"{n:,}"),
        ("training samples", f"{sum(sizes):,}"),
        ("smallest, median, largest", f"{sizes[0]:,}, {sizes[n // 2]:,}, {sizes[-1]:,}"),
    ]
    held_out = [v for v in run.partition.get("test_sizes") or [] if number(v) is not None]
    if any(held_out):
        facts.append(("held out at clients", f"{sum(held_out):,}"))
    tokens = [v for v in run.partition.get("tokens") or [] if number(v) is not None]
    if tokens:
        facts.append(("training tokens", f"{sum(tokens):,}"))
    for key, value in run.settings.items():
        if key.startswith("partition."):
            name = key.removeprefix("partition.")
            facts.append(("method" if name == "_target_" else name, short(name, value)))
    listed = tag("dl", *[[tag("dt", k), tag("dd", v)] for k, v in facts], class_="facts-list")
    return card("Who holds what", tag("div", figure(picture), listed, class_="figures"))
