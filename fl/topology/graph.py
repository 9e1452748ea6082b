"""A graph of peers, its mixing weights and its spectral gap.

``W[i, j]`` is what peer i's mixture takes of peer j's value. Undirected graphs have Metropolis-Hastings weights::

    W_ij = 1 / (1 + max(deg_i, deg_j))   for an edge {i, j},      W_ii = 1 - sum_j W_ij

symmetric, doubly stochastic, with a positive diagonal (Xiao and Boyd 2004; each peer needs its neighbours' degrees
only). Directed graphs have column-stochastic weights, as push-sum needs them (each peer needs its own out-degree)::

    W_ij = 1 / (1 + out_j)   for an edge j -> i and for i = j

The spectral gap is ``1 - |lambda_2|``, lambda_2 the eigenvalue of W of the second largest modulus, counted with its
multiplicity: 0 where the graph is not connected, 1 where one exchange gives everybody the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse import linalg as sparse_linalg

DENSE = 2000  # up to here all eigenvalues of a symmetric matrix take about a second
DENSE_DIRECTED = 1000


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of peers 0 to ``number`` - 1 without loops.

    ``edges`` is (m, 2) int64, each once and in ascending order: i < j, or (from, to) where ``directed``.
    """

    number: int
    edges: np.ndarray
    directed: bool = False

    @classmethod
    def of(cls, number: int, pairs: np.ndarray, directed: bool = False) -> Graph:
        """The graph of ``pairs`` (any, 2); loops and what is said twice (in either order, undirected) are left out."""
        pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        return cls(number, np.unique(pairs if directed else np.sort(pairs, axis=1), axis=0), directed)

    @cached_property
    def links(self) -> np.ndarray:
        """Who sends to whom in an exchange: (from, to), ascending; an undirected edge is two links."""
        return self.edges if self.directed else np.unique(np.concatenate([self.edges, self.edges[:, ::-1]]), axis=0)

    @cached_property
    def degrees(self) -> np.ndarray:
        """(n,) int64: to how many each peer sends."""
        return np.bincount(self.links[:, 0], minlength=self.number)

    @cached_property
    def weights(self) -> sparse.csr_matrix:
        """(n, n) float64, rows receive: Metropolis-Hastings, or column stochastic where ``directed``.

        An entry is stored for each link and for the diagonal, and is above 0.
        """
        source, target = self.links.T
        degrees = self.degrees
        counts = degrees[source] if self.directed else np.maximum(degrees[source], degrees[target])
        values = 1.0 / (1.0 + counts)
        rest = 1.0 - np.bincount(target, weights=values, minlength=self.number)
        own = 1.0 / (1.0 + degrees) if self.directed else rest
        everyone = np.arange(self.number)
        places = (np.concatenate([target, everyone]), np.concatenate([source, everyone]))
        matrix = sparse.csr_matrix((np.concatenate([values, own]), places), shape=(self.number, self.number))
        matrix.sort_indices()
        return matrix

    def neighbours(self, peer: int) -> np.ndarray:
        """Whom ``peer`` hears, ascending, without itself."""
        row = self.weights.indices[self.weights.indptr[peer] : self.weights.indptr[peer + 1]]
        return row[row != peer].astype(np.int64)

    @cached_property
    def components(self) -> np.ndarray:
        """(n,) the connected component of each peer, the strongly connected one where ``directed``."""
        return csgraph.connected_components(self.weights, directed=self.directed, connection="strong")[1]

    @property
    def connected(self) -> bool:
        """Whether what a peer knows can reach every other one."""
        return bool((self.components == self.components[0]).all())

    @cached_property
    def doubly_stochastic(self) -> bool:
        """Whether mixing keeps the mean and an agreement: rows and columns of the weights sum to 1."""
        return bool(np.allclose(self.weights.sum(axis=1), 1.0, rtol=0, atol=1e-9))

    @cached_property
    def gap(self) -> float | None:
        """1 - |lambda_2|; None for a large directed graph whose eigenvalues the solver doesn't find."""
        if self.number == 1:
            return 1.0
        second = _second_directed(self.weights) if self.directed else _second(self.weights)
        return None if second is None else min(1.0, max(0.0, 1.0 - second))


def _second(weights: sparse.csr_matrix) -> float:
    """|lambda_2| of a symmetric doubly stochastic matrix."""
    n = weights.shape[0]
    if n <= DENSE:
        return float(np.sort(np.abs(np.linalg.eigvalsh(weights.toarray())))[-2])

    def apply(x: np.ndarray) -> np.ndarray:
        return weights @ x - x.mean()  # without the eigenvalue 1 of the constant vectors

    start = np.cos(np.arange(n) ** 1.5)  # a fixed start that no graph has for an eigenvector: the result replays
    try:
        operator = sparse_linalg.LinearOperator((n, n), matvec=apply, dtype=float)
        found = sparse_linalg.eigsh(operator, k=1, which="LM", v0=start, ncv=60, maxiter=20, return_eigenvectors=False)
        return float(abs(found[0]))
    except sparse_linalg.ArpackNoConvergence:
        # Eigenvalues lie dense below 1: rings, paths, grids. Their factors are sparse, and inverting spreads them.
        ends = [
            sparse_linalg.eigsh(weights.tocsc(), k=2, sigma=sign * (1 + 1e-9), v0=start, return_eigenvectors=False)
            for sign in (1, -1)
        ]
        return float(np.sort(np.abs(np.concatenate(ends)))[-2])


def _second_directed(weights: sparse.csr_matrix) -> float | None:
    """|lambda_2| of a column-stochastic matrix."""
    n = weights.shape[0]
    if n <= DENSE_DIRECTED:
        return float(np.sort(np.abs(np.linalg.eigvals(weights.toarray())))[-2])
    start = np.cos(np.arange(n) ** 1.5)
    try:
        found = sparse_linalg.eigs(weights, k=2, which="LM", v0=start, ncv=60, maxiter=300, return_eigenvectors=False)
    except sparse_linalg.ArpackNoConvergence:
        return None
    second = float(np.sort(np.abs(found))[0])
    return second if math.isfinite(second) else None
