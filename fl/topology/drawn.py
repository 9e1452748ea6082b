"""Random graphs, drawn from the run's seed until they are connected (see `fl.topology.base.Drawn`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.keys import generator
from fl.topology.base import Drawn
from fl.topology.graph import Graph
from fl.topology.layout import circle


@dataclass(frozen=True)
class RandomRegular(Drawn):
    """A graph in which everyone has ``degree`` neighbours, drawn from all of these about evenly (networkx)."""

    degree: int = setting(3, ge=1, help="neighbours of each peer")
    name: ClassVar[str] = "random_regular"

    def check(self, number: int) -> None:
        super().check(number)
        if self.degree >= number or self.degree * number % 2:
            allowed = f"below the number of peers, {number}, and even times it"
            raise ConfigError("topology.degree", self.degree, allowed)

    def draw(self, number: int, seed: int) -> np.ndarray:
        import networkx

        return np.array(networkx.random_regular_graph(self.degree, number, seed=seed).edges)

    def density(self) -> tuple[str, Any, str]:
        return "degree", self.degree, "Raise topology.degree."


@dataclass(frozen=True)
class WattsStrogatz(Drawn):
    """A small world: a ring in which everyone knows the ``degree`` nearest, each edge rewired with probability ``p``.

    Watts and Strogatz 1998: edge {i, i + k} becomes {i, j}, with j drawn from all whom i does not know (networkx).
    """

    degree: int = setting(4, ge=2, help="neighbours of each peer before rewiring; even")
    p: float = setting(0.3, ge=0, le=1, help="probability that an edge is rewired")
    name: ClassVar[str] = "watts_strogatz"

    def check(self, number: int) -> None:
        super().check(number)
        if self.degree >= number or self.degree % 2:
            raise ConfigError("topology.degree", self.degree, f"even and below the number of peers, {number}")

    def draw(self, number: int, seed: int) -> np.ndarray:
        import networkx

        return np.array(networkx.watts_strogatz_graph(number, self.degree, self.p, seed=seed).edges)

    def density(self) -> tuple[str, Any, str]:
        return "degree", self.degree, "Raise topology.degree."

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)


@dataclass(frozen=True)
class ErdosRenyi(Drawn):
    """Each pair is joined with probability ``p``; where ``directed``, each of its two ways for itself."""

    p: float = setting(0.4, gt=0, le=1, help="probability that two peers are joined")
    directed: bool = setting(False, help="whether a link goes one way; the other is drawn for itself")
    name: ClassVar[str] = "erdos_renyi"

    def draw(self, number: int, seed: int) -> np.ndarray:
        joined = generator(seed).random((number, number)) < self.p
        return np.argwhere(joined if self.directed else np.triu(joined, 1))

    def density(self) -> tuple[str, Any, str]:
        return "p", self.p, "Raise topology.p: with ln(n) / n or less most draws fall apart."
