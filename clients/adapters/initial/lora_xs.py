"""LoRA-XS: only an r x r matrix between W0's own singular directions trains.

With ``W0 = U S V^T``: ``B = U_r``, ``A = S_r V_r^T``, ``R ~ N(0, std^2)`` with std = 1e-5, ``W = W0 + s B R A``; the
base stays. Bałazy et al., LoRA-XS (arXiv 2405.17604). Given W0 the frozen factors are the same for everyone: no data,
and nothing to send. The authors take a randomised SVD, here it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.adapters.initial.base import Initialisation, Site, Start, check_rank, exact
from clients.adapters.initial.factors import svd
from fl.config import setting


@dataclass(frozen=True)
class LoRAXS(Initialisation):
    """B, A from W0's truncated SVD, R nearly zero."""

    form: ClassVar[frozenset[str]] = frozenset({"bra"})

    std: float = setting(1e-5, ge=0, help="standard deviation of R at the start")

    def start(self, site: Site) -> Start:
        check_rank(site.rank, min(site.weight.shape))
        u, s, vh = svd(exact(site.weight))
        core = self.std * torch.randn(site.rank, site.rank, generator=site.generator, dtype=torch.float64)
        return Start.of(site.weight, s[: site.rank, None] * vh[: site.rank], u[:, : site.rank], core)
