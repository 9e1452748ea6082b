"""RoLoRA: A and B train in turn, so that in each round the mean of the factor is the mean of the products.

    odd rounds:   B' = sum_i p_i B_i,   s B' A = sum_i p_i s B_i A         (A frozen and common)
    even rounds:  A' = sum_i p_i A_i,   s B A' = sum_i p_i s B A_i         (B frozen and common)

(Chen et al., arXiv 2409.02346 and 2502.01755.) The first round trains B: from ``B = 0``, A would have no gradient.
Which factor trains is the adapter's part (`adapter=rolora`); here is what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregators.fedavg import FedAvg


@dataclass(frozen=True)
class RoLoRA(FedAvg):
    """The mean of the factor that trained in this round: exact, as the other factor is common."""

    takes = ("alternating",)
    mixed = ("alternating",)
