"""RoLoRA: A and B train in turn, so that in each round the mean of the factor is the mean of the products.

    odd rounds:   B' = sum_i p_i B_i,   s B' A = sum_i p_i s B_i A         (A frozen and common)
    even rounds:  A' = sum_i p_i A_i,   s B A' = sum_i p_i s B A_i         (B frozen and common)

(Chen et al., arXiv 2409.02346 and 2502.01755.) The first round trains B: from ``B = 0``, A would have no gradient.
Which factor trains is the adapter's part (`adapter=rolora`); here is what becomes of it.

Clients of a lower rank count as having zeros beyond it, which is exact too. That is where it differs from
`aggregators.mean.FedAvg`, which leaves those ranks where they are and adds the mean of the changes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aggregators.base import Aggregator, ServerOptimizer
from aggregators.factored import advance, heard, mean_step
from fl.state import ServerState, Update


@dataclass(frozen=True)
class RoLoRA(Aggregator):
    """The mean of the factor that trained in this round: exact, as the other factor is common."""

    takes = ("alternating",)
    mixed = ("alternating",)

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        step, columns = mean_step(server, ordered, shares)
        return advance(server, step, columns, optimizer)
