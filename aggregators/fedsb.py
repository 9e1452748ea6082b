"""Fed-SB: with B and A frozen and common, the mean of the cores R is the mean of the weight changes.

    R' = sum_i p_i R_i,     s B R' A = sum_i p_i s B R_i A

(Singhal et al., arXiv 2502.15436). Up and down, a client and round cost ``r^2`` numbers for each module, whatever its
size. Clients of a lower rank own the leading block of R. ``blocks=zero`` takes zeros for the rest, which is the exact
mean of the changes; ``blocks=owners`` averages each entry over the clients that own it, and an entry that nobody heard
owns stays: the ranks that few clients own are not diluted, but the result is not the mean of the changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer
from aggregators.factored import advance, heard, mean_step, trained
from fl.config import setting
from fl.state import ServerState, Update


@dataclass(frozen=True)
class FedSB(Aggregator):
    """The mean of the cores R: exact, in r^2 numbers a module."""

    mean_only = True
    takes = ("core",)
    mixed = ("core",)

    blocks: str = setting(
        "zero",
        choices=("zero", "owners"),
        help="mixed ranks: pad with zeros (exact), or average over an entry's owners",
    )

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        if self.blocks == "owners":
            step, columns = owners_mean(server, ordered, shares)
        else:
            step, columns = mean_step(server, ordered, shares)
        return advance(server, step, columns, optimizer)


def owners_mean(
    server: ServerState, updates: Sequence[Update], shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """``sum_i p_i u_i / sum_i p_i`` over the clients that own an entry, and the columns; 0 where there is none."""
    space = server.space
    step, weight = np.zeros(space.layout.size), np.zeros(space.layout.size)
    for update, share in zip(updates, shares, strict=True):
        columns = slice(None) if update.columns is None else update.columns
        step[columns] += share * update.vector.astype(np.float64)
        weight[columns] += share
    np.divide(step, weight, out=step, where=weight > 0)
    moved = np.zeros(space.layout.size, bool)
    for name in space.layout.names:
        moved[slice(*space.spans[name])] = any(trained(space, u, name) for u in updates)
    return step[moved], None if moved.all() else np.flatnonzero(moved)
