"""Federated averaging: the weighted mean of the clients' updates (FedAvg; on LoRA factors, FedIT).

    Delta = sum_i w_i u_i / sum_i w_i,     x' = x + Delta  (with the default server optimiser)

with ``u_i = y_i - x`` the client's adapter after training minus the one it started from, and ``w_i`` its number of
examples (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1), 1, or a given weight. Averaging updates instead of
adapters is the same when all clients start from the server's present version, and the only sensible thing when they
don't.

In place of the mean there may be a robust rule (`aggregators.combining`).

The factors A and B are averaged one by one (FedIT, arXiv 2305.05644). The mean of the products B_i A_i is another
thing: the two differ as soon as both factors differ between clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregators.base import ServerOptimizer, in_client_order
from aggregators.combining import ROOT, Combining
from aggregators.factored import advance, heard, mean_step
from fl.state import ServerState, Update


@dataclass(frozen=True)
class FedAvg(Combining):
    """Weighted mean of the updates, or a robust rule in its place, then one step of the server optimiser.

    Where the weight change is linear in what trains (one factor, or R) that is the mean of the clients' weight changes,
    exactly; clients of a lower rank count as having zeros beyond it. With both factors in training it is FedIT.
    """

    mean_only = True
    mixed: ClassVar[tuple[str, ...]] = ("b", "alternating", "core", "slice")

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        if self.plain:
            ordered, shares = heard(self, updates)
            step, columns = mean_step(server, ordered, shares)
            return advance(server, step, columns, optimizer)
        ordered = in_client_order(updates)
        vector, coefficients, extra = self.combined(server, ordered, (server.version,))
        if vector is None:
            # Product space decides who counts for how much; what counts are the factors' updates.
            assert coefficients is not None
            rest = [u.vector for u in ordered if u.client != ROOT]
            vector = np.tensordot(coefficients, np.stack(rest).astype(np.float64), 1)
        columns = next(u.columns for u in ordered if u.client != ROOT)
        return advance(server, vector, columns, optimizer).replace(extra=extra)
