"""The graph of a decentralized run, drawn, with the bytes of each link as its line's width where they were recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl.report.load import Run, number
from fl.report.numbers import DASH, human
from fl.report.page import Markup, card, figure, tag
from fl.report.peers import link_bytes
from fl.report.style import CARD, MUTED, SERIES, WIDTH, Canvas, Picture, canvas, escape

MOST_NAMED = 40  # more peers than this have no numbers on them
THINNEST, WIDEST, CLASSES = 0.7, 4.5, 6  # points; links of one width are one path, so that dense graphs stay small


def topology_card(run: Run) -> Markup | None:
    """The card: the picture and the graph's numbers; None for a run with a server."""
    about = _about(run)
    if not about:
        return None
    degrees = about.get("degrees") or {}
    low, high, mean = (number(degrees.get(key)) for key in ("min", "max", "mean"))
    each = DASH
    if low is not None and high is not None and mean is not None:
        each = f"{low:g}" if low == high else f"{low:g} to {high:g}, mean {mean:.3g}"
    gap = number(about.get("gap"))
    round_of = " in a round" if about.get("varies") else ""
    facts = [
        ("graph", str(about.get("name", DASH)) + (", directed" if about.get("directed") else "")),
        ("peers", human(number(about.get("peers")), "count")),
        (f"edges{round_of}", human(number(about.get("edges")), "count")),
        (f"each peer sends to{round_of}", each),
        ("spectral gap", DASH if gap is None else f"{gap:.3g}"),
    ]
    sent = link_bytes(run)
    if sent:
        facts.append(("sent over all links", human(sum(sent.values()), "bytes")))
    picture = topology_picture(run)
    listed = tag("dl", *[[tag("dt", name), tag("dd", value)] for name, value in facts], class_="facts-list")
    shown = tag("div", figure(picture), listed, class_="figures") if picture else listed
    return card("Topology", shown, note=_note(about))


def _note(about: dict[str, Any]) -> str:
    if about.get("name") == "one_peer_exponential":
        return "The gap is that of a period of rounds together; the picture has all of its links."
    note = "Spectral gap: 1 - |λ₂| of the mixing weights; 1 is the exact mean after one exchange."
    return note + (" Graph and gap are the first one's." if about.get("varies") else "")


def topology_picture(run: Run) -> Picture | None:
    """The graph; None where run.json has no positions for it (too large, or no graph)."""
    about = _about(run)
    places = np.array(about.get("positions") or [], dtype=float)
    if places.ndim != 2 or len(places) < 2:
        return None
    edges = [(int(i), int(j)) for i, j in about.get("edge_list") or []]
    directed = bool(about.get("directed"))
    sent = link_bytes(run)
    with canvas("Peers and links", "", width=WIDTH, height=WIDTH - 50, left=12.0, bottom=12.0) as c:
        c.axes.set_axis_off()
        low, high = places.min(axis=0), places.max(axis=0)
        middle, size = (low + high) / 2, high - low
        box = np.array([c.width - 24.0, c.height - 38.0])  # the axes' size in points: both scales are the same
        half = 0.59 * max(*(size / box), 1.0 / box.max()) * box
        c.axes.set_xlim(middle[0] - half[0], middle[0] + half[0])
        c.axes.set_ylim(middle[1] - half[1], middle[1] + half[1])
        told = _links(c, places, edges, directed, sent)
        _peers(c, places, sent)
        if sent:
            c.figure.text(14 / c.width, 6 / c.height, told, color=MUTED, fontsize=8.0)
        kind = "directed graph" if directed else "graph"
        return c.finish("topology", f"The {kind} {escape(about.get('name', ''))} of {len(places)} peers")


