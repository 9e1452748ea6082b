"""How often each edge of a graph is used, and what that is worth: the rates of edges' clocks.

With edges (i, j) used ``lambda_ij`` times a unit of time and ``e_ij = e_i - e_j``::

    Lambda = sum_ij lambda_ij e_ij e_ij^T        chi1 = 1 / lambda_min^+(Lambda)        (how slowly values mix)
    chi2 = 1/2 max_ij e_ij^T Lambda^+ e_ij       (the largest resistance of an edge; chi2 <= chi1)

Both fall in proportion as all rates rise. Nabli and Oyallon, DADAO (arXiv 2208.00779), section 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fl.errors import ConfigError, ShoalError


@dataclass(frozen=True, eq=False)
class Rates:
    """``values`` ``(m,)`` uses a unit of time of the undirected ``edges`` ``(m, 2)`` among ``number`` peers.

    Raises `ShoalError` unless the edges that are used connect all peers.
    """

    number: int
    edges: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if len(self.values) != len(self.edges) or not np.all(self.values >= 0):
            raise ShoalError(f"{len(self.edges)} edges need as many rates, all of them >= 0")
        if not np.isfinite(self.chi1):
            raise ShoalError("the graph is not connected: no rate lets its parts agree. Use another topology=.")

    @property
    def total(self) -> float:
        """Uses of all edges together in a unit of time."""
        return float(self.values.sum())

    @cached_property
    def laplacian(self) -> np.ndarray:
        """``Lambda`` ``(n, n)``."""
        found = np.zeros((self.number, self.number))
        np.add.at(found, (self.edges[:, 0], self.edges[:, 1]), -self.values)
        np.add.at(found, (self.edges[:, 1], self.edges[:, 0]), -self.values)
        found[np.diag_indices(self.number)] = -found.sum(1)
        return found

    @cached_property
    def chi1(self) -> float:
        """``1 / lambda_min^+``; infinite for a graph in parts."""
        spectrum = np.linalg.eigvalsh(self.laplacian)
        return 1 / spectrum[1] if spectrum[1] > 1e-12 * spectrum[-1] else np.inf

    @cached_property
    def chi2(self) -> float:
        """Half the largest resistance between two ends of an edge that is used."""
        # The inverse on the vectors of mean zero; what is added on the others has the scale of the rest.
        scale = np.trace(self.laplacian) / self.number**2
        inverse = np.linalg.inv(self.laplacian + scale)
        used = self.edges[self.values > 0]
        i, j = used[:, 0], used[:, 1]
        return float((inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]).max() / 2)

    @property
    def needed(self) -> float:
        """``sqrt(2 chi1 chi2)``: the factor on all rates with which ``chi1 chi2 = 1/2``, DADAO's condition."""
        return float(np.sqrt(2 * self.chi1 * self.chi2))

    def times(self, factor: float) -> Rates:
        """All rates ``factor`` times as high."""
        return dataclasses.replace(self, values=self.values * factor)


def uniform(number: int, edges: np.ndarray) -> Rates:
    """The same rate for each edge, one use a unit of time in all."""
    edges = np.asarray(edges, dtype=np.int64)
    return Rates(number, edges, np.full(len(edges), 1 / max(1, len(edges))))


def optimal(number: int, edges: np.ndarray) -> Rates:
    """The shares of the edges, one use a unit of time in all, that reach ``chi1 chi2 = 1/2`` with the fewest uses.

    ``chi1 chi2 <= 1/2`` holds if there is a t with ``Lambda >= t (I - J)`` and ``e^T Lambda^+ e <= t`` for all edges,
    where ``J = 11^T / n``. Both are linear matrix inequalities (the second by Schur's complement), so

        minimise sum lambda_ij   subject to   Lambda - t (I - J) >= 0,   [[Lambda + J, e_ij], [e_ij^T, t]] >= 0

    is a semidefinite program. On edge-transitive graphs (ring, star, complete) the uniform rates are optimal. The
    solver is inexact, so the caller scales the result by its own `Rates.needed`. Raises `ConfigError` without cvxpy.
    """
    try:
        import cvxpy
    except ImportError as error:
        way_out = 'Install the extra: pip install "shoal-fl[rates]".'
        raise ConfigError("schedule.rates", "optimal", "uniform, since cvxpy is not installed", way_out) from error
    edges = np.asarray(edges, dtype=np.int64)
    share: Any = cvxpy.Variable(len(edges), nonneg=True)
    time: Any = cvxpy.Variable()
    ends = np.zeros((len(edges), number))
    rows = np.arange(len(edges))
    ends[rows, edges[:, 0]], ends[rows, edges[:, 1]] = 1.0, -1.0
    mean = np.full((number, number), 1 / number)
    laplacian = ends.T @ cvxpy.diag(share) @ ends
    limits = [laplacian - time * (np.eye(number) - mean) >> 0]
    for e in ends:
        column = e.reshape(-1, 1)
        limits.append(cvxpy.bmat([[laplacian + mean, column], [column.T, cvxpy.reshape(time, (1, 1), "C")]]) >> 0)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(share)), limits)
    problem.solve(solver=cvxpy.SCS, eps=1e-7, max_iters=100_000)
    if share.value is None:
        raise ShoalError(
            f"the optimal rates of this graph were not found ({problem.status}). Use schedule.rates=uniform."
        )
    # What the solver leaves of an edge that it does without is no rate.
    values = np.where(share.value > 1e-6 * share.value.max(), share.value, 0.0)
    return Rates(number, edges, values / values.sum())
