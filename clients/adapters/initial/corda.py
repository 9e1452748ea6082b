"""CorDA: the adapter is the part of W0 that acts most, or least, on the inputs seen in a sample.

With C the inputs' second moment, ``W0 C = U S V^T``; then ``B = U_i sqrt(S_i / s)``, ``A = sqrt(S_i / s) V_i^T C^-1``
for the r largest singular values (``ipm``, instruction-previewed: adapt what the task uses) or the r smallest
(``kpm``, knowledge-preserved: keep what the sample uses), and ``-s B A`` is added to the base. Yang et al., CorDA
(arXiv 2406.05223), as in PEFT (``corda``): so that C has an inverse, ``C + damping * mean(diag C) I`` stands for it.

Differences from PEFT. It divides each call's inputs by their largest entry, here C is divided by the mean of its
diagonal: B A and the base don't depend on the scale of C, only the balance between B and A does. It doubles the
damping until a float32 inverse is accurate; in float64 it never needs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.adapters.initial.base import DataDriven, Site, Start, check_rank, exact, needed
from clients.adapters.initial.factors import svd
from fl.config import setting
from fl.errors import ShoalError


@dataclass(frozen=True)
class CorDA(DataDriven):
    """B A is r components of ``W0 C``, taken back through ``C^-1``, over s.

    A private moment is first projected onto the positive semidefinite matrices (post-processing of the release). Raises
    `ShoalError` for a moment without a positive eigenvalue.
    """

    statistic: ClassVar[str] = "moment"
    changes_base: ClassVar[bool] = True

    mode: str = setting("ipm", choices=["ipm", "kpm"], help="adapt what the sample uses (ipm) or keep it (kpm)")
    damping: float = setting(0.01, gt=0, help="added to the moment's diagonal, in units of its mean")

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, min(d, k))
        values, vectors = torch.linalg.eigh(needed(site.statistic, (k, k)))
        values = values.clamp(min=0)
        if not values.any():
            raise ShoalError("the inputs' second moment is zero or negative: CorDA needs inputs, or less noise")
        values = values / values.mean() + self.damping  # the mean eigenvalue is the mean of the diagonal
        u, s, vh = svd(exact(site.weight) @ (vectors * values) @ vectors.T)
        back = (vh @ vectors / values) @ vectors.T  # V^T C^-1, (min(d, k), k)
        part = slice(site.rank) if self.mode == "ipm" else slice(len(s) - site.rank, None)
        root = (s[part] / site.scale).sqrt()
        return Start.of(site.weight, root[:, None] * back[part], u[:, part] * root, cancel=site.scale)
