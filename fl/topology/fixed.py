"""Graphs that follow from the number of peers n alone.

==============  ====================================================================================
ring            i and i + 1 (mod n); directed: i -> i + 1
path            i and i + 1
star            0 and everyone else
torus           a grid of rows x columns, each peer joined to the next in its row and column (mod)
hypercube       i and i with one binary digit changed; n is a power of two
exponential     i and i + 2^k (mod n) for 2^k < n; directed: i -> i + 2^k
complete        everyone and everyone else
==============  ====================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.topology.base import Topology
from fl.topology.graph import Graph
from fl.topology.layout import circle, grid, hub


def circulant(number: int, offsets: list[int]) -> np.ndarray:
    """The pairs (i, i + offset mod n) of each peer and offset."""
    peers = np.arange(number)
    return np.concatenate([np.stack([peers, (peers + k) % number], axis=1) for k in offsets])


def powers(number: int) -> list[int]:
    """1, 2, 4, ... below ``number``."""
    return [1 << k for k in range((number - 1).bit_length())]


@dataclass(frozen=True)
class Ring(Topology):
    """Each peer hears the one before and the one after it; where ``directed``, the one before only."""

    directed: bool = setting(False, help="whether i sends to i + 1 only")
    name: ClassVar[str] = "ring"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return Graph.of(number, circulant(number, [1]), self.directed)

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)


@dataclass(frozen=True)
class Path(Topology):
    """A ring that is open between the last peer and the first."""

    name: ClassVar[str] = "path"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return Graph.of(number, circulant(number, [1])[:-1])

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)


@dataclass(frozen=True)
class Star(Topology):
    """Everyone hears peer 0, and it hears everyone."""

    name: ClassVar[str] = "star"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        others = np.arange(1, number)
        return Graph.of(number, np.stack([np.zeros_like(others), others], axis=1))

    def positions(self, graph: Graph) -> np.ndarray:
        return hub(graph.number)


@dataclass(frozen=True)
class Torus(Topology):
    """A grid that goes on at its opposite side: 4 neighbours each, 3 in a grid of two rows or columns."""

    rows: int | None = setting(None, ge=2, help="rows of the grid; null: as square as the number of peers allows")
    name: ClassVar[str] = "torus"

    def check(self, number: int) -> None:
        super().check(number)
        rows = self._rows(number)
        way_out = "Choose clients.number as a product of two numbers from 2 on."
        if self.rows is not None and (number % rows or number // rows < 2):
            allowed = f"a divisor of the number of peers, {number}, that leaves two columns or more"
            raise ConfigError("topology.rows", self.rows, allowed, way_out)
        if rows < 2:
            raise ConfigError("clients.number", number, "it must be rows x columns, both 2 or more", way_out)

    def build(self, number: int, seed: int, phase: int) -> Graph:
        peers = np.arange(number).reshape(self._rows(number), -1)
        pairs = [np.stack([peers, np.roll(peers, -1, axis)], axis=-1).reshape(-1, 2) for axis in (0, 1)]
        return Graph.of(number, np.concatenate(pairs))

    def positions(self, graph: Graph) -> np.ndarray:
        rows = self._rows(graph.number)
        return grid(rows, graph.number // rows)

    def _rows(self, number: int) -> int:
        """Given, or the largest divisor up to the square root."""
        return self.rows or max(k for k in range(1, math.isqrt(number) + 1) if number % k == 0)


@dataclass(frozen=True)
class Hypercube(Topology):
    """Peers are the corners of a cube of log2(n) dimensions, joined along its edges."""

    name: ClassVar[str] = "hypercube"

    def check(self, number: int) -> None:
        super().check(number)
        if number & (number - 1):
            below = 1 << (number.bit_length() - 1)
            way_out = f"Choose {below} or {2 * below}, or topology=exponential."
            raise ConfigError("clients.number", number, "a hypercube has a power of two", way_out)

    def build(self, number: int, seed: int, phase: int) -> Graph:
        peers = np.arange(number)
        return Graph.of(number, np.concatenate([np.stack([peers, peers ^ k], axis=1) for k in powers(number)]))


@dataclass(frozen=True)
class Exponential(Topology):
    """Each peer is joined to those at distances 1, 2, 4, ... around a ring (Ying et al., arXiv 2110.13363)."""

    directed: bool = setting(False, help="whether i sends to i + 2^k only, and does not hear it")
    name: ClassVar[str] = "exponential"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return Graph.of(number, circulant(number, powers(number)), self.directed)

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)


@dataclass(frozen=True)
class Complete(Topology):
    """Everyone hears everyone."""

    name: ClassVar[str] = "complete"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return Graph.of(number, np.argwhere(np.triu(np.ones((number, number), dtype=bool), 1)))

    def positions(self, graph: Graph) -> np.ndarray:
        return circle(graph.number)
