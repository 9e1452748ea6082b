"""Figures of the clients: how each fares at the end, how their spread moved, and what each holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl.report.load import Run, number
from fl.report.numbers import write
from fl.report.plots import client_values
from fl.report.style import CARD, INK, SERIES, WIDE, WIDTH, Canvas, Picture, canvas, clean, line_style

MANY = 40  # more clients than this need the full width
MOST_LABELS = 7


def client_picture(run: Run) -> Picture | None:
    """Each client's own test metric at the end, sorted, with the mean and the worst decile."""
    values = client_values(run)
    if not values:
        return None
    best_first = run.metric == "accuracy"
    values.sort(key=lambda item: item[1], reverse=not best_first)  # worst first
    scale = 100.0 if run.metric == "accuracy" else 1.0
    unit = " (%)" if scale == 100.0 else ""
    last = run.client_tests[-1]
    wide = len(values) > MANY
    with canvas(
        f"Clients' own test {run.metric}{unit}",
        f"{len(values)} clients, worst first" if wide else "client, worst first",
        width=WIDE if wide else WIDTH,
    ) as c:
        x = np.arange(len(values))
        y = np.array([v for _, v in values]) * scale
        if not wide:
            c.axes.vlines(x, y.min(), y, color=SERIES[0], alpha=0.25, linewidth=1.2)
        c.axes.plot(x, y, linestyle="", marker="o", markersize=5.5 if not wide else 3.5, color=SERIES[0])
        for name, key, color, dashes in (
            ("mean", "mean", INK, (0, (5, 2))),
            ("worst decile", "worst_decile", SERIES[1], (0, (1.5, 1.5))),
        ):
            level = number(last.get(key))
            if level is not None:
                shown = write(run.metric, level)
                c.axes.axhline(level * scale, color=color, linewidth=1.2, linestyle=dashes, label=f"{name} {shown}")
        low, high = c.axes.get_ylim()
        for place, (client, value) in enumerate(values[:400]):
            text = f"{client_name(run, client)}: {write(run.metric, value)}"
            c.box_tip(place - 0.5, place + 0.5, low, high, text)
        c.axes.grid(axis="x", visible=False)
        if wide:
            c.axes.set_xticks([])
        else:
            small = 8.5 if len(values) <= 20 else 6.5
            c.axes.set_xticks(x, [str(client) for client, _ in values], fontsize=small)
        c.axes.set_xlim(-0.7, len(values) - 0.3)
        c.legend()
        return c.finish("clients", f"{run.metric} on each client's own test samples, sorted")


def client_history(run: Run) -> Picture | None:
    """Mean over clients, from the worst decile to the best, at every evaluation of the clients."""
    events = [e for e in run.client_tests if number(e.get("mean")) is not None]
    if len(events) < 2:
        return None
    scale = 100.0 if run.metric == "accuracy" else 1.0
    unit = " (%)" if scale == 100.0 else ""
    with canvas(f"Clients' own test {run.metric}{unit}, over rounds", "round") as c:
        rounds = [e["round"] for e in events]
        listed = [[v for v in map(number, e.get("per_client") or []) if v is not None] for e in events]
        means = [e["mean"] * scale for e in events]
        c.axes.plot(rounds, means, **line_style(0), label="mean")
        worst = [number(e.get("worst_decile")) for e in events]
        if all(v is not None for v in worst):
            style = line_style(1) | {"linestyle": (0, (1.5, 1.5))}
            c.axes.plot(rounds, [(v or 0.0) * scale for v in worst], **style, label="worst decile")
        if all(listed):
            low, high = [min(v) * scale for v in listed], [max(v) * scale for v in listed]
            band: dict[str, Any] = {
                "color": SERIES[0],
                "alpha": 0.16,
                "linewidth": 0,
                "label": "from lowest to highest",
            }
            c.axes.fill_between(rounds, low, high, **band)
        for e, mean in zip(events, means):
            c.tip(e["round"], mean, f"round {e['round']}: mean {write(run.metric, e['mean'])}")
        from matplotlib.ticker import MaxNLocator

        c.axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        c.legend()
        return c.finish("clients_rounds", f"Spread of {run.metric} over clients against rounds")


