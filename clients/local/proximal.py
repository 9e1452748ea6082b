"""FedProx: a quadratic pull towards the start state (Li et al., arXiv 1812.06127, eq. 2).

Each step follows ``grad l(theta) + mu (theta - theta_start)``, the gradient of
``l(theta) + mu/2 |theta - theta_start|^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.cohort import Cohort
from clients.local.training import LocalTraining
from fl.config import setting


@dataclass(frozen=True)
class FedProx(LocalTraining):
    """`LocalTraining` with the proximal term; ``mu`` 0 is plain local training."""

    mu: float = setting(0.01, ge=0, help="strength of the pull towards the start state")

    def direction(self, params: Tensor, grads: Tensor, start: Tensor, cohort: Cohort) -> Tensor:
        return grads.add_(params - start, alpha=self.mu)
