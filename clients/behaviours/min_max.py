"""Min-max and min-sum: the largest shift that no distance gives away (Shejwalkar and Houmansadr, NDSS 2021).

``v = mu + gamma p`` with ``p`` one of ``-mu / |mu|``, ``-sign(mu)``, ``-sd``, and the largest gamma >= 0 with

* min-max: ``max_i |v - x_i| <= max_ij |x_i - x_j|``;
* min-sum: ``sum_i |v - x_i|^2 <= max_i sum_j |x_i - x_j|^2``

over the x that the hostile clients see. Both bounds hold at gamma = 0 and are quadratic in gamma, so the largest one
is an upper root, where published codes search by halving. For min-sum it is ``max_i |x_i - mu| / |p|``: v is as far
from the mean as the honest vector that is furthest from it. (Codes in circulation bound min-sum by the smallest sum
of an honest vector instead of the paper's largest.)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Colluding, average, deviation
from fl.config import setting

_COLUMNS = 65536  # at a time in float64


@dataclass(frozen=True)
class _Hidden(Colluding):
    """The shared half: the direction, and inner products of the centred rows."""

    direction: str = setting(
        "std", choices=["std", "unit", "sign"], help="against the spread, the mean, or the signs of the mean"
    )

    @abstractmethod
    def gamma(self, gram: np.ndarray, along: np.ndarray, size: float) -> float:
        """The largest shift, from ``<c_i, c_j>`` ``(k, k)``, ``<p, c_i>`` ``(k,)`` and ``|p|^2`` with c = x - mu."""

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        mean = average(seen)
        if self.direction == "std":
            way = -deviation(seen)
        elif self.direction == "sign":
            way = -np.sign(mean)
        else:
            way = -mean / max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)
        gram, along, size = np.zeros((len(seen), len(seen))), np.zeros(len(seen)), float(way @ way)
        if size == 0:
            return mean
        for low in range(0, len(mean), _COLUMNS):
            part = slice(low, low + _COLUMNS)
            centred = seen[:, part] - mean[part]
            gram += centred @ centred.T
            along += centred @ way[part]
        return mean + self.gamma(gram, along, size) * way


@dataclass(frozen=True)
class MinMax(_Hidden):
    """No further from any honest vector than the two honest ones that are furthest apart."""

    def gamma(self, gram: np.ndarray, along: np.ndarray, size: float) -> float:
        # |gamma p - c_i|^2 = size gamma^2 - 2 along_i gamma + |c_i|^2 <= bound, for every i.
        norms = np.diag(gram)
        room = (norms[:, None] + norms - 2 * gram).max() - norms
        return float(np.min((along + np.sqrt(along**2 + size * np.maximum(room, 0))) / size))


@dataclass(frozen=True)
class MinSum(_Hidden):
    """Its squared distances to the honest vectors add up to no more than the largest such sum of an honest one."""

    def gamma(self, gram: np.ndarray, along: np.ndarray, size: float) -> float:
        # Centred rows add up to zero, so sum_j |y - c_j|^2 = k |y|^2 + sum_j |c_j|^2, for y = gamma p and for y = c_i.
        return float(np.sqrt(np.diag(gram).max() / size))