def partition_picture(run: Run, name: str = "partition", title: str = "") -> Picture | None:
    """Who holds what: training samples per client, stacked by label where there are labels."""
    held = run.partition
    sizes = [int(v) for v in held.get("sizes") or []]
    if not sizes:
        return None
    names, counts = _label_counts(held, len(sizes))
    groups = held.get("groups")
    if isinstance(groups, list) and len(groups) == len(sizes) <= 60:
        return _named_partition(name, sizes, names, counts, [str(g) for g in groups], title)
    wide = len(sizes) > MANY
    order = _by_label(sizes, counts) if wide and len(names) > 1 else np.arange(len(sizes))
    if wide and len(names) <= 1:
        order = np.argsort(sizes)[::-1]
    sorting = ", sorted by most frequent label" if wide and len(names) > 1 else ", largest first" if wide else ""
    with canvas(
        title or "Training samples per client",
        f"{len(sizes)} clients{sorting}" if wide else "client",
        width=WIDE if wide else WIDTH,
        left=48.0,
    ) as c:
        x = np.arange(len(sizes))
        bottom = np.zeros(len(sizes))
        for index, label in enumerate(names):
            part = counts[index][order]
            if wide:
                _steps(c, bottom, part, _label_color(index), clean(label, 24))
            else:
                c.axes.bar(x, part, 0.84, bottom=bottom, **_bar(index, label))
            bottom = bottom + part
        for place, client in enumerate(order[:400].tolist()):
            parts = ", ".join(f"{label} {counts[i][client]:,.0f}" for i, label in enumerate(names) if len(names) > 1)
            text = f"client {client}: {sizes[client]:,} samples" + (f" ({parts})" if parts else "")
            c.box_tip(place - 0.42, place + 0.42, 0, bottom[place], text)
        c.axes.grid(axis="x", visible=False)
        if wide:
            c.axes.set_xticks([])
        elif len(sizes) <= 20:
            c.axes.set_xticks(x)
        c.axes.set_xlim(-0.6, len(sizes) - 0.4)
        if len(names) > 1:
            c.legend()
        return c.finish(name, "Training samples that each client holds" + (", by label" if len(names) > 1 else ""))


def _steps(c: Canvas, bottom: np.ndarray, part: np.ndarray, color: str, label: str) -> None:
    """Bars without gaps as one filled shape: a page with hundreds of clients stays small."""
    edges = np.repeat(np.arange(len(part) + 1) - 0.5, 2)[1:-1]
    low, high = np.repeat(bottom, 2), np.repeat(bottom + part, 2)
    c.axes.fill_between(edges, low, high, color=color, linewidth=0, label=label)


def _named_partition(
    name: str, sizes: list[int], names: list[str], counts: list[np.ndarray], groups: list[str], title: str
) -> Picture:
    order = np.argsort(sizes, kind="stable")[::-1]
    shown = [clean(groups[i], 26) for i in order]
    left = 20.0 + 5.2 * max(len(text) for text in shown)
    height = 60.0 + 13.0 * len(sizes)
    with canvas(title or "Training samples per client", "samples", left=left, height=height) as c:
        y = np.arange(len(sizes))
        start = np.zeros(len(sizes))
        for index, label in enumerate(names):
            part = counts[index][order]
            c.axes.barh(y, part, 0.78, left=start, **_bar(index, label))
            start = start + part
        for place, client in enumerate(order.tolist()):
            text = f"client {client}, {groups[client]}: {sizes[client]:,} samples"
            c.box_tip(0, start[place], place - 0.4, place + 0.4, text)
        c.axes.set_yticks(y, shown, color=INK, fontsize=8.0)
        c.axes.set_ylim(len(sizes) - 0.4, -0.6)
        c.axes.grid(axis="y", visible=False)
        if len(names) > 1:
            c.legend()
        return c.finish(name, "Training samples that each named client holds")


def _label_counts(held: dict[str, Any], n: int) -> tuple[list[str], list[np.ndarray]]:
    """Names of labels and the count of each at each client; rare labels beyond the seventh are summed as ``other``."""
    table = held.get("labels")
    if not isinstance(table, list) or len(table) != n or not table or not table[0]:
        return ["samples"], [np.array(held["sizes"], dtype=float)]
    counts = np.array(table, dtype=float).T  # (labels, clients)
    given = held.get("label_names") or []
    names = [str(given[i]) if i < len(given) else f"label {i}" for i in range(len(counts))]
    if len(counts) > MOST_LABELS:
        largest = np.sort(np.argsort(counts.sum(1))[::-1][: MOST_LABELS - 1])
        rest = np.delete(counts, largest, axis=0)
        names = [names[i] for i in largest] + [f"other ({len(rest)} labels)"]
        counts = np.concatenate([counts[largest], rest.sum(0, keepdims=True)])
    return names, list(counts)


def _by_label(sizes: list[int], counts: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(counts)  # (labels, clients)
    top = stacked.argmax(0)
    share = stacked.max(0) / np.maximum(np.array(sizes), 1)
    return np.lexsort((-share, top))


def _bar(index: int, label: str) -> dict[str, Any]:
    return {"color": _label_color(index), "label": clean(label, 24), "edgecolor": CARD, "linewidth": 0.6}


def _label_color(index: int) -> str:
    return SERIES[index % len(SERIES)]


def client_name(run: Run, client: int) -> str:
    """``client 3``, with its name in the data where it has one."""
    groups = run.partition.get("groups")
    named = isinstance(groups, list) and client < len(groups)
    return f"client {client} ({clean(groups[client])})" if named and isinstance(groups, list) else f"client {client}"
