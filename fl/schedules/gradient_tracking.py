"""Gradient tracking: every peer follows an estimate of the mean gradient (DIGing, arXiv 1607.03218; NEXT, 1602.00591).

    y_i <- sum_j W_ij y_j + g_i(x_i) - g_i(x_i^old),    y_i = g_i at first
    x_i <- sum_j W_ij (x_j - lr y_j)

``mean_i y_i = mean_i g_i`` in every round, so with full gradients a constant step converges to the optimum of the mean
objective, whatever the peers' data: D-PSGD's bias is gone. Two vectors travel over each link and way.

``g_i = -u_i / lr`` is the change that local training makes, per learning rate: the gradient for one step of SGD
(``local=sgd local.steps=1``), a pseudo-gradient else. With mini-batches the old gradient is the one that was used in
the last round, on that round's batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl.schedules.gossip import Arrays, Gossip, Round, check_steady, exchange, wait_for_all


@dataclass(frozen=True)
class GradientTracking(Gossip):
    """D-PSGD with tracked gradients: two vectors over each link and way."""

    symmetric = True

    def check(self, settings: Any) -> None:
        super().check(settings)
        check_steady(self, settings)

    def payload(self, size: int) -> Mapping[str, tuple[str, int]]:
        return {"model": ("float32", size), "tracker": ("float32", size)}

    def mix(self, round: Round, memory: Arrays) -> None:
        peers = round.peers
        old = memory.get("gradient", np.zeros_like(round.updates))
        fresh = round.updates / -round.lr
        gone = sorted(round.mixing.lost)
        fresh[gone] = old[gone]  # nothing new is known there, so nothing is added
        memory["tracker"] = tracker = memory.get("tracker", np.zeros_like(fresh)) + (fresh - old)
        memory["gradient"] = fresh
        wait_for_all(round, exchange(round, self.payload(len(round.columns))))
        step = round.lr * tracker
        step[gone] = 0
        peers.states = round.mixing.mean(peers.states - step)
        memory["tracker"] = round.mixing.mean(tracker)
