"""What robust rules are made of: points that are combinations of updates, and rules that weigh them.

A rule that looks at nothing but distances, norms and angles needs no update itself, only the inner products of the
updates. Its outcome is a combination ``sum_i a_i p_i`` of the *base points* p: the updates, the origin (which stands
for "no change"), and maybe a root update or a remembered centre. Pre-aggregators (mixing, bucketing, clipping) replace
the updates by such combinations. So a whole pipeline is a matter of coefficients: one Gram matrix at its start, one
product at its end, and nothing in between has the length of a model.

All combinations here are affine (coefficients that add up to one; clipping gives the rest to the origin). Then the
squared distance of two is ``(a - b)' G (a - b)`` with the Gram matrix G about any point, since ``a - b`` adds up to
zero; `aggregators.robust.geometry` takes one about which little is lost to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fl.errors import ConfigError

if TYPE_CHECKING:
    from aggregators.robust.geometry import Geometry


@dataclass(frozen=True, eq=False)
class Cloud:
    """k points ``(k, N)`` as affine combinations of the N base points of ``geometry``, with weights ``(k,)``.

    ``origin``, ``root`` and ``centre`` are base points, as coefficients ``(N,)``. All float64, on the CPU. ``plain``:
    the points are the updates themselves, whose norms need no Gram matrix.
    """

    geometry: Geometry
    points: Tensor
    weights: np.ndarray
    origin: Tensor
    root: Tensor | None = None
    centre: Tensor | None = None
    plain: bool = False

    def __len__(self) -> int:
        return len(self.points)

    def mixed(self, matrix: Tensor, weights: np.ndarray | None = None) -> Cloud:
        """The cloud of the combinations ``matrix`` ``(k', k)`` of these points, whose rows add up to one."""
        weights = self.weights if weights is None else weights
        return replace(self, points=matrix @ self.points, weights=weights, plain=False)

    def mean(self, coefficients: np.ndarray) -> Tensor:
        """``sum_i c_i p_i / sum_i c_i`` of the points, as coefficients ``(N,)`` of the base points."""
        return torch.from_numpy(coefficients / coefficients.sum()) @ self.points

    def products(self, about: Tensor) -> np.ndarray:
        """``<p_i - about, p_j - about>`` ``(k, k)``, ``about`` given as coefficients ``(N,)``."""
        differences = self.points - about
        return (differences @ self.geometry.gram @ differences.T).numpy()

    def squared_from(self, point: Tensor) -> np.ndarray:
        """``||p_i - point||^2`` ``(k,)``; the point as coefficients ``(N,)``."""
        if self.plain and point is self.origin:
            return self.geometry.norms[: len(self)]
        differences = self.points - point
        return ((differences @ self.geometry.gram) * differences).sum(dim=1).clamp(min=0).numpy()

    @cached_property
    def squared(self) -> np.ndarray:
        """``||p_i - p_j||^2`` ``(k, k)``, with zeros on the diagonal."""
        near = medoid(squared_distances(self.products(self.points[0])))
        # Twice: differences from a far first point would leave its rounding errors in the distances of the others.
        return squared_distances(self.products(self.points[near]))


def squared_distances(products: np.ndarray) -> np.ndarray:
    """``||p_i - p_j||^2`` from the inner products ``<p_i, p_j>`` about any point, both ``(k, k)``."""
    norms = np.diag(products)
    # of both halves: a product of matrices is not symmetric to the last bit, and distances are compared
    squared = np.maximum(norms[:, None] + norms[None, :] - (products + products.T), 0.0)
    np.fill_diagonal(squared, 0.0)
    return squared


def medoid(squared: np.ndarray) -> int:
    """The point whose median distance from the points is the least, which is near the majority's, wherever others are.

    ``squared`` ``(k, k)`` squared distances; the lower index where two are equal.
    """
    return int(np.argmin(typical(squared)))


def typical(squared: np.ndarray) -> np.ndarray:
    """The median squared distance ``(k,)`` of each point from the points, itself included."""
    half = squared.shape[1] // 2
    return np.partition(squared, half, axis=1)[:, half]


def one_hot(index: int, number: int) -> Tensor:
    """The base point ``index`` of ``number`` as coefficients."""
    point = torch.zeros(number, dtype=torch.float64)
    point[index] = 1
    return point


@dataclass(frozen=True)
class Pre(ABC):
    """What is done to the updates before a rule sees them."""

    def least(self, f: int) -> int:
        """How few updates it can act on when ``f`` of them may be hostile."""
        return 1

    def number(self, n: int) -> int:
        """How many points it makes of ``n``."""
        return n

    @abstractmethod
    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        """The points that the rule sees. ``f`` of ``cloud`` may be hostile, and no more of the result."""


@dataclass(frozen=True)
class NoPre(Pre):
    """The updates as they are."""

    def apply(self, cloud: Cloud, f: int, seed_key: tuple) -> Cloud:
        return cloud


@dataclass(frozen=True)
class Rule:
    """How points become one, when up to ``f`` of them may be anywhere.

    ``weighs``: the outcome is a combination of the points, found from their inner products (`weigh`); otherwise it acts
    on single coordinates (`aggregators.robust.coordinates.CoordinateRule`), which a product B A does not have.
    ``weighted``: it knows weights; other rules count every point alike.
    ``root``: it needs an update that the server made from data of its own.
    """

    weighs: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    root: ClassVar[bool] = False

    @property
    def stateful(self) -> bool:
        """Whether it remembers something from round to round, for which it needs the updates themselves."""
        return False

    def least(self, f: int) -> int:
        """How few points it can act on when ``f`` of them may be hostile: its breakdown condition."""
        return 2 * f + 1

    def check(self, n: int, f: int, pre: Pre) -> None:
        """Raise `ConfigError` unless ``n`` updates, of which ``f`` may be hostile, are enough after ``pre``."""
        name, before = type(self).__name__, type(pre).__name__
        points = pre.number(n)
        if n < pre.least(f):
            asks, least, has = before, pre.least(f), f"{n} updates"
        elif points < self.least(f):
            asks, least, has = name, self.least(f), f"{points} points" if points < n else f"{n} updates"
        else:
            return
        after = f" that {before} makes of {n} updates" if points < n and asks == name else ""
        raise ConfigError(
            "aggregator.f",
            f,
            f"{asks} needs at least {least} of them with f={f} hostile, and there are {has}{after}",
            "Lower aggregator.f, let more clients take part in a round, or use another aggregator.combine.",
        )

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        """The outcome as coefficients ``(N,)`` of the base points; of rules that weigh."""
        raise NotImplementedError(f"{type(self).__name__} acts on coordinates")

    def view(self, rows: Tensor, clients: Sequence[int], memory: Mapping[str, np.ndarray]) -> Tensor:
        """The rows ``(n, d)`` whose inner products the rule sees: those given, unless it looks at their history."""
        return rows

    def keep(
        self, vector: Tensor, view: Tensor, clients: Sequence[int], memory: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What it remembers after the outcome ``vector`` ``(d,)``; of rules that are `stateful`."""
        return {}


@dataclass(frozen=True)
class Mean(Rule):
    """The weighted mean. One hostile update moves it anywhere, so ``f`` is only what pre-aggregators are told."""

    weighted = True

    def least(self, f: int) -> int:
        return 1

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        return cloud.mean(cloud.weights)


@dataclass(frozen=True)
class Auto(Mean):
    """The schedule's own: the weighted mean, or nearest-neighbour averaging under monna."""
