"""Rules that look for a centre: geometric median, centred clipping, and covariance-bound filtering (CAF).

Geometric median, smoothed (RFA, Pillutla et al., arXiv 1912.13445): argmin_z sum_i w_i ||p_i - z||, by

    z <- sum_i b_i p_i / sum_i b_i,     b_i = w_i / max(nu, ||p_i - z||)

until z moves by no more than 1e-9 of its distance from the points, or ``iterations`` times. In coefficients an
iteration costs next to nothing, so it need not stop after three as where each asks all clients for a sum.

Centred clipping (Karimireddy et al., arXiv 2012.10333):  v <- v + sum_i w_i min(1, tau / ||p_i - v||) (p_i - v).

CAF (Allouah et al. 2025):  c_i = 1; while sum c > n - 2f: mean mu_c, largest eigenvalue of the covariance by weights c
with its eigenvector u, t_i = <p_i - mu_c, u>^2, c_i <- c_i (1 - t_i / max_{c_j > 0} t_j). The outcome is the mu_c whose
eigenvalue was the least. The eigenpair is that of an n x n matrix, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aggregators.robust.base import Cloud, Rule, medoid, typical
from fl.config import setting

_SETTLED = 1e-9
_NOTHING = 1e-9  # a weight in CAF
_TINY = 1e-150  # a distance where the majority is one point


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point with the least sum of distances (by weights) to the points.

    ``nu`` is a fraction of the distance within the majority (the least median distance of a point from the points), so
    that the outcome scales with the points and hostile ones can't raise it. A fixed one would make the outcome the mean
    of all updates that are shorter.
    """

    weighted = True

    nu: float = setting(
        1e-6, gt=0, le=1, help="distance below which a point pulls no harder, as a fraction of the majority's distances"
    )
    iterations: int = setting(100, ge=1, help="Weiszfeld steps at most")

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        distances = np.sqrt(cloud.squared)
        if distances.max() == 0:
            return cloud.mean(cloud.weights)  # all points are one
        floor = max(self.nu * float(np.sqrt(typical(cloud.squared).min())), _TINY)
        products = cloud.products(cloud.points[medoid(cloud.squared)])  # (k, k)
        # A start that far points hardly move; a point itself would hold on to it.
        own = cloud.weights / distances.sum(axis=1)
        own /= own.sum()  # z = sum_i own_i p_i
        for _ in range(self.iterations):
            along = products @ own
            away = np.sqrt(np.maximum(np.diag(products) - 2 * along + own @ along, 0.0))
            new = cloud.weights / np.maximum(floor, away)
            step = new / new.sum() - own
            own = own + step
            if step @ products @ step <= (_SETTLED * np.median(away)) ** 2:
                break
        return cloud.mean(own)


@dataclass(frozen=True)
class CenteredClipping(Rule):
    """The mean of the points pulled in to within ``tau`` of a centre, which moves there, ``iterations`` times.

    f hostile points of n equally weighted ones move it by no more than ``iterations f tau / n``. ``tau`` has to fit the
    honest points' spread: far smaller, it crawls; far larger, it is the mean.
    """

    weighted = True

    tau: float = setting(1.0, gt=0, help="norm to which differences from the centre are clipped")
    iterations: int = setting(1, ge=1, help="times that the centre moves in a round")
    start: str = setting(
        "last", choices=("last", "zero"), help="the first centre of a round: last round's outcome, or no change"
    )

    @property
    def stateful(self) -> bool:
        return self.start == "last"

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        centre = cloud.origin if cloud.centre is None else cloud.centre
        for _ in range(self.iterations):
            away = np.sqrt(cloud.squared_from(centre))
            pull = cloud.weights * self.tau / np.maximum(self.tau, away)
            centre = (1 - pull.sum()) * centre + torch.from_numpy(pull) @ cloud.points
        return centre

    def keep(
        self, vector: Tensor, view: Tensor, clients: Sequence[int], memory: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {"centre": vector.cpu().numpy()} if self.stateful else {}


@dataclass(frozen=True)
class CAF(Rule):
    """The mean by weights that fall where the points spread the most, until the spread is the least."""

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        n = len(cloud)
        counts = np.ones(n)
        best, least = cloud.mean(counts), np.inf
        while counts.sum() > n - 2 * f:
            mean = cloud.mean(counts)
            products = torch.from_numpy(cloud.products(mean))
            roots = torch.from_numpy(np.sqrt(counts / counts.sum()))
            values, vectors = torch.linalg.eigh(roots[:, None] * products * roots)
            if float(values[-1]) < least:
                best, least = mean, float(values[-1])
            # u = sum_i roots_i v_i (p_i - mu) / sqrt(value), so t is this up to a factor, which cancels
            spread = (products @ (roots * vectors[:, -1])).numpy() ** 2
            largest = spread[counts > 0].max()
            if largest == 0:
                break  # nothing is spread
            counts = counts * (1 - np.minimum(1.0, spread / largest))
            # Copies of the farthest point differ from it by rounding, and with any weight they would stay the farthest.
            counts[counts < _NOTHING] = 0.0
        return best
