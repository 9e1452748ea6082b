"""LoRA-SB: begin at the best rank-r approximation of full fine-tuning's first step.

With G the gradient of a sample at W0, Adam's first step is ``dW = -eta0 sign(G)``. Its truncated SVD
``dW ~ U_r S_r V_r^T`` gives ``B = U_r``, ``A = V_r^T`` (orthonormal, frozen) and ``R = S_r / s``, so that
``W0 + s B R A = W0 + [dW]_r``; the base stays. One SGD step on R then moves W by ``-eta s^2 B B^T g A^T A``.
Ponkshe, Singhal et al., LoRA-SB (arXiv 2411.19557); in a federation Fed-SB (arXiv 2502.15436). The authors take
alpha = r (s = 1) and a randomised SVD without oversampling; here it is exact, which matters: the spectrum of a sign
matrix is flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.adapters.initial.base import DataDriven, Site, Start, check_rank, needed
from clients.adapters.initial.factors import svd
from fl.config import setting


@dataclass(frozen=True)
class LoRASB(DataDriven):
    """B, A, R from the SVD of ``-eta0 sign(G)``.

    The sign makes any positive multiple of G give the same start, and gives an entry of G that is all rounding the
    same weight as any other.
    """

    statistic: ClassVar[str] = "gradient"
    form: ClassVar[frozenset[str]] = frozenset({"bra"})

    eta0: float = setting(1e-4, gt=0, help="first learning rate of the full fine-tuning that the start imitates")

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, min(d, k))
        step = -self.eta0 * needed(site.statistic, (d, k)).sign()
        u, s, vh = svd(step)
        return Start.of(site.weight, vh[: site.rank], u[:, : site.rank], torch.diag(s[: site.rank] / site.scale))
