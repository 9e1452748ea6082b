"""Random orthonormal B and A, ``B^T B = A A^T = I``, and ``R = 0``: a subspace that knows neither data nor weight.

The control for LoRA-XS and LoRA-SB (``W = W0 + s B R A``, R trained): what they gain over it is their subspace's doing.
R = 0 is no obstacle, since ``dL/dR = s B^T g A^T`` does not vanish there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.adapters.initial.base import Initialisation, Site, Start, check_rank
from clients.adapters.initial.factors import orthonormal


@dataclass(frozen=True)
class OrthonormalCore(Initialisation):
    """B and A random orthonormal, R zero. Needs rank <= min(d, k)."""

    form: ClassVar[frozenset[str]] = frozenset({"bra"})

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, min(d, k))
        a = orthonormal(site.rank, k, site.generator)
        return Start.of(site.weight, a, orthonormal(site.rank, d, site.generator).T, torch.zeros(site.rank, site.rank))
