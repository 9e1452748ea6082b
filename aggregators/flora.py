"""FLoRA: the clients' factors are stacked and folded into the base weights, and the adapter begins anew.

    B_s = s [B_1 .. B_N],   A_s = [p_1 A_1; ..; p_N A_N],   W0' = W0 + B_s A_s = W0 + sum_i p_i s B_i A_i

exact for clients of any ranks (Wang et al., arXiv 2409.05976); the weights are on one of the two stacks alone. Then
``B = 0`` and A begins anew. The authors draw A afresh on every client; here A goes back to the value that the first
round started from, which is as random, the same for all clients, and costs no bytes.

Clients fold the stack as they are sent it, ``sum_i r_i`` ranks a round, so the downlink grows with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer, finite
from aggregators.factored import head_step, heard, stacks
from clients.adapters.base_change import Piece
from fl.state import ServerState, Update

START = "flora/start"


@dataclass(frozen=True)
class FLoRA(Aggregator):
    """The stacked factors of all clients go into the base, and the adapter begins anew: exact, mixed ranks included."""

    takes = ("lora",)
    mixed = ("lora",)
    optimizes = False
    stateful = True

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        space = server.space
        increment = {
            module.name: Piece(*stacks(server, module, ordered, shares, server.vector.dtype))
            for module in space.modules
        }
        vector = server.vector.astype(np.float64)
        head_step(server, ordered, shares, vector)
        start = server.extra.get(START)
        if start is None:  # the first aggregation: this is the A that all clients were given
            start = np.concatenate([server.vector[slice(*space.spans[m.a])] for m in space.modules])
        at = 0
        for module in space.modules:
            a = space.tensor(vector, module.a)
            a[...] = start[at : at + a.size].reshape(a.shape)
            at += a.size
            space.tensor(vector, module.b)[...] = 0
        return finite(server, vector, increment=increment, extra={**server.extra, START: start})
