"""Rules that act on each coordinate by itself: median, trimmed mean, MeaMed, and the second half of Bulyan.

With ``x_(1) <= .. <= x_(n)`` the values of one coordinate:

    median         the middle one; of an even number the mean of the two; by weights: half the weight on either side
    trimmed mean   mean of x_(f+1) .. x_(n-f)                      (both: Yin et al. 2018, arXiv 1803.01498)
    MeaMed         mean of the n - f values nearest to the median  (Xie et al. 2018, arXiv 1802.10116)
    Bulyan         n - 2f points by repeated Krum without replacement, then for each coordinate the mean of the n - 4f
                   values nearest to their median                  (El Mhamdi et al. 2018, arXiv 1802.07927)

Bulyan needs n >= 4f + 3, the others n > 2f. A coordinate has to mean something: see docs/robust.md on factors.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aggregators.robust.base import Cloud, Rule
from aggregators.robust.nearest import krum_order
from aggregators.robust.ordering import ascending, in_order
from fl.errors import RunStopped

_BLOCK = 524_288  # numbers that are sorted at a time: 2 MiB of float32


@dataclass(frozen=True)
class CoordinateRule(Rule):
    """A rule of single coordinates."""

    weighs = False

    def choose(self, cloud: Cloud, f: int) -> Tensor:
        """The points whose coordinates it looks at, as coefficients ``(k, N)`` of the base points."""
        return cloud.points

    @abstractmethod
    def reduce(self, block: Tensor, weights: np.ndarray, f: int) -> Tensor:
        """One value ``(c,)`` float64 for each column of ``block`` ``(k, c)``; not finite where a column is not."""

    def on_coordinates(self, rows: Tensor, mixing: Tensor | None, weights: np.ndarray, f: int) -> Tensor:
        """The outcome ``(d,)`` float64 on what ``mixing`` ``(k, n)`` makes of ``rows`` ``(n, d)`` (None: on these).

        Raises `RunStopped` where a row is not finite.
        """
        out = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
        single = None if mixing is None else _picks(mixing)
        points = len(rows) if mixing is None else len(mixing)
        width = max(1_024, _BLOCK // points)
        for start in range(0, rows.shape[1], width):
            part = slice(start, start + width)
            block = rows[:, part]
            if single is not None:
                block = block[single.to(rows.device)]
            elif mixing is not None:
                block = mixing.to(rows.device) @ block.to(torch.float64)
            out[part] = self.reduce(block, weights, f)
        if not bool(torch.isfinite(out.sum())):
            raise RunStopped(
                f"{type(self).__name__} met updates that are not finite (NaN or infinite). Refuse such updates before "
                "they are combined."
            )
        return out


def _picks(mixing: Tensor) -> Tensor | None:
    """The rows that ``mixing`` picks, where it picks single ones and combines none."""
    where = mixing.argmax(dim=1)
    exact = torch.zeros_like(mixing).scatter_(1, where[:, None], 1.0)
    return where if torch.equal(exact, mixing) else None


@dataclass(frozen=True)
class CoordinateMedian(CoordinateRule):
    """The median of each coordinate, by weights where these differ."""

    weighted = True

    def reduce(self, block: Tensor, weights: np.ndarray, f: int) -> Tensor:
        if np.ptp(weights) <= 1e-12 * weights.max():
            return middle(ascending(block))
        values, order = in_order(block)
        below = torch.from_numpy(weights).to(block.device)[order].cumsum(dim=0)
        half = 0.5 * below[-1]
        # The least value with half the weight at or below it, and the least with more than half: mostly the same.
        slack = 1e-12 * half
        first = (below < half - slack).sum(dim=0, keepdim=True)
        last = (below <= half + slack).sum(dim=0, keepdim=True).clamp(max=len(block) - 1)
        ends = values.gather(0, first).to(torch.float64) + values.gather(0, last).to(torch.float64)
        return proper(values, ends[0] / 2)


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    """The mean of each coordinate without the f smallest and the f largest values."""

    def reduce(self, block: Tensor, weights: np.ndarray, f: int) -> Tensor:
        values = ascending(block)
        return proper(values, total(values[f : len(values) - f]) / (len(values) - 2 * f))


@dataclass(frozen=True)
class MeaMed(CoordinateRule):
    """The mean around the median: of the n - f values of each coordinate that are nearest to it."""

    def reduce(self, block: Tensor, weights: np.ndarray, f: int) -> Tensor:
        return around_median(ascending(block), f)


@dataclass(frozen=True)
class Bulyan(CoordinateRule):
    """Repeated Krum, then the mean around the median of what it chose."""

    def least(self, f: int) -> int:
        return 4 * f + 3

    def choose(self, cloud: Cloud, f: int) -> Tensor:
        """Krum again and again on what is left, with as many neighbours as it then has (one at least)."""
        left = np.arange(len(cloud))
        chosen = []
        for _ in range(len(cloud) - 2 * f):
            best = krum_order(cloud.squared[np.ix_(left, left)], f)[0]
            chosen.append(int(left[best]))
            left = np.delete(left, best)
        return cloud.points[sorted(chosen)]

    def reduce(self, block: Tensor, weights: np.ndarray, f: int) -> Tensor:
        return around_median(ascending(block), 2 * f)


def total(values: Tensor) -> Tensor:
    """The sum of each column of ``values`` ``(k, c)``, float64."""
    return values.sum(dim=0, dtype=torch.float64)


def middle(values: Tensor) -> Tensor:
    """The median of each column of sorted ``values`` ``(k, c)``, float64."""
    k = len(values)
    ends = values[(k - 1) // 2].to(torch.float64) + values[k // 2].to(torch.float64)
    return proper(values, ends / 2)


def around_median(values: Tensor, drop: int) -> Tensor:
    """The mean of the k - drop values of each sorted column ``(k, c)`` that are nearest to its median, float64.

    ``values`` is used up.

    They are neighbours: the window of that many values starts at t, the number of starts s with
    ``x_(s + keep) - median < median - x_(s)``, since moving on from s changes one end for the other. Of two equally
    near values the smaller is taken. Values outside are left out of the sum, not taken from it, as they may be huge.
    """
    keep = len(values) - drop
    centre = middle(values)  # (c,)
    moves = values[keep:].to(torch.float64) - centre < centre - values[:drop].to(torch.float64)  # (drop, c)
    values[:drop].masked_fill_(moves, 0.0)  # the window starts beyond these
    values[keep:].masked_fill_(~moves, 0.0)  # it ends before these
    return centre * 0 + total(values) / keep  # with the centre's NaN where a value is not finite


def proper(values: Tensor, result: Tensor) -> Tensor:
    """``result`` ``(c,)``, but NaN where a sorted column of ``values`` ``(k, c)`` has an end that is not finite."""
    ends = values[0].to(torch.float64) * 0 + values[-1].to(torch.float64) * 0  # NaN of infinities and NaN
    return result + ends
