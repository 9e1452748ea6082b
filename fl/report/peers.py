"""What a decentralized run's report says of its peers: how far apart they are, how good each is, and their traffic.

Read from ``metrics.jsonl``: ``consensus`` of the round events, ``sqrt(mean_i ||x_i - mean x||^2)``; evaluations with
split ``peers``, whose ``per_client`` has each peer's own state on the central test set and whose ``hostile``, if there
is one, lists the peers that don't count; and the event ``links``.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fl.report.load import Event, Run, number
from fl.report.numbers import human, spread, write
from fl.report.page import Markup, card, figure, tag
from fl.report.style import BAD, SERIES, Picture, canvas, line_style, log_scale

MOST_POINTS = 400
FEW_PEERS = 20


def peers_card(run: Run) -> Markup | None:
    """The card; None for a run without peers."""
    pictures = peers_pictures(run)
    if not pictures:
        return None
    return card("Peers", tag("div", *[figure(p) for p in pictures], class_="figures"), note=_note(run))


def peers_pictures(run: Run) -> list[Picture]:
    """Consensus distance and accuracies over rounds, each peer at the end, bytes by link: those there is data for."""
    found = (consensus_picture(run), accuracy_history(run), accuracy_picture(run), traffic_picture(run))
    return [picture for picture in found if picture is not None]


def _note(run: Run) -> str:
    said = ["Consensus distance: the root mean square distance of the peers' states from their mean."]
    tests, sent = peer_tests(run), sorted(link_bytes(run).values())
    if tests:
        last = tests[-1]
        apart = spread(run.metric, number(last.get("mean")), number(last.get("std")))
        worst = write(run.metric, number(last.get("worst_decile")))
        said.append(
            f"After round {last.get('round')} the peers' own states have a test {run.metric} of {apart} "
            f"(mean ± deviation over peers), the worst decile {worst}."
        )
    if sent and sent[0] == sent[-1]:
        said.append(f"Each of the {len(sent):,} links carried {human(sent[0], 'bytes')}.")
    return " ".join(said)


def consensus_picture(run: Run) -> Picture | None:
    """Consensus distance over rounds, on a log axis; zeros are left out and counted."""
    points = [(float(e["round"]), number(e.get("consensus"))) for e in run.rounds]
    known = [(at, value) for at, value in points if value is not None]
    above = [(at, value) for at, value in known if value > 0]
    if len(above) < 2:
        return None
    with canvas("Consensus distance", "round") as c:
        x, y = np.array(above).T
        every = 1 + len(x) // MOST_POINTS
        style = line_style(0) | ({"marker": ""} if len(x) > 40 else {})
        zeros = len(known) - len(above)
        c.axes.plot(x[::every], y[::every], **style, label=f"{zeros:,} rounds at 0 are not drawn" if zeros else None)
        log_scale(c.axes)
        for at, value in zip(x[::every].tolist(), y[::every].tolist()):
            c.tip(at, value, f"round {at:g}: {value:.3g}")
        c.axes.locator_params(axis="x", integer=True)
        c.legend()
        return c.finish("consensus", "Consensus distance against rounds, on a log axis")


def accuracy_history(run: Run) -> Picture | None:
    """The peers' own test metric over rounds: the mean, and from the lowest to the highest."""
    tests = [(e, _values(e)) for e in peer_tests(run)]
    tests = [(e, values) for e, values in tests if values]
    if len(tests) < 2:
        return None
    scale, unit = _scale(run)
    with canvas(f"Peers' test {run.metric}{unit}", "round") as c:
        rounds = [float(e["round"]) for e, _ in tests]
        means, low, high = (np.array([f(values) for _, values in tests]) * scale for f in (np.mean, min, max))
        style = line_style(0) | ({"marker": ""} if len(rounds) > 40 else {})
        band: dict[str, Any] = {"color": SERIES[0], "alpha": 0.16, "linewidth": 0, "label": "from lowest to highest"}
        c.axes.plot(rounds, means, **style, label="mean over peers")
        c.axes.fill_between(rounds, low, high, **band)
        shared = {float(e["round"]): number(e.get(run.metric)) for e in run.tests}
        central = [(at, value) for at, value in ((r, shared.get(r)) for r in rounds) if value is not None]
        if len(central) > 1:
            line = line_style(1) | {"marker": "", "linestyle": (0, (4, 2)), "linewidth": 1.3}
            c.axes.plot([r for r, _ in central], [v * scale for _, v in central], **line, label="mean of their states")
        for at, mean, (_, values) in zip(rounds, means.tolist(), tests):
            span = f"{write(run.metric, min(values))} to {write(run.metric, max(values))}"
            c.tip(at, mean, f"round {at:g}: mean {write(run.metric, mean / scale)}, from {span}")
        c.axes.locator_params(axis="x", integer=True)
        c.legend()
        return c.finish("peers_rounds", f"Test {run.metric} of the peers against rounds")


