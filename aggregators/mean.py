"""Federated averaging: the weighted mean of the clients' updates (FedAvg; on LoRA factors, FedIT).

    Delta = sum_i w_i u_i / sum_i w_i,     x' = x + Delta  (with the default server optimiser)

with ``u_i = y_i - x`` the client's adapter after training minus the one it started from, and ``w_i`` its number of
examples (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1) or 1. Averaging updates instead of adapters is the same
when all clients start from the server's present version, and the only sensible thing when they don't.

The factors A and B are averaged one by one (FedIT, arXiv 2305.05644). The mean of the products B_i A_i is another
thing: the two differ as soon as both factors differ between clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer, in_client_order, move, normalised
from fl.state import ServerState, Update

# Columns that are summed at a time: the float64 sum and one product stay in a core's cache (2 x 256 KiB).
_COLUMNS = 32_768


def weighted_mean(updates: np.ndarray | Sequence[np.ndarray], weights: np.ndarray | Sequence[float]) -> np.ndarray:
    """``sum_i w_i u_i / sum_i w_i`` as float64 ``(d,)``, of ``updates`` ``(n, d)`` and ``weights`` ``(n,)``.

    Summed in float64 in the order of the rows, whatever the type of ``updates``; takes ``2 d`` float64 of memory at
    most, never ``n d``. The division comes last, so that n equal float32 updates give exactly that update.
    Raises `RunStopped` unless the weights are finite, not negative and not all zero.
    """
    if len(weights) != len(updates):
        raise ValueError(f"{len(updates)} updates have {len(weights)} weights")
    normalised(weights)  # refuses what can't make a mean
    scale = np.asarray(weights, dtype=np.float64)  # (n,)
    total = scale.sum()
    mean = np.zeros(len(updates[0]), dtype=np.float64)  # (d,)
    product = np.empty(min(_COLUMNS, len(mean)), dtype=np.float64)
    for start in range(0, len(mean), _COLUMNS):
        part = mean[start : start + _COLUMNS]
        for weight, row in zip(scale, updates, strict=True):
            # dtype: a float32 row would otherwise be multiplied in float32
            part += np.multiply(row[start : start + _COLUMNS], weight, out=product[: len(part)], dtype=np.float64)
    mean /= total
    return mean


def combined(updates: Sequence[Update], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean of updates that may cover different columns: ``sum_i p_i u_i`` with zeros where a client has no column.

    Returns it ``(n,)`` float64 and its columns ``(n,)``, the union of the clients' (None: all).
    """
    first = updates[0].columns
    if all(u.columns is first for u in updates):
        return weighted_mean([u.vector for u in updates], shares), first
    assert first is not None
    owned = [u.columns for u in updates if u.columns is not None]
    columns = np.unique(np.concatenate(list({id(c): c for c in owned}.values())))
    mean = np.zeros(len(columns))
    for share, update, mine in zip(shares, updates, owned, strict=True):
        mean[np.searchsorted(columns, mine)] += share * update.vector.astype(np.float64)
    return mean, columns


@dataclass(frozen=True)
class FedAvg(Aggregator):
    """Weighted mean of the updates, then one step of the server optimiser.

    Exact, mixed ranks included, where the weight change is linear in what trains (one factor, or R); with both factors
    in training it is FedIT.
    """

    mixed = ("b", "alternating", "core", "slice")

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered = in_client_order(updates)
        mean, columns = combined(ordered, self.shares(ordered))
        label = "" if columns is None else f"{columns[0]}+{len(columns)}/" if len(columns) else ""
        return move(server, mean, optimizer, columns, label)
