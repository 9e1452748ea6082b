"""What a topology is (the ``topology=`` group): who hears whom in a round, over which links.

A topology is a pure function of the number of peers, the run's seed and the round. Graphs that don't change are built
once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.keys import key_int
from fl.topology.graph import Graph
from fl.topology.layout import spring

MOST_PEERS, MOST_EDGES = 200, 5000  # larger graphs are not drawn, and run.json doesn't list their edges
TRIES = 100


@dataclass(frozen=True)
class Topology(ABC):
    """What all topologies share: the links' latency and rate.

    ``name`` is the option's name. The links' settings are explained in `fl.topology.links`.
    """

    latency_s: float | None = setting(None, ge=0, le=1e6, help="delay of a message on a link; null: from network=")
    mbps: float | None = setting(
        None, gt=0, help="rate of each peer's uplink and downlink in 10^6 bits a second; null: from network="
    )
    name: ClassVar[str]

    @property
    def directed(self) -> bool:
        """Whether a link goes one way."""
        return False

    @property
    def varies(self) -> bool:
        """Whether rounds have graphs of their own."""
        return False

    def check(self, number: int) -> None:
        """Raise `ConfigError` if there is no such graph of ``number`` peers."""
        if number < 2:
            raise ConfigError("clients.number", number, "at least 2: a graph has two peers or more")

    def graph(self, number: int, seed: int, round: int) -> Graph:
        """The graph of ``number`` peers in round ``round`` (from 1) of the run with ``seed``.

        The same object for rounds of one phase. Raises `ConfigError` where there is none.
        """
        return _built(self, number, seed, self.phase(number, max(0, round - 1)))

    def phase(self, number: int, passed: int) -> int:
        """Which of its graphs the topology has after ``passed`` rounds."""
        return 0

    @abstractmethod
    def build(self, number: int, seed: int, phase: int) -> Graph:
        """The graph of ``number`` peers in ``phase``. `check` has passed."""

    def gap(self, number: int, seed: int) -> float | None:
        """The spectral gap of one round's mixing, the first one's where graphs are drawn anew."""
        return self.graph(number, seed, 1).gap

    def drawn(self, number: int, seed: int) -> Graph:
        """The graph that a picture shows."""
        return self.graph(number, seed, 1)

    def positions(self, graph: Graph) -> np.ndarray:
        """Where a picture has the peers: (n, 2)."""
        return spring(graph)

    def about(self, number: int, seed: int) -> dict[str, Any]:
        """JSON-able facts for run.json.

        ``edges`` counts one round's; ``degrees`` are to how many a peer sends in it. ``positions`` and ``edge_list``
        (of `drawn`) are for the picture; None for a graph too large to draw.
        """
        first, shown = self.graph(number, seed, 1), self.drawn(number, seed)
        degrees, small = first.degrees, number <= MOST_PEERS and len(shown.edges) <= MOST_EDGES
        return {
            "name": self.name,
            "peers": number,
            "directed": self.directed,
            "varies": self.varies,
            "edges": len(first.edges),
            "degrees": {"min": int(degrees.min()), "mean": float(degrees.mean()), "max": int(degrees.max())},
            "gap": self.gap(number, seed),
            "positions": np.round(self.positions(shown), 4).tolist() if small else None,
            "edge_list": shown.edges.tolist() if small else None,
        }


@lru_cache(maxsize=64)
def _built(topology: Topology, number: int, seed: int, phase: int) -> Graph:
    topology.check(number)
    return topology.build(number, seed, phase)


@dataclass(frozen=True)
class Drawn(Topology):
    """A random graph: drawn until it is connected (strongly, where directed), and anew every so many rounds."""

    redraw_every: int | None = setting(None, ge=1, help="rounds after which the graph is drawn anew; null: never")

    @property
    def varies(self) -> bool:
        return self.redraw_every is not None

    def phase(self, number: int, passed: int) -> int:
        return passed // self.redraw_every if self.redraw_every else 0

    def build(self, number: int, seed: int, phase: int) -> Graph:
        for attempt in range(TRIES):
            graph = Graph.of(number, self.draw(number, key_int(seed, "topology", phase, attempt)), self.directed)
            if graph.connected:
                return graph
        setting, value, way_out = self.density()
        allowed = f"none of {TRIES} draws of {self.name} for {number} peers was connected"
        raise ConfigError(f"topology.{setting}", value, allowed, way_out)

    @abstractmethod
    def draw(self, number: int, seed: int) -> np.ndarray:
        """Edges (m, 2) of one draw."""

    @abstractmethod
    def density(self) -> tuple[str, Any, str]:
        """The setting that makes the graph denser, its value, and what to do with it."""
