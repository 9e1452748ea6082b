"""FlexLoRA: the mean of the clients' products is factored anew by SVD, and each client takes what its rank holds.

    D* = sum_i p_i s B_i A_i = U S V^T,     B' = U_r S_r / s,   A' = V_r^T       (``split=B``)
                                            B' = U_r sqrt(S_r / s),   A' = sqrt(S_r / s) V_r^T     (``split=even``)

(Bai et al., arXiv 2402.11505; how S is divided is not known to us from the paper.) r is the largest rank; as the
singular values fall, a client's leading block is the best approximation of D* of its own rank. The error is what is cut
off: ``sqrt(sum_{j > r} S_j^2)``. D* is never formed: QR of the stacked factors, then an SVD of their small core.

Where D* has a rank q < r, columns q.. of B' are zero. Rows q.. of A' are then unit vectors, orthogonal to the others
and each other, out of the row space of the present A: with zeros in both factors neither would get a gradient again,
and directions outside the spaces in use would come from nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregators.base import ServerOptimizer, finite, in_client_order
from aggregators.combining import ROOT, Combining, scaled
from aggregators.factored import head_step, heard, product, stacks, svd
from aggregators.robust.centres import CenteredClipping
from fl.config import setting
from fl.errors import ConfigError
from fl.state import ServerState, Update


@dataclass(frozen=True)
class FlexLoRA(Combining):
    """The best approximation of the mean product by SVD; clients of a lower rank take its leading part.

    Under a robust rule the mean is ``sum_i c_i B_i A_i``, with the rule's coefficients and, where these don't add up to
    one, the server's own product for the rest.
    """

    takes = ("lora",)
    mixed = ("lora",)
    optimizes = False

    split: str = setting(
        "B", choices=("B", "even"), help="where the singular values go: all into B, or their roots into both factors"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.combine.weighs:
            name = type(self.combine).__name__
            allowed = f"a rule that weighs updates: {name} acts on coordinates, and a product is not averaged by them"
            raise ConfigError("aggregator.combine", name, allowed, "Use aggregator=fedavg, or a rule such as krum.")
        if self.combine.root:
            allowed = "a rule whose coefficients add up to one at most: FLTrust gives updates another length"
            raise ConfigError("aggregator.combine", type(self.combine).__name__, allowed, "Use aggregator=fedavg.")
        if isinstance(self.combine, CenteredClipping) and self.combine.stateful:
            allowed = "zero: the last outcome is no update, so it has no product"
            raise ConfigError("aggregator.combine.start", self.combine.start, allowed)

    def aggregate(
        self, server: ServerState, updates: Sequence[Update], optimizer: ServerOptimizer | None = None
    ) -> ServerState:
        if self.plain:
            ordered, shares = heard(self, updates)
            extra = server.extra
        else:
            every = in_client_order(updates)
            _, coefficients, extra = self.combined(server, every, (server.version,))
            assert coefficients is not None
            ordered, shares = scaled([u for u in every if u.client != ROOT], coefficients)
        space = server.space
        vector = server.vector.astype(np.float64)
        head_step(server, ordered, shares, vector)
        for module in space.modules:
            left, right = stacks(server, module, ordered, shares)
            u, s, vt = svd(left, right, module.rank)
            a, b = space.tensor(vector, module.a), space.tensor(vector, module.b)
            old = a.reshape(module.rank, -1).copy()
            # below this the singular values are rounding errors of the factors
            real = int((s > s[0] * max(left.shape[0], right.shape[1]) * np.finfo(np.float64).eps).sum())
            roots = np.sqrt(s[:real] / module.scale)
            b[...] = 0
            b[:, :real] = u[:, :real] * (roots if self.split == "even" else s[:real] / module.scale)
            rows = vt[:real] * (roots[:, None] if self.split == "even" else 1.0)
            a[...] = np.concatenate([rows, completion(vt[:real], old)]).reshape(a.shape)
        return finite(server, vector, increment={}, extra=extra)


def completion(rows: np.ndarray, old: np.ndarray) -> np.ndarray:
    """``(r - q, in)`` orthonormal rows, orthogonal to the q orthonormal ``rows``, in the span of ``old`` ``(r, in)``.

    Of the directions of ``old`` that are free, those that it has most of.
    """
    missing = len(old) - len(rows)
    if missing == 0:
        return old[:0]
    rest = old - product(product(old, rows.T), rows)
    # twice: the first leaves a rounding error of the size of what was taken away
    rest -= product(product(rest, rows.T), rows)
    vt = svd(np.eye(len(rest)), rest, min(missing, old.shape[1] - len(rows)))[2]
    return np.concatenate([vt, old[: missing - len(vt)]])  # more rows than columns: no direction is free
