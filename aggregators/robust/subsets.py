"""The subset of n - f points of the least diameter, exactly, without trying all subsets.

No two points of a subset of diameter r are farther apart than r. So it is what remains when one end at least of every
pair beyond r is dropped: a vertex cover, of size f, of the graph of these pairs. Whether there is one is decided by
branching: of a point with many pairs beyond r, either it goes or all its partners do. The least r is found by bisection
over the distances. Of several subsets of that diameter it is the one that drops, as far as it can, the points with the
largest sums of squared distances to all others; so the answer does not depend on the order of the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl.errors import RunStopped

_STEPS = 2_000_000  # branchings, some 30 s; hostile points can't make n = 100, f = 20 take more than a few thousand


@dataclass
class _Cover:
    """Asks whether ``budget`` points can be dropped so that no pair of ``partners`` (bit masks) is left."""

    steps: int = 0

    def exists(self, partners: list[int], alive: int, budget: int) -> bool:
        while True:
            self.steps += 1
            if self.steps > _STEPS:
                raise RunStopped(
                    f"The search for the subset of least diameter gave up after {_STEPS:,} steps. "
                    "Lower aggregator.f, or use aggregator.combine=multi_krum."
                )
            most, degree, pairs = -1, 0, 0
            rest = alive
            while rest:
                low = rest & -rest
                point = low.bit_length() - 1
                own = (partners[point] & alive).bit_count()
                if own == 0:
                    alive ^= low
                elif own > degree:
                    most, degree = point, own
                pairs += own
                rest ^= low
            pairs //= 2
            if pairs == 0:
                return True
            if pairs > budget * degree:
                return False
            if degree == 1:
                return True  # separate pairs, no more than the budget
            near = partners[most] & alive
            if degree <= budget and self.exists(partners, alive & ~near & ~(1 << most), budget - degree):
                return True
            alive &= ~(1 << most)
            budget -= 1


def least_diameter(squared: np.ndarray, f: int) -> np.ndarray:
    """The n - f points (rising indices) whose largest distance is the least; ``squared`` ``(n, n)`` distances.

    Raises `RunStopped` if the search takes too long.
    """
    n = len(squared)
    if f == 0:
        return np.arange(n)
    everyone = (1 << n) - 1
    search = _Cover()

    def partners(limit: float) -> list[int]:
        return [int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in squared > limit]

    values = np.unique(squared)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if search.exists(partners(values[middle]), everyone, f):
            high = middle
        else:
            low = middle + 1
    graph = partners(values[low])
    alive, budget = everyone, f
    for point in np.argsort(-squared.sum(axis=1), kind="stable").tolist():
        bit = 1 << point
        if budget == 0 or not alive & bit:
            continue
        if search.exists(graph, alive & ~bit, budget - 1):
            alive &= ~bit
            budget -= 1
    return np.flatnonzero([(alive >> i) & 1 for i in range(n)])
