"""DADAO's events one after another: n gradient clocks, the edges' clock, and gradients computed when one is due.

Where a peer takes its next gradient is known once its last one is done (`fl.gossip.dadao.Dadao.point`), and when, since
clocks don't depend on what happens. So the gradients that all peers will want next are computed in one call when the
first of them is due; the states are those of computing each at its own event.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np

from fl.gossip.clocks import PoissonClock
from fl.gossip.dadao import Dadao

# Gradients (k, d) float64 of k peers, each at its own point (k, d).
Gradients = Callable[[np.ndarray, np.ndarray], np.ndarray]

_GRADIENT, _EDGE = 0, 1  # the order of events of one tick, as in `fl.clock.Priority`
_ARRAYS = ("points", "found", "known", "gradients", "uses")


class Engine:
    """Runs ``method`` in whole ticks, ``unit`` of which are a unit of time. ``seed`` names the clocks."""

    def __init__(self, method: Dadao, gradients: Gradients, seed: int, unit: int):
        number, size = method.states.shape[0], method.states.shape[2]
        self.method, self.ask, self.unit = method, gradients, unit
        self.clocks = [PoissonClock([1.0], unit, seed, "gradient clock", i) for i in range(number)]
        self.edges = PoissonClock(method.rates.values, unit, seed, "edge clock")
        self.points = np.stack([method.point(i, clock.peek()[0] / unit) for i, clock in enumerate(self.clocks)])
        self.found = np.zeros((number, size))
        self.known = np.zeros(number, dtype=bool)  # whose next gradient is in ``found``
        self.gradients = np.zeros(number, dtype=np.int64)  # taken by each peer so far
        self.uses = np.zeros(len(method.rates.edges), dtype=np.int64)  # of each edge so far

    def run(self, until: int) -> None:
        """Everything up to the tick ``until``, which counts."""
        heap = [(clock.peek()[0], _GRADIENT, i) for i, clock in enumerate(self.clocks)]
        heap.append((self.edges.peek()[0], _EDGE, 0))
        heapq.heapify(heap)
        while heap[0][0] <= until:
            tick, kind, peer = heap[0]
            if kind == _EDGE:
                _, edge = self.edges.pop()
                i, j = self.method.rates.edges[edge].tolist()
                self.method.exchange(i, j, tick / self.unit)
                self.uses[edge] += 1
                heapq.heapreplace(heap, (self.edges.peek()[0], _EDGE, 0))
            else:
                self._gradient(peer, tick)
                heapq.heapreplace(heap, (self.clocks[peer].peek()[0], _GRADIENT, peer))

    def _gradient(self, peer: int, tick: int) -> None:
        if not self.known[peer]:
            due = np.flatnonzero(~self.known)
            self.found[due] = self.ask(due, self.points[due])
            self.known[due] = True
        self.method.step(peer, tick / self.unit, self.found[peer])
        self.clocks[peer].pop()
        self.gradients[peer] += 1
        self.known[peer] = False
        self.points[peer] = self.method.point(peer, self.clocks[peer].peek()[0] / self.unit)

    def parts(self) -> dict[str, np.ndarray]:
        """Everything that changes, for a checkpoint."""
        clocks = np.array([clock.state() for clock in (*self.clocks, self.edges)], dtype=np.int64)
        own = {name: getattr(self, name).copy() for name in _ARRAYS}
        return {"states": self.method.states.copy(), "times": self.method.times.copy(), "clocks": clocks, **own}

    def restore(self, parts: Mapping[str, np.ndarray]) -> None:
        """Go on from what `parts` gave."""
        self.method.states, self.method.times = parts["states"].copy(), parts["times"].copy()
        for clock, state in zip((*self.clocks, self.edges), parts["clocks"], strict=True):
            clock.restore(state)
        for name in _ARRAYS:
            setattr(self, name, parts[name].copy())
