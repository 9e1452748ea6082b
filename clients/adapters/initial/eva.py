"""EVA: A spans the directions in which the layer's inputs vary most; ``B = 0``.

With ``M = sum over tokens of x x^T``, A's rows are the r leading eigenvectors of M, that is, the r leading right
singular vectors of the matrix of all inputs. Paischer et al., EVA (arXiv 2410.07170). M adds up over
clients, so a federation finds what one holder of all the data would.

Differences from PEFT's ``eva``. Ranks are not redistributed among modules (its rho = 1), since the layout of a state
would then depend on the data. PEFT runs an incremental PCA, which subtracts the mean input; M is taken about zero, so
the mean itself is a direction. PEFT stops when the directions settle, here the sample is used once and exactly. PEFT
skips the tokens of a prompt (label -100), here every real token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.adapters.initial.base import DataDriven, Site, Start, check_rank, needed
from clients.adapters.initial.factors import signs


@dataclass(frozen=True)
class EVA(DataDriven):
    """A orthonormal, of the r largest eigenvalues of the inputs' second moment; B zero. Needs rank <= k.

    Noise can make some eigenvalues of a private moment negative; the largest ones are taken. Where fewer than r
    directions were seen, the rest of A is orthonormal to them and otherwise arbitrary.
    """

    statistic: ClassVar[str] = "moment"

    def start(self, site: Site) -> Start:
        d, k = site.weight.shape
        check_rank(site.rank, k, "the inputs of each adapted weight")
        vectors = torch.linalg.eigh(needed(site.statistic, (k, k)))[1].flip(1)[:, : site.rank]  # (k, r), descending
        return Start.of(site.weight, (vectors * signs(vectors)).T, torch.zeros(d, site.rank))
