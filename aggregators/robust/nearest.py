"""Rules that keep the points with the nearest neighbours: Krum, Multi-Krum, nearest-neighbour averaging, MDA.

With ``D_ij = ||p_i - p_j||``:

    Krum          p_i with the least score s_i = sum of D_ij^2 over its n - f - 2 nearest others       n >= 2f + 3
                  (Blanchard et al. 2017, arXiv 1703.02757)
    Multi-Krum    mean of the m points with the least scores                                            n >= 2f + 3
    NNA           mean of the n - f points nearest to the origin, a peer's own model included           n > 2f
                  (MoNNA, Farhadkhani et al., arXiv 2209.10931: of the n - f models that a peer waits for)
    MDA           mean of the n - f points of the least diameter max D_ij                               n > 2f
                  (El Mhamdi et al., arXiv 2008.00742; Guerraoui et al. 2024)

Where scores are equal the earlier point is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from aggregators.robust.base import Cloud, Rule
from aggregators.robust.subsets import least_diameter
from fl.config import setting


def krum_scores(squared: np.ndarray, f: int) -> np.ndarray:
    """The sum of the squared distances from each point to its n - f - 2 (at least one) nearest others ``(n,)``."""
    near = max(1, len(squared) - f - 2)
    others = squared.copy()
    np.fill_diagonal(others, np.inf)
    return np.sort(others, axis=1)[:, :near].sum(axis=1)


def krum_order(squared: np.ndarray, f: int) -> np.ndarray:
    """The points by rising Krum score ``(n,)``.

    With a single neighbour, the two that are nearest to each other have the same: first the one nearer to all.
    """
    return np.lexsort((squared.sum(axis=1), krum_scores(squared, f)))


def marked(chosen: np.ndarray, number: int) -> np.ndarray:
    """``(number,)`` float64 with ones at ``chosen``."""
    marks = np.zeros(number)
    marks[chosen] = 1
    return marks


@dataclass(frozen=True)
class Krum(Rule):
    """The point with the least sum of squared distances to its n - f - 2 nearest others."""

    def least(self, f: int) -> int:
        return 2 * f + 3

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        return cloud.points[int(krum_order(cloud.squared, f)[0])]


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the ``m`` points with the least Krum scores."""

    m: int | None = setting(None, ge=1, help="points that are averaged, n - f at most (null: n - f - 2)")

    def least(self, f: int) -> int:
        return max(2 * f + 3, f + (self.m or 0))

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        best = krum_order(cloud.squared, f)[: self.m or len(cloud) - f - 2]
        return cloud.mean(marked(best, len(cloud)))


@dataclass(frozen=True)
class NNA(Rule):
    """The mean of the n - f points nearest to the origin; for a peer that is its own model."""

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        nearest = np.argsort(cloud.squared_from(cloud.origin), kind="stable")[: len(cloud) - f]
        return cloud.mean(marked(nearest, len(cloud)))


@dataclass(frozen=True)
class MDA(Rule):
    """The mean of the n - f points of the least diameter, found exactly (`aggregators.robust.subsets`)."""

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        return cloud.mean(marked(least_diameter(cloud.squared, f), len(cloud)))
