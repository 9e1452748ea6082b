"""CHOCO-SGD: compressed gossip that still reaches the exact mean (Koloskova et al., arXiv 1902.00340, algorithm 2).

    v_i = x_i + u_i,    q_i = Q(v_i - h_i)  is sent,    h_i <- h_i + q_i  by all that hear it,
    x_i <- v_i + gamma sum_j W_ij (h_j - h_i)

``h_i`` is what the others believe of peer i. As they follow differences, what compression leaves out is sent later,
and the mean of the x_i is kept for any ``gamma``. A peer that missed a round is taken to learn what it missed, which
costs nothing here; with ``Q`` the identity and ``gamma = 1`` it is plain averaging.
Compressors are those of `fl.compression`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fl.compression import Compressor, TopK
from fl.config import setting
from fl.keys import generator
from fl.schedules.gossip import Arrays, Gossip, Round, exchange, wait_for_all


@dataclass(frozen=True)
class CHOCO(Gossip):
    """D-PSGD with compressed differences: what ``compressor`` makes of one vector, over each link and way."""

    gamma: float = setting(0.3, gt=0, le=1, help="how far a peer goes towards what it believes of its neighbours")
    compressor: Compressor = setting(TopK(), help="what is sent of a difference")

    symmetric = True

    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        return self.compressor.payload(size)

    def mix(self, round: Round, memory: Arrays) -> None:
        peers, columns = round.peers, round.columns
        believed = memory.get("believed", peers.states)  # all begin with the same model, so it is known
        moved = peers.states + round.updates
        sent = np.zeros_like(moved)
        for peer in range(len(peers)):
            if peer not in round.mixing.lost:
                draw = generator(round.world.seed, "compression", round.number, peer)
                difference = moved[peer, columns] - believed[peer, columns]
                sent[peer, columns] = self.compressor.compress(difference, draw)
        wait_for_all(round, exchange(round, self.payload(len(columns))))
        memory["believed"] = believed = believed + sent
        peers.states = moved + self.gamma * (round.mixing.mean(believed) - believed)