def _links(
    c: Canvas, places: np.ndarray, edges: list[tuple[int, int]], directed: bool, sent: dict[tuple[int, int], float]
) -> str:
    """Draw the links; returns what their widths mean."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    loads: dict[tuple[int, int], float] = dict.fromkeys(edges, 0.0)
    for (i, j), size in sent.items():
        if max(i, j) < len(places):
            pair = (i, j) if directed else (min(i, j), max(i, j))
            loads[pair] = loads.get(pair, 0.0) + size
    most, alike = max(loads.values(), default=0.0), len(set(loads.values())) < 2
    both = {pair for pair in loads if directed and pair[::-1] in loads}
    blocked = _blocked(places, list(loads))
    step = 2 * 0.045 * float(np.ptp(places, axis=0).max())
    classes: dict[int, list[Path]] = {}
    heads = []
    for (i, j), size in loads.items():
        bend = 0.16 if (i, j) in blocked else 0.07 if (i, j) in both else 0.0
        start, end = places[i], places[j]
        across = np.array([end[1] - start[1], start[0] - end[0]])
        middle = (start + end) / 2 + bend * across
        path = Path([start, middle, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3]) if bend else Path([start, end])
        classes.setdefault(0 if alike else round((CLASSES - 1) * size / most), []).append(path)
        if directed:
            way = end - (middle if bend else start)
            way = way / max(float(np.linalg.norm(way)), 1e-9)
            heads.append((end - 0.5 * step * way, way))
        told = f"{i} → {j}: {human(size, 'bytes')}" if directed else _both_ways(i, j, sent)
        if most and len(loads) <= 600:
            at = (start + 2 * middle + end) / 4
            c.tip(float(at[0]), float(at[1]), told)
    few, many = len(loads) <= 120, len(loads) > 1000
    faint, widest = (0.9, WIDEST) if few else (0.2, 1.0) if many else (0.5, 0.6 * WIDEST)
    for level, paths in sorted(classes.items()):
        thick = 1.1 if alike else THINNEST + (widest - THINNEST) * level / (CLASSES - 1)
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": MUTED if not level else SERIES[0], "zorder": 1}
        c.axes.add_patch(PathPatch(Path.make_compound_path(*paths), linewidth=thick, alpha=faint, **style))
    if heads and not many:
        _arrows(c, heads, step if len(heads) <= 40 else 0.5 * step)
    return f"each line: {human(most, 'bytes')}" if alike else f"widest line: {human(most, 'bytes')}"


def _both_ways(i: int, j: int, sent: dict[tuple[int, int], float]) -> str:
    there, back = (human(sent.get(pair, 0.0), "bytes") for pair in ((i, j), (j, i)))
    return f"{i} → {j}: {there}, {j} → {i}: {back}"


def _arrows(c: Canvas, heads: list[tuple[np.ndarray, np.ndarray]], size: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    paths, codes = [], [Path.MOVETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for tip, way in heads:
        side = 0.22 * size * np.array([-way[1], way[0]])
        back = tip - 0.6 * size * way
        paths.append(Path([tip, back + side, back - side, tip], codes))
    c.axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=MUTED, linewidth=0, zorder=2))


def _blocked(places: np.ndarray, pairs: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Links whose straight line would pass through another peer, as those around a torus do: they are drawn bent."""
    found = set()
    for i, j in pairs:
        start, way = places[i], places[j] - places[i]
        length = float(way @ way)
        if length == 0:
            continue
        along = (places - start) @ way / length
        off = np.linalg.norm(places - start - along[:, None] * way, axis=1)
        if ((along > 0.05) & (along < 0.95) & (off < 0.02)).any():
            found.add((i, j))
    return found


def _peers(c: Canvas, places: np.ndarray, sent: dict[tuple[int, int], float]) -> None:
    n = len(places)
    named = n <= MOST_NAMED
    size = 13.0 if n <= 20 else 11.0 if named else 5.0 if n <= 100 else 3.5
    style: dict[str, Any] = {"color": SERIES[0], "markeredgecolor": CARD, "markeredgewidth": 0.8}
    c.axes.plot(places[:, 0], places[:, 1], linestyle="", marker="o", markersize=size, zorder=3, **style)
    for peer, (x, y) in enumerate(places.tolist()):
        if named:
            small = 7.0 if n <= 20 else 6.0
            c.axes.text(x, y, str(peer), color=CARD, fontsize=small, ha="center", va="center_baseline", zorder=4)
        out = sum(size for (i, _), size in sent.items() if i == peer)
        into = sum(size for (_, j), size in sent.items() if j == peer)
        moved = f": sent {human(out, 'bytes')}, received {human(into, 'bytes')}" if sent else ""
        c.tip(x, y, f"peer {peer}{moved}")


def _about(run: Run) -> dict[str, Any]:
    found = run.info.get("topology")
    return found if isinstance(found, dict) else {}
