"""The one-peer exponential graph: in each round, each peer sends to one other.

In the round after t others, with tau = ceil(log2 n)::

    i -> i + 2^(t mod tau) (mod n),         W_t = (I + P_t) / 2

W_t is doubly stochastic. For n a power of two the product of tau such rounds is the mean, exactly: after k rounds each
peer has the mean of 2^k different ones (Ying et al., arXiv 2110.13363, Lemma 1). The gap is that of the product over
a period; the W_t are circulant, so its eigenvalues are the products of theirs::

    |lambda_k| = prod_{t < tau} |1 + omega^(k 2^t)| / 2 = prod_{t < tau} |cos(pi k 2^t / n)|,   omega = e^(2 pi i / n)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl.topology.base import Topology
from fl.topology.fixed import circulant, powers
from fl.topology.graph import Graph
from fl.topology.layout import circle


@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """Each peer hears one other a round, at a distance of 1, 2, 4, ... around a ring in turn."""

    name: ClassVar[str] = "one_peer_exponential"

    @property
    def directed(self) -> bool:
        return True

    @property
    def varies(self) -> bool:
        return True

    def phase(self, number: int, passed: int) -> int:
        return passed % len(powers(number)) if number > 1 else 0

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return Graph.of(number, circulant(number, [powers(number)[phase]]), directed=True)

    def gap(self, number: int, seed: int) -> float:
        """1 - |lambda_2| of the product over a period."""
        modes = np.arange(1, number)
        moduli = np.prod([np.abs(np.cos(np.pi * modes * p / number)) for p in powers(number)], axis=0)
        return float(min(1.0, 1.0 - moduli.max()))

    def drawn(self, number: int, seed: int) -> Graph:
        """All rounds of a period together."""
        return Graph.of(number, circulant(number, powers(number)), directed=True)

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)