def accuracy_picture(run: Run) -> Picture | None:
    """Each peer's own test metric at the last evaluation, worst first."""
    tests = peer_tests(run)
    listed = tests[-1].get("per_client") if tests else None
    known = [(i, v) for i, v in enumerate(map(number, listed or [])) if v is not None]
    if len(known) < 2:
        return None
    scale, unit = _scale(run)
    known.sort(key=lambda pair: pair[1], reverse=run.metric != "accuracy")
    bad = set(tests[-1].get("hostile") or ())
    few = len(known) <= FEW_PEERS
    with canvas(f"Each peer's test {run.metric}{unit}", "peer, worst first" if few else "peers, worst first") as c:
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5.5 if few else 3.0}
        for hostile, color, name in ((False, SERIES[0], None), (True, BAD, "hostile")):
            some = [(at, value * scale) for at, (peer, value) in enumerate(known) if (peer in bad) == hostile]
            if some:
                c.axes.plot(*np.array(some).T, **dots, color=color, label=name)
        counted = _values(tests[-1])
        if counted:
            mean = sum(counted) / len(counted)
            line: dict[str, Any] = {"color": SERIES[1], "linewidth": 1.2, "linestyle": (0, (5, 2))}
            c.axes.axhline(mean * scale, **line, label=f"mean {write(run.metric, mean)}")
        low, high = c.axes.get_ylim()
        for place, (peer, value) in enumerate(known[:MOST_POINTS]):
            kind = "hostile peer" if peer in bad else "peer"
            c.box_tip(place - 0.5, place + 0.5, low, high, f"{kind} {peer}: {write(run.metric, value)}")
        c.axes.set_xticks(range(len(known)) if few else [], [str(peer) for peer, _ in known] if few else [])
        c.axes.grid(axis="x", visible=False)
        c.legend()
        return c.finish("peers", f"Test {run.metric} of each peer's own state, sorted")


def traffic_picture(run: Run) -> Picture | None:
    """Bytes by link, most first; none where all links carried the same."""
    sent = sorted(link_bytes(run).items(), key=lambda item: -item[1])
    if not sent or sent[0][1] == sent[-1][1]:
        return None
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 0.0))
    unit, scale = next((name, size or 1.0) for name, size in units if sent[0][1] >= size)
    with canvas(f"Sent over each link ({unit})", f"{len(sent):,} links, most first") as c:
        y = np.array([size for _, size in sent]) / scale
        edges = np.arange(len(y) + 1) - 0.5
        c.axes.stairs(y, edges, fill=True, color=SERIES[2])
        for place, ((i, j), size) in enumerate(sent[:MOST_POINTS]):
            c.box_tip(place - 0.5, place + 0.5, 0, float(y[place]), f"{i} → {j}: {human(size, 'bytes')}")
        c.axes.set_xticks([])
        c.axes.grid(axis="x", visible=False)
        c.axes.set_xlim(edges[0], edges[-1])
        return c.finish("links", "Bytes that each link carried, sorted")


def peer_tests(run: Run) -> list[Event]:
    """Evaluations of every peer's own state, in the order of rounds."""
    return _peer_events(run)[0]


def link_bytes(run: Run) -> dict[tuple[int, int], float]:
    """Bytes that each link (from, to) carried in the whole run; empty where they were not recorded."""
    return _peer_events(run)[1]


def _peer_events(run: Run) -> tuple[list[Event], dict[tuple[int, int], float]]:
    tests: dict[Any, Event] = {}
    links: dict[tuple[int, int], float] = {}
    path = run.folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        if b'"peers"' not in line and b'"links"' not in line:
            continue
        try:
            event = json.loads(line)
        except ValueError:  # `fl.report.load` has counted it
            continue
        if not isinstance(event, dict):
            continue
        if event.get("event") == "eval" and event.get("split") == "peers" and number(event.get("round")) is not None:
            tests[event["round"]] = event
        elif event.get("event") == "links":
            links = {(int(i), int(j)): float(size) for i, j, size in event.get("links") or []}
    return [tests[key] for key in sorted(tests)], links


def _values(event: Event) -> list[float]:
    """The metric of each peer that is not hostile."""
    bad = set(event.get("hostile") or ())
    listed = enumerate(map(number, event.get("per_client") or []))
    return [value for peer, value in listed if value is not None and peer not in bad]


def _scale(run: Run) -> tuple[float, str]:
    return (100.0, " (%)") if run.metric == "accuracy" else (1.0, "")
