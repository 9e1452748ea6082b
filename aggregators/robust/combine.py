"""A robust rule on updates: the whole way from rows to a vector, or to coefficients where updates are products B A.

    combine(GeometricMedian(), NNM(), f, rows)     ->  Combined.vector, Combined.coefficients
    weigh(Krum(), NoPre(), f, Factored(lefts, rights))  ->  coefficients of the weight changes

Rows are *changes*: the origin means "no change". For a peer they are the differences ``x_j - x_i`` from its own model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aggregators.robust.base import Cloud, NoPre, Pre, Rule, one_hot
from aggregators.robust.coordinates import CoordinateRule
from aggregators.robust.geometry import Dense, Geometry
from fl.errors import ConfigError, RunStopped

CENTRE = "centre"  # the name of a remembered centre (d,) in a rule's memory


@dataclass(frozen=True, eq=False)
class Combined:
    """What a rule made of the rows.

    ``vector`` ``(d,)`` float64 on the rows' device; ``coefficients`` ``(n,)`` of the rows in it (None: a rule of
    coordinates), which with a remembered centre are not all of it; ``memory``: what the rule wants back next time.
    """

    vector: Tensor
    coefficients: np.ndarray | None
    memory: dict[str, np.ndarray]


def combine(
    rule: Rule,
    pre: Pre,
    f: int,
    rows: Tensor,
    weights: Tensor | np.ndarray | None = None,
    clients: Sequence[int] | None = None,
    memory: Mapping[str, np.ndarray] | None = None,
    root: Tensor | None = None,
    seed_key: tuple = (),
) -> Combined:
    """``rule`` after ``pre`` on ``rows`` ``(n, d)``, of which ``f`` may be hostile.

    Rows are float32, float64 or bfloat16, on any device. ``weights`` ``(n,)`` (None: equal) matter to rules that are
    `weighted`; ``clients`` ``(n,)`` says whose the rows are, for rules that remember; ``root`` ``(d,)`` is the server's
    own update; ``seed_key`` names what pre-aggregators draw.
    The arguments are left as they are. Raises `ConfigError` outside the rule's breakdown condition and `RunStopped`
    where rows are not finite.
    """
    n = len(rows)
    memory = memory or {}
    rule.check(n, f, pre)
    clients = range(n) if clients is None else clients
    view = rule.view(rows, clients, memory)
    extra = [root] if root is not None else []
    if CENTRE in memory:
        extra.append(torch.from_numpy(memory[CENTRE]).to(rows.device))
    geometry = Dense(view, extra)
    cloud = pre.apply(
        _cloud(
            rule,
            geometry,
            n,
            weights,
            n if root is not None else None,
            n + len(extra) - 1 if CENTRE in memory else None,
        ),
        f,
        seed_key,
    )
    if isinstance(rule, CoordinateRule):
        mixing = rule.choose(cloud, f)[:, :n]
        plain = isinstance(pre, NoPre) and len(mixing) == n
        vector, coefficients = rule.on_coordinates(rows, None if plain else mixing, cloud.weights, f), None
    else:
        found = rule.weigh(cloud, f)
        vector = (geometry if view is rows else Dense(rows, extra)).combination(found)
        coefficients = found[:n].numpy().copy()
    return Combined(vector, coefficients, rule.keep(vector, view, clients, memory))


def weigh(
    rule: Rule,
    pre: Pre,
    f: int,
    geometry: Geometry,
    weights: Tensor | np.ndarray | None = None,
    clients: Sequence[int] | None = None,
    memory: Mapping[str, np.ndarray] | None = None,
    root_index: int | None = None,
    seed_key: tuple = (),
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coefficients ``(n,)`` float64 of the points of ``geometry``, and what the rule remembers (nothing).

    Point ``root_index`` is the server's own update and none of the n; it comes last. Raises `ConfigError` for a rule of
    coordinates, one that remembers (it would need the points themselves), and outside the breakdown condition.
    """
    name = type(rule).__name__
    if not rule.weighs or rule.stateful:
        why = "remembers earlier updates" if rule.weighs else "acts on coordinates"
        raise ConfigError(
            "aggregator.space", "product", f"factors: {name} {why}, and products B A are known by inner products only"
        )
    n = geometry.number if root_index is None else root_index
    rule.check(n, f, pre)
    cloud = pre.apply(_cloud(rule, geometry, n, weights, root_index, None), f, seed_key)
    return rule.weigh(cloud, f)[:n].numpy().copy(), {}


def _cloud(
    rule: Rule,
    geometry: Geometry,
    n: int,
    weights: Tensor | np.ndarray | None,
    root: int | None,
    centre: int | None,
) -> Cloud:
    """The ``n`` updates as points, before any pre-aggregator."""
    if rule.root and root is None:
        raise ConfigError(
            "aggregator.combine",
            type(rule).__name__,
            "it compares updates with one that the server made from data of its own, and there is none",
            "Give the server public samples (data.public).",
        )
    total = geometry.number + 1
    own = np.full(n, 1 / n) if weights is None or not rule.weighted else np.asarray(weights, np.float64)
    if own.shape != (n,) or not (np.isfinite(own).all() and (own >= 0).all() and own.sum() > 0):
        raise RunStopped(f"The weights of {n} updates have to be {n} numbers >= 0 that are not all 0, not {own}.")
    return Cloud(
        geometry,
        torch.eye(total, dtype=torch.float64)[:n],
        own / own.sum(),
        one_hot(total - 1, total),
        None if root is None else one_hot(root, total),
        None if centre is None else one_hot(centre, total),
        plain=True,
    )
