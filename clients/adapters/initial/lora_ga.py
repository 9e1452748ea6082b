"""LoRA-GA: singular vectors of the gradient, so that the first steps follow full fine-tuning's.

With ``G = U S V^T`` the mean gradient of a sample at W0, A takes r right vectors and B r left vectors from among the
first 2r (``direction``), and ``-s B A`` is added to the base. Wang et al., LoRA-GA (arXiv 2407.05000).

Two rules are in use, and they differ much. PEFT's (``lora_ga``) multiplies B by the singular values of its vectors,
``B = f U_i S_i, A = V_j^T``, so its start shrinks with the gradient:

    scale        f                           A
    stable       d^(1/4) / sqrt(gamma)       V_j^T
    weight_svd   sigma_1(W0) / S_i[0]        V_j^T
    gd_scale     1 / s                       V_j^T / s
    unit         1                           V_j^T

The authors' code has no singular values and treats both factors alike, ``B = f U_i, A = f V_j^T`` with
f = d^(1/4)/sqrt(gamma), ``mean sqrt(sigma_1..r(W0) / s)``, 1/s and 1: what the gradient's length is does not matter.
For a Conv1D PEFT takes the inputs for d; here d is always the number of outputs. PEFT's SVD is randomised, here exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clients.adapters.initial.base import DataDriven, Site, Start, check_rank, exact, needed
from clients.adapters.initial.factors import svd
from fl.config import setting


@dataclass(frozen=True)
class LoRAGA(DataDriven):
    """A and B from 2r singular vectors of G. Needs 2 rank <= min(d, k). ``count`` turns the summed G into the mean.

    ``direction``: A takes the vectors 2, 4, .. and B 1, 3, .. (``ArBr``); A the second r, B the first (``A2rBr``); A
    the first, B the second (``ArB2r``); or r random ones, of which PEFT's rule gives the same to both and the authors'
    others to B (``random``).
    """

    statistic: ClassVar[str] = "gradient"
    changes_base: ClassVar[bool] = True

    direction: str = setting(
        "ArB2r", choices=["ArBr", "A2rBr", "ArB2r", "random"], help="which of the 2 rank singular vectors A and B take"
    )
    scale: str = setting(
        "stable", choices=["stable", "weight_svd", "gd_scale", "unit"], help="how long A and B are at the start"
    )
    gamma: float = setting(16.0, gt=0, help="larger is a shorter start, for scale=stable")
    rule: str = setting("peft", choices=["peft", "authors"], help="with singular values in B (peft) or none (authors)")

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, min(d, k) // 2, "half of the smaller side of each adapted weight")
        u, s, vh = svd(needed(site.statistic, (d, k)) / site.count)
        for_a, for_b = self._vectors(site.rank, site.generator)
        a, b = vh[for_a], u[:, for_b]
        if self.rule == "authors":
            factor = self._alike(site.weight, site.rank, site.scale)
            return Start.of(site.weight, factor * a, factor * b, cancel=site.scale)
        b = b * s[for_b]
        if self.scale == "stable":
            b = b * d**0.25 / self.gamma**0.5
        elif self.scale == "weight_svd" and s[for_b[0]] > 0:
            b = b * (torch.linalg.matrix_norm(exact(site.weight), 2) / s[for_b[0]])
        elif self.scale == "gd_scale":
            a, b = a / site.scale, b / site.scale
        return Start.of(site.weight, a, b, cancel=site.scale)

    def _vectors(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of the singular vectors that A and B take."""
        both = torch.arange(2 * rank)
        if self.direction == "ArBr":
            return both[1::2], both[::2]
        if self.direction == "random":
            drawn = torch.randperm(2 * rank, generator=generator)
            return (drawn[:rank], drawn[rank:]) if self.rule == "authors" else (drawn[:rank], drawn[:rank])
        return (both[:rank], both[rank:]) if self.direction == "ArB2r" else (both[rank:], both[:rank])

    def _alike(self, weight: Tensor, rank: int, scale: float) -> float:
        """What the authors multiply both factors by."""
        if self.scale == "stable":
            return float(weight.shape[0] ** 0.25 / self.gamma**0.5)
        if self.scale == "weight_svd":
            return float((torch.linalg.svdvals(exact(weight))[:rank] / scale).sqrt().mean())
        return 1 / scale if self.scale == "gd_scale" else 1.0
