"""How peers combine what they hear in a round: a matrix product, or a robust rule in each neighbourhood.

Averaging is ``X' = W X`` with the graph's weights (Metropolis-Hastings: symmetric and doubly stochastic, so that the
mean is kept; column stochastic on directed graphs). A peer that is lost for a round is left out: the weight of each of
its links goes to the receiver's own diagonal, which keeps ``W`` symmetric and its rows adding up to one, or, where
``pushes`` (push-sum), to the sender's, which keeps the columns.

A robust rule acts on the differences from a peer's own model: ``x_i' = x_i + rule({x_j - x_i : j in N(i) and i})``.
With centred clipping about zero that is ClippedGossip, ``x_i' = x_i + sum_j W_ij clip(x_j - x_i)`` (He et al., arXiv
2202.01545).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sparse

if TYPE_CHECKING:
    from fl.topology.base import Graph


@dataclass
class Mixing:
    """One round's mixing over ``graph`` without the ``lost`` peers; ``pushes``: columns are to add up to one."""

    graph: Graph
    lost: frozenset[int] = frozenset()
    pushes: bool = False

    @cached_property
    def weights(self) -> sparse.csr_array:
        """``W`` ``(n, n)`` float64."""
        found = sparse.csr_array(self.graph.weights)
        if not self.lost:
            return found
        coo = found.tocoo()
        row, column = coo.coords
        out = np.isin(row, list(self.lost)) | np.isin(column, list(self.lost))
        gone = out & (row != column)
        kept = sparse.csr_array((coo.data[~gone], (row[~gone], column[~gone])), shape=found.shape)
        back = np.bincount((column if self.pushes else row)[gone], coo.data[gone], minlength=found.shape[0])
        return sparse.csr_array(kept + sparse.diags_array(back))

    def heard(self, peer: int) -> np.ndarray:
        """Whom ``peer`` hears in this round, ascending, without itself."""
        near = self.graph.neighbours(peer)
        return near[~np.isin(near, list(self.lost))] if peer not in self.lost else near[:0]

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """``W rows`` ``(n, d)``, in the type of ``rows``."""
        return np.asarray(sparse.csr_array(self.weights, dtype=rows.dtype) @ rows)

    def row(self, peer: int, peers: list[int]) -> np.ndarray:
        """``W_ij`` float64 of ``peer`` and each of ``peers``."""
        low, high = self.weights.indptr[peer : peer + 2]
        found = dict(zip(self.weights.indices[low:high].tolist(), self.weights.data[low:high].tolist()))
        return np.array([found.get(j, 0.0) for j in peers])
