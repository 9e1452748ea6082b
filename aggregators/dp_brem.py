"""The server step of DP-BREM: along the noisy mean of centrally clipped momenta, which it keeps as the next centre.

    phi <- phi + (1/|I|) [ sum_{i in I} clip_C(phi_i - phi) + N(0, (R sigma)^2 I) ],    theta <- theta - eta phi

(Gu et al., arXiv 2306.12608.) The first equation is the work of ``privacy=dp_brem``, which hands over ``phi`` beside
the step ``-eta phi``; the second is this rule's. Without that mechanism the rule is `FedAvg`, which makes the mean of
the momenta of ``local=client_momentum``: DP-BREM without clip and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aggregators.base import Aggregator, ServerOptimizer
from aggregators.fedavg import FedAvg
from fl.state import ServerState, Update

CENTRE = "centre"  # the name of phi beside an update, and among what the server keeps


@dataclass(frozen=True)
class DPBREM(Aggregator):
    """The mean, as `FedAvg` takes it, that keeps ``phi`` ``(n,)`` float64, of the columns that train."""

    mean_only = True

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        new = FedAvg(self.weights, self.staleness).aggregate(server, updates, optimizer)
        centres = [update.extra[CENTRE] for update in updates if CENTRE in update.extra]
        return new.replace(extra={**server.extra, CENTRE: centres[0]}) if len(centres) == 1 else new
