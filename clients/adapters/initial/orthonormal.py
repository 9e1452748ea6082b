"""A with orthonormal rows, ``A A^T = I``, uniform over such matrices; ``B = 0``.

The control for schemes that refactor A into orthonormal rows (FedSVD, arXiv 2505.12805): with plain SGD on B alone,
any two A of orthonormal rows and the same row space give the same trajectory of B A. A Kaiming A has
``A A^T ~ I/3``, so a learning rate here is worth three times it there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.adapters.initial.base import Initialisation, Site, Start, check_rank
from clients.adapters.initial.factors import orthonormal


@dataclass(frozen=True)
class Orthonormal(Initialisation):
    """A with random orthonormal rows, B zero. Needs rank <= k."""

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, k, "the inputs of each adapted weight")
        return Start.of(site.weight, orthonormal(site.rank, k, site.generator), torch.zeros(d, site.rank))
