"""Stochastic gradient push: averaging over directed graphs (arXiv 1406.2075; Assran et al., arXiv 1811.10792).

    x_i <- sum_j A_ij (x_j + u_j(z_j)),    w_i <- sum_j A_ij w_j,    z_i = x_i / w_i,    w_i = 1 at first

with ``A`` column stochastic: a peer divides what it has among those that hear it, and need not know what they hear.
Peers train from ``z``. ``sum_i w_i = n`` always, and ``sum_i x_i`` changes by the updates alone. On a graph whose rows
add up to one as well, w stays 1 and this is D-PSGD, adapt then combine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fl.peers import Peers
from fl.schedules.gossip import Arrays, Gossip, Round, exchange, wait_for_all


@dataclass(frozen=True)
class PushSum(Gossip):
    """D-PSGD over directed graphs: one vector and one number over each link."""

    pushes = True

    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        return {"model": ("float32", size), "weight": ("float64", 1)}

    def mean(self, peers: Peers, memory: Arrays) -> np.ndarray:
        return memory["sums"].mean(axis=0, dtype=np.float64)

    def mix(self, round: Round, memory: Arrays) -> None:
        peers = round.peers
        sums = memory.get("sums", peers.states)
        weights = memory.get("weights", np.ones(len(peers)))
        wait_for_all(round, exchange(round, self.payload(len(round.columns))))
        memory["sums"] = round.mixing.mean(sums + round.updates)
        memory["weights"] = round.mixing.weights @ weights
        peers.states = (memory["sums"] / memory["weights"][:, None]).astype(peers.states.dtype)
