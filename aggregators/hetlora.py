"""HetLoRA: clients of different ranks are padded with zeros and averaged, those with a larger change counting more.

    A' = sum_i w_i A_i,   B' = sum_i w_i B_i,     w_i = p_i ||s B_i A_i||_F / sum_j p_j ||s B_j A_j||_F

(Cho et al., arXiv 2401.06432). The norm is over all modules together. Equal ``p_i`` (``weights=uniform``, the default
here) give the paper's rule; ``sparsity_weighted=false`` gives ``w_i = p_i``, plain zero-padding. Where every product is
zero, ``w_i = p_i``.

Not exact: the mean of the factors is not that of the products. A rank that only some clients own is averaged with
zeros, and shrinks. The paper's clients also prune their own rank by a penalty on the trailing ranks; its constants were
not obtained, so that part is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import Aggregator, ServerOptimizer, normalised
from aggregators.factored import advance, factors, heard, mean_step, product, weighty
from fl.config import setting
from fl.state import ServerState, Update


@dataclass(frozen=True)
class HetLoRA(Aggregator):
    """The mean of zero-padded factors, weighted by the norms of the clients' products."""

    takes = ("lora",)
    mixed = ("lora",)

    weights: str | list[float] = setting(
        "uniform",
        help="what a client counts for, beside its norm: uniform, examples, or a list with a weight for each client",
    )
    sparsity_weighted: bool = setting(True, help="multiply the weights by the norm of the client's weight change")

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        ordered, shares = heard(self, updates)
        if self.sparsity_weighted:
            sizes = shares * norms(server, ordered)
            if sizes.any():
                ordered, shares = weighty(ordered, normalised(sizes))
        step, columns = mean_step(server, ordered, shares)
        return advance(server, step, columns, optimizer)


def norms(server: ServerState, updates: Sequence[Update]) -> np.ndarray:
    """``(n,)``: the Frobenius norm of each client's weight change, over all modules.

    ``||L R||^2 = tr (L^T L)(R R^T)``: two small Gram matrices for each module.
    """
    squares = np.zeros(len(updates))
    for i, update in enumerate(updates):
        for module in server.space.modules:
            left, right = factors(server, update, module)
            squares[i] += max(0.0, float((product(left.T, left) * product(right, right.T)).sum()))
    return np.sqrt(squares)
