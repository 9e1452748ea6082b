"""FedSVD: the clients train B over a common frozen A, and the server factors the mean product anew.

    B = sum_i p_i B_i,    B A = U S V^T,    A' = V^T,   B' = U S,      so B' A' = B A and A' A'^T = I

(Lee et al., arXiv 2505.12805). By thin QR of B and A^T and an SVD of their r x r core, never of the product. As
``A' = V^T Q^T`` with Q an orthonormal basis of the rows of A, the rows of A' span those of A even where B is short of
rank or zero (A itself is then orthonormalised); an SVD of the product would fill in any direction at all. So the row
space of A never changes: under plain SGD, clipped or not, FedSVD is FFA-LoRA over an orthonormal A. Under an optimiser
that treats coordinates apart (Adam) it is not.

Each refactoring changes A, which is then sent down beside B. A momentum on the server would be in the old basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer, finite
from aggregators.factored import heard, mean_step, product, span, svd
from fl.config import setting
from fl.state import ServerState, Update


@dataclass(frozen=True)
class FedSVD(Aggregator):
    """The mean of B over a common A, refactored so that A has orthonormal rows: exact."""

    mean_only = True
    takes = ("b",)
    mixed = ("b",)
    optimizes = False
    stateful = True

    period: int = setting(1, ge=1, help="versions from one refactoring to the next")

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        ordered = [present(server, u) for u in ordered]
        step, columns = mean_step(server, ordered, shares)
        vector = server.vector.astype(np.float64)
        vector[slice(None) if columns is None else columns] += step
        if (server.version + 1) % self.period == 0:
            for module in server.space.modules:
                a, b = server.space.tensor(vector, module.a), server.space.tensor(vector, module.b)
                if a.size < module.rank**2:
                    continue  # more rows than columns: they can't be orthonormal, and span everything as they are
                u, s, vt = svd(b.reshape(-1, module.rank), a.reshape(module.rank, -1), module.rank)
                a[...], b[...] = vt.reshape(a.shape), (u * s).reshape(b.shape)
        return finite(server, vector, increment={})


def present(server: ServerState, update: Update) -> Update:
    """The update in the basis of the server's present A, where the client started from an older one.

    ``u_i A_old = (u_i M) A`` with ``M = A_old A^T (A A^T)^-1``: exact, as both have the same row space.
    """
    if update.start is None or update.start is server.vector:
        return update
    space, start = server.space, update.start
    whole = np.zeros(space.layout.size)
    whole[slice(None) if update.columns is None else update.columns] = update.vector
    changed = False
    for module in space.modules:
        a = space.tensor(server.vector, module.a).reshape(module.rank, -1).astype(np.float64)
        old = space.tensor(start, module.a).reshape(module.rank, -1).astype(np.float64)
        part = span(space, update, module.b)
        if part.stop > part.start and not np.array_equal(a, old):
            b = space.tensor(whole, module.b)
            change = np.linalg.solve(product(a, a.T), product(a, old.T)).T
            b[...] = product(b.reshape(-1, module.rank), change).reshape(b.shape)
            changed = True
    if not changed:
        return update
    columns = space.columns(space.trains(update.round))
    return replace(update, vector=whole[columns], columns=columns)
