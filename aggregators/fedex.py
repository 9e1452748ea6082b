"""FedEx-LoRA: the factors are averaged, and what that misses of the mean change goes into the base weights.

    A' = sum_i p_i A_i,   B' = sum_i p_i B_i,   W0' = W0 + s E
    E = sum_i p_i B_i A_i - B' A' = sum_i p_i (B_i - B') (A_i - C)      for any C, as sum_i p_i (B_i - B') = 0

so that ``W0' + s B' A'`` is the mean of the clients' models (Singhal et al., arXiv 2410.09432). With ``C`` the factor
of one of the N clients that client drops out, and E has rank ``(N - 1) r``. Clients of lower rank are padded with
zeros; ``C`` then has the rows that every client has, and E has rank ``sum_i r_i - min_i r_i``. E is sent as factors.

``rank`` keeps only the best approximation of E of that rank. The error is the norm of the singular values left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer, finite
from aggregators.factored import end, heard, mean_step, svd
from clients.adapters.base_change import Piece
from clients.adapters.space import Module
from fl.config import setting
from fl.state import ServerState, Update


@dataclass(frozen=True)
class FedEx(Aggregator):
    """The mean of the factors, and in the base the residual of the mean product: exact, mixed ranks included."""

    takes = ("lora",)
    mixed = ("lora",)
    optimizes = False
    stateful = True

    rank: int | None = setting(None, ge=1, help="rank of the residual that is sent; null: all of it, which is exact")

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        step, columns = mean_step(server, ordered, shares, stale=True)
        vector = server.vector.astype(np.float64)
        vector[slice(None) if columns is None else columns] += step
        increment = {}
        for module in server.space.modules:
            left, right = residual(server, module, ordered, shares, vector)
            if not right.any():  # one client, or all have the same A, as after a first step from B = 0
                continue
            if self.rank is not None and self.rank < left.shape[1]:
                u, s, vt = svd(left, right, self.rank)
                left, right = (u * s).astype(server.vector.dtype), vt.astype(server.vector.dtype)
            increment[module.name] = Piece(left, right)
        return finite(server, vector, increment=increment)


def residual(
    server: ServerState, module: Module, updates: Sequence[Update], shares: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``s E`` of ``module`` as ``left (out, p) @ right (p, in)``, where ``mean`` ``(d,)`` holds the mean factors.

    In float64, rounded once to the type of the server's vector.
    """
    space = server.space
    ranks = [space.rank(module, u.client) for u in updates]
    common = min(ranks)
    d, k = space.sizes(module)
    width = sum(ranks) - common
    left, right = np.empty((d, width), server.vector.dtype), np.empty((width, k), server.vector.dtype)
    center = space.tensor(mean, module.b)  # (out, r)
    last = end(server, updates[-1], module.a).reshape(-1, k)
    reference = last[:common]
    at = 0
    for update, share, rank in zip(updates, shares, ranks, strict=True):
        first = common if update is updates[-1] else 0  # the last one's leading rows are the reference
        own, at = slice(at, at + rank - first), at + rank - first
        b = end(server, update, module.b)
        b -= center[:, :rank]
        np.multiply(b[:, first:], module.scale * share, out=left[:, own], casting="same_kind")
        a = last if update is updates[-1] else end(server, update, module.a).reshape(-1, k)
        if not first:
            a[:common] -= reference
        right[own] = a[first:]
    return left, right
