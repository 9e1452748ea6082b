"""Graphs and quadratic objectives for tests of the methods without a server."""

from __future__ import annotations

import networkx as nx
import numpy as np


def edges(name: str, number: int = 16) -> np.ndarray:
    """``(m, 2)`` edges of a graph of ``number`` peers (barbell: two cliques)."""
    side = round(number**0.5)
    made = {
        "ring": lambda: nx.cycle_graph(number),
        "path": lambda: nx.path_graph(number),
        "star": lambda: nx.star_graph(number - 1),
        "torus": lambda: nx.convert_node_labels_to_integers(nx.grid_2d_graph(side, side, periodic=True)),
        "grid": lambda: nx.convert_node_labels_to_integers(nx.grid_2d_graph(side, side)),
        "complete": lambda: nx.complete_graph(number),
        "barbell": lambda: nx.barbell_graph(number // 2, 0),
    }[name]()
    return np.array(sorted(tuple(sorted(e)) for e in made.edges()), dtype=np.int64)


class Quadratics:
    """``f_i(x) = x^T H x / 2 + b_i^T x`` with eigenvalues of H from ``1 / kappa`` to 1: L = 1, mu = 1 / kappa."""

    def __init__(self, number: int, size: int, kappa: float, seed: int = 0):
        draws = np.random.default_rng(seed)
        self.spectrum = np.geomspace(1 / kappa, 1, size)
        self.offsets = draws.normal(size=(number, size))
        self.best = -self.offsets.mean(axis=0) / self.spectrum
        self.convexity, self.calls = 1 / kappa, 0

    def __call__(self, peers: np.ndarray, points: np.ndarray) -> np.ndarray:
        self.calls += 1
        return points * self.spectrum + self.offsets[peers]

    def error(self, models: np.ndarray) -> float:
        """The mean squared distance of ``models`` ``(n, d)`` to the optimum, over that of zero."""
        return float(((models - self.best) ** 2).sum(axis=1).mean() / (self.best @ self.best))


def metropolis(number: int, pairs: np.ndarray) -> np.ndarray:
    """Metropolis-Hastings weights ``(n, n)``."""
    degree = np.bincount(pairs.reshape(-1), minlength=number)
    weights = np.zeros((number, number))
    for i, j in pairs:
        weights[i, j] = weights[j, i] = 1 / (1 + max(degree[i], degree[j]))
    return weights + np.diag(1 - weights.sum(axis=1))
