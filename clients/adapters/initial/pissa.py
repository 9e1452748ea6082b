"""PiSSA: the adapter is W0's own principal part, the base what is left of it.

With ``W0 = U S V^T``: ``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r^T``, and ``-s B A = -U_r S_r V_r^T`` is added
to the base. Meng et al., PiSSA (arXiv 2404.02948); the division by s is PEFT's (``pissa``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clients.adapters.initial.base import Initialisation, Site, Start, check_rank, exact
from clients.adapters.initial.factors import svd


@dataclass(frozen=True)
class PiSSA(Initialisation):
    """B A is the best rank-r approximation of W0 over s. No data. PEFT computes it in float32, here in float64."""

    changes_base: ClassVar[bool] = True

    def start(self, site: Site) -> Start:
        check_rank(site.rank, min(site.weight.shape))
        u, s, vh = svd(exact(site.weight))
        root = (s[: site.rank] / site.scale).sqrt()
        return Start.of(site.weight, root[:, None] * vh[: site.rank], u[:, : site.rank] * root, cancel=site.scale)
