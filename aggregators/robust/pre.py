"""What can be done to updates before a rule: mixing, bucketing, clipping, and clipping with mixing.

    NNM          p_i <- mean of the n - f points nearest to p_i, itself included    (Allouah et al., arXiv 2302.01772)
    bucketing    shuffle, then means of s at a time: ceil(n / s) points, f of them hostile still
                 (Karimireddy et al., arXiv 2006.09365)
    clipping     p_i <- min(1, c / ||p_i||) p_i
    ARC          clipping of the floor(2 f (n - f) / n) points of the largest norms to the next largest
                 (Allouah et al., arXiv 2405.14432)

Each is a matrix of coefficients. Bucketing averages by weight and adds the weights up; the others leave them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from aggregators.robust.base import Cloud, Pre
from fl.config import setting
from fl.keys import generator


@dataclass(frozen=True)
class NNM(Pre):
    """Nearest-neighbour mixing: every point becomes the mean of the n - f nearest to it."""

    def least(self, f: int) -> int:
        return 2 * f + 1

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        squared = cloud.squared.copy()
        np.fill_diagonal(squared, -1.0)  # itself first, whoever else is at the same place
        near = np.argsort(squared, axis=1, kind="stable")[:, : len(cloud) - f]
        matrix = np.zeros((len(cloud), len(cloud)))
        np.put_along_axis(matrix, near, 1 / near.shape[1], axis=1)
        return cloud.mixed(torch.from_numpy(matrix))


@dataclass(frozen=True)
class Bucketing(Pre):
    """Means of ``size`` updates at a time, in an order drawn anew for each round."""

    size: int = setting(2, ge=1, help="s: updates in a bucket; at most half of the buckets may hold a hostile one")

    def number(self, n: int) -> int:
        return -(-n // self.size)

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        order = generator(*seed_key, "bucketing").permutation(len(cloud))
        matrix = np.zeros((self.number(len(cloud)), len(cloud)))
        for bucket, row in enumerate(matrix):
            own = order[bucket * self.size : (bucket + 1) * self.size]
            row[own] = cloud.weights[own]
        weights = matrix.sum(axis=1)
        kept = weights > 0  # clients without any weight may share a bucket
        return cloud.mixed(torch.from_numpy(matrix[kept] / weights[kept, None]), weights[kept])


def scaled(cloud: Cloud, factors: np.ndarray) -> Cloud:
    """The points moved towards the origin: ``factors_i p_i``."""
    scale = torch.from_numpy(factors)[:, None]
    points = torch.where(scale == 1, cloud.points, scale * cloud.points + (1 - scale) * cloud.origin)
    return replace(cloud, points=points, plain=False)


def clipped(cloud: Cloud, norm: float) -> Cloud:
    """The points with norms of ``norm`` at most."""
    norms = np.sqrt(cloud.squared_from(cloud.origin))
    return scaled(cloud, np.divide(norm, norms, out=np.ones_like(norms), where=norms > norm))


@dataclass(frozen=True)
class Clipping(Pre):
    """Norms cut to a bound."""

    norm: float = setting(1.0, gt=0, help="c: the largest norm that an update keeps")

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        return clipped(cloud, self.norm)


@dataclass(frozen=True)
class ARC(Pre):
    """Adaptive robust clipping: the largest norms cut to the largest of the rest."""

    def least(self, f: int) -> int:
        return 2 * f + 1

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        n = len(cloud)
        norms = np.sort(cloud.squared_from(cloud.origin))
        return clipped(cloud, float(np.sqrt(norms[n - 1 - 2 * f * (n - f) // n])))


@dataclass(frozen=True)
class ARCNNM(Pre):
    """Adaptive robust clipping, then nearest-neighbour mixing of what it leaves."""

    def least(self, f: int) -> int:
        return 2 * f + 1

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        return NNM().apply(ARC().apply(cloud, f, seed_key), f, seed_key)
